"""Measures one peer at the works that are named, in a process of its own, and prints what was found as JSON. run.py starts it.

A work is a function of the peer's class, of how many calls to make and of how many seconds that may take. It returns
numbers by name: times in microseconds unless the name says otherwise, rates per second, memory in MiB. It makes at least
one call, and leaves out what the peer has not.
"""

import contextlib
import functools
import glob
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time

from peers.common import library
from peers.served import NAP, RECORD

THREADS = 16
MIB = 1 << 20
BATCH = 100  # submitted calls in flight


@contextlib.contextmanager
def started(peer):
    peer.start()
    try:
        yield peer
    finally:
        peer.stop()


def timed(calls, seconds, call, *args):
    """Call at most so often and about so long, and at least once. The sorted times in nanoseconds, without the first tenth."""
    now, times, over = time.perf_counter_ns, [], time.perf_counter_ns() + seconds * 1e9
    for _ in range(max(calls, 1)):
        begun = now()
        call(*args)
        ended = now()
        times.append(ended - begun)
        if ended > over:
            break
    return sorted(times[len(times) // 10:])


def median(times):
    return statistics.median(times) / 1000


def rate(times):
    """Per second."""
    return len(times) / sum(times) * 1e9


# -- one call after another, on one core

def greet(Peer, calls, seconds):
    with started(Peer()) as peer:
        times = timed(calls, seconds, peer.greet, "world")
    return {"median": median(times), "p99": times[len(times) * 99 // 100] / 1000}


def record(Peer, calls, seconds):
    with started(Peer()) as peer:
        return {"median": median(timed(calls, seconds, peer.record, RECORD))}


def mib1(Peer, calls, seconds):
    with started(Peer()) as peer:
        return {"median": median(timed(max(calls // 50, 50), seconds, peer.echo, b"x" * MIB))}


def mib64(Peer, calls, seconds):
    with started(Peer()) as peer:
        return {"median": median(timed(calls // 1000, seconds * 2, peer.echo, b"x" * 64 * MIB))}


def in_flight(peer, count):
    for answer in [peer.submit("world") for _ in range(count)]:
        answer()


def submit(Peer, calls, seconds):
    count = min(BATCH, calls)
    with started(Peer()) as peer:
        if peer.submit is None:
            return {}
        one = timed(calls, seconds, peer.greet, "world")
        return {"rate": count * rate(timed(calls // count, seconds, in_flight, peer, count)), "one by one": rate(one)}


def exhaust(peer, count):
    for _ in peer.count(count):
        pass


def stream(Peer, calls, seconds):
    with started(Peer()) as peer:
        if peer.count is None:
            return {}
        one = timed(calls, seconds, peer.greet, "world")
    with started(Peer("count")) as peer:
        return {"rate": calls * rate(timed(10, seconds, exhaust, peer, calls)), "one by one": rate(one)}


# -- many threads, on all cores

def crowd(peer, count, calls, seconds, method, *args):
    """Calls per second, all threads together. Each makes its share of the calls."""
    share = max(calls // count, 1)
    ready = threading.Barrier(count)
    spans = []

    def run():
        call = getattr(peer.client(), method)
        call(*args)  # some connect only now
        ready.wait()
        begun, made = time.perf_counter(), 0
        while made < share and time.perf_counter() - begun < seconds:
            call(*args)
            made += 1
        spans.append((begun, time.perf_counter(), made))

    running = [threading.Thread(target=run) for _ in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    begun, ended, made = zip(*spans)
    return sum(made) / (max(ended) - min(begun))


def nap(Peer, calls, seconds):
    with started(Peer("nap", THREADS)) as peer:
        return {"overlap": crowd(peer, THREADS, THREADS * max(calls // 500, 5), seconds, "nap") * NAP}


def threads(Peer, calls, seconds):
    with started(Peer(connections=THREADS + 1)) as peer:
        return {"one": crowd(peer, 1, calls, seconds, "greet", "world"),
                "rate": crowd(peer, THREADS, calls, seconds, "greet", "world")}


# -- its life

def start(Peer, calls, seconds):
    """Launch to first reply to closed; in milliseconds. The first time imports what the host needs, and is left out."""
    def once():
        with started(Peer()) as peer:
            peer.greet("world")

    once()
    return {"ms": median(timed(calls // 1000, seconds * 2, once)) / 1000}


def imports(Peer, calls, seconds):
    """What an import adds to a bare interpreter's life; in milliseconds."""
    run = functools.partial(subprocess.run, cwd=library(), check=True)
    programs = {"bare": "pass", "miniplug": "import miniplug", "connection": "import multiprocessing.connection"}
    found = {name: [] for name in programs}
    for _ in range(max(calls // 500, 1)):
        for name, program in programs.items():
            found[name] += timed(1, seconds, run, [sys.executable, "-c", program])
    times = {name: median(each) / 1000 for name, each in found.items()}
    return {"miniplug": times["miniplug"] - times["bare"], "connection": times["connection"] - times["bare"]}


def memory(Peer, calls, seconds):
    with started(Peer()) as peer:
        timed(calls // 10, seconds, peer.greet, "world")
        return {"host": rss([os.getpid()]), "plugin": rss(others())}


def backlog(Peer, calls, seconds):
    """What an endless stream that nobody reads comes to hold, on both sides."""
    with started(Peer()) as peer:
        exhaust(peer, calls)
        before = rss([os.getpid(), *others()])
        items = iter(peer.count(1 << 40))
        next(items)
        time.sleep(seconds)
        after = rss([os.getpid(), *others()])
        items.close()
    return {"MiB": after - before} if PROC else {}


# -- what processes hold, where /proc tells

PROC = os.path.isfile("/proc/self/statm")


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:  # it has ended
        return ""


def children():
    """The processes that this one has started."""
    return [pid for pid, parent in all_processes().items() if parent == os.getpid()]


def others():
    """The same, and those that they have."""
    parents = all_processes()
    found = [os.getpid()]
    for pid in found:
        found += [each for each, parent in parents.items() if parent == pid]
    return found[1:]


def all_processes():
    """{pid: that of its parent}."""
    parents = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        parent = read(path).rpartition(")")[2].split()[1:2]
        if parent:
            parents[int(path.split("/")[2])] = int(parent[0])
    return parents


def rss(pids):
    """Memory in MiB; pages that processes share are counted in each."""
    return sum(int(read(f"/proc/{pid}/statm").split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE") / MIB if PROC else None


def main():
    peer, calls, seconds, *works = sys.argv[1:]
    Peer = importlib.import_module(f"peers.{peer}_peer").Peer
    print(json.dumps({work: globals()[work](Peer, int(calls), float(seconds)) for work in works}))
