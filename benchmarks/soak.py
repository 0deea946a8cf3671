"""Looks for what leaks, and for what outlives a host: too long for the quick suite. (Linux: it reads /proc.)

    python3 benchmarks/soak.py                                    1,000 launches, 1,000,000 calls, 200 hosts killed: ten minutes
    python3 benchmarks/soak.py --launches 50 --calls 20000 --kills 10      a minute

Launches and calls are of every kind. After a warm-up descriptors may not grow at all, threads and memory no more than noise does
(`BREATH`, `ROOM`). The hosts are killed with SIGKILL at random moments, whatever they do; within 5 seconds nobody of theirs may be
alive, and no file left. Exit status 1 if that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import miniplug

ROOM = 2 << 20  # bytes that memory may grow by from the first third after the warm-up to the last
BREATH = 3  # threads: a pool breathes
WARM = 3  # one in so many is for warming up: until then allocators and the interpreter's caches still fill
SAMPLES = 30
SECONDS = 5.0  # that what a killed host has left may live


class Soaked:
    """What a plugin may do, but for dying."""

    def greet(self, name):
        return f"Hello, {name}!"

    def echo(self, value):
        return value

    def fail(self):
        raise ValueError("as it should")

    def nap(self, seconds):
        time.sleep(seconds)

    def count(self, end):
        yield from range(end)

    async def later(self, value):
        return value

    def call_back(self, function, value):
        return function(value)

    def lend(self):
        return miniplug.ref(self)

    def say(self, text):
        print(text)

    def die(self):
        os._exit(3)

    def start_a_child(self):
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


SPEC = os.path.abspath(__file__) + ":Soaked"


def nothing(line):
    """Takes a plugin's output."""


# -- leaks

class Watch:
    """What a process uses, sample after sample."""

    def __init__(self, title, pid=None):
        self.title = title
        self.process = f"/proc/{pid or os.getpid()}"
        self.samples = []

    def sample(self, done):
        with open(self.process + "/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        count = len(os.listdir(self.process + "/fd")), len(os.listdir(self.process + "/task"))
        self.samples.append((done, *count, memory))

    def report(self):
        """Print a line; returns whether all is flat."""
        done, descriptors, threads, memory = zip(*self.samples)
        third = max(1, len(done) // 3)
        flat = (statistics.median(descriptors[-third:]) <= max(descriptors[:third])
                and statistics.median(threads[-third:]) <= max(threads[:third]) + BREATH)
        begun, ended = statistics.median(memory[:third]), statistics.median(memory[-third:])
        slope = (ended - begun) / max(1, statistics.median(done[-third:]) - statistics.median(done[:third]))
        flat = flat and ended - begun <= ROOM
        columns = (f"{descriptors[0]} to {descriptors[-1]}", f"{threads[0]} to {threads[-1]}",
                   f"{begun / 1e6:.1f} to {ended / 1e6:.1f} MB", f"{slope:+.2f} B each")
        print(f"{self.title:<28}{''.join(f'{column:>20}' for column in columns)}   {'flat' if flat else 'GROWS'}", flush=True)
        return flat


def settle(watch):
    """Have what ends behind the caller's back (the threads of a plugin that was closed) end before it is counted."""
    gc.collect()
    deadline = time.monotonic() + 5
    while len(os.listdir(watch.process + "/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)


def launches(count):
    """Each plugin is used a little, and ended in one of the ways there are."""
    watch = Watch(f"{count:,} launches: host")
    warm = max(4, count // WARM)
    every = max(1, (count - warm) // SAMPLES)
    for number in range(count):
        one_life(number)
        if number >= warm and (number - warm) % every == 0:
            settle(watch)
            watch.sample(number)
    return watch.report()


def one_life(number):
    plugin = miniplug.launch(SPEC, stdout=nothing, stderr=nothing)
    proxy = plugin.dispense()
    assert proxy.greet.submit("you").result(20) == "Hello, you!"
    assert list(proxy.count(3)) == [0, 1, 2]
    assert proxy.call_back(lambda value: value + 1, 1) == 2
    if number % 4 == 1:
        plugin.kill()
    elif number % 4 == 2:
        with contextlib.suppress(miniplug.PluginCrashed):
            proxy.die()
    elif number % 4 == 3:
        with contextlib.suppress(miniplug.LaunchError):
            miniplug.launch([sys.executable, "-c", "raise SystemExit(3)"], stderr=nothing)
    plugin.close()


def calls(count):
    """A batch of each kind in turn, some from several threads at once."""
    env = {"MALLOC_ARENA_MAX": "1"}  # glibc's heaps, one for each thread, would take a day to fill up
    with miniplug.launch(SPEC, stdout=nothing, stderr=nothing, env=env) as plugin, ThreadPoolExecutor(4) as pool:
        proxy = plugin.dispense()
        watches = [Watch(f"{count:,} calls: host"), Watch("    and plugin", plugin.pid)]
        done, warm, sampled = 0, count // WARM, 0
        every = (count - warm) // SAMPLES
        while done < count:
            for kind in KINDS:
                done += kind(proxy, pool)
            if done >= warm and done - sampled >= every:
                sampled = done
                gc.collect()
                for watch in watches:
                    watch.sample(done)
    flat = [watch.report() for watch in watches]
    return all(flat)


def plain_calls(proxy, pool):
    for _ in range(1000):
        proxy.greet("you")
    return 1000


def calls_from_threads(proxy, pool):
    list(pool.map(lambda number: [proxy.echo({"number": number, "list": [1, 2.5, None]}) for _ in range(100)], range(8)))
    return 800


def submitted_calls(proxy, pool):
    for call in [proxy.echo.submit(number) for number in range(200)]:
        call.result(20)
    for call in [proxy.later.submit(number) for number in range(50)]:
        call.result(20)
    return 250


def streams(proxy, pool):
    for _ in range(5):
        assert sum(proxy.count(100)) == 4950
    abandoned = proxy.count(1000)
    next(abandoned)
    proxy.count(1000).close()
    return 7


def callbacks(proxy, pool):
    for number in range(50):
        proxy.call_back(lambda value: proxy.echo(value), number)
        proxy.lend().greet("you")
    return 200


def troubled_calls(proxy, pool):
    for _ in range(20):
        with contextlib.suppress(ValueError):
            proxy.fail()
        with contextlib.suppress(miniplug.NotSerializable):
            proxy.echo(object())
    with contextlib.suppress(miniplug.CallTimeout):
        proxy.nap.timeout(0.001)(0.002)
    proxy.nap.submit(0.002).cancel()
    return 42


def large_calls(proxy, pool):
    for size in (10_000, 1_000_000):
        proxy.echo(bytes(size))
    for _ in range(20):
        proxy.say("a line")
    return 22


KINDS = (plain_calls, calls_from_threads, submitted_calls, streams, callbacks, troubled_calls, large_calls)


# -- hosts that are killed

def be_a_host():
    """Go through all that a host may do, again and again, and say before each what it is."""
    while True:
        say("starting")
        plugin = miniplug.launch(SPEC, stdout=nothing, stderr=nothing)
        proxy = plugin.dispense()
        say("starting a child")
        proxy.start_a_child()
        say("in calls")
        for _ in range(300):
            proxy.greet("you")
        say("in a busy call")
        proxy.nap(0.1)
        say("in a stream")
        for _ in range(20):
            list(proxy.count(200))
        say("in callbacks")
        for number in range(100):
            proxy.call_back(proxy.echo, number)
        say("with threads")
        threads = [threading.Thread(target=proxy.nap, args=(0.05,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say("closing")
        plugin.close()


def say(moment):
    print(moment, flush=True)


def kills(count, seed):
    print(f"\n{count:,} hosts killed, seed {seed}:", flush=True)
    moments, lived, left = Counter(), [], []
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="mp-soak-") as folder, ThreadPoolExecutor(4) as pool:
        delays = [chance.uniform(0.0, 1.2) for _ in range(count)]
        for number, (moment, seconds, rest) in enumerate(pool.map(kill_a_host, [folder] * count, range(count), delays)):
            moments[moment] += 1
            lived.append(seconds)
            left += [(number, moment, *each) for each in rest]
    for moment, times in moments.most_common():
        print(f"    {times:4} {moment}")
    print(f"    what they had left lived for {statistics.median(lived):.2f} s at the median, {max(lived):.2f} s at most")
    for each in left:
        print("    LEFT:", *each)
    print(f"    {len(left)} processes and files left", flush=True)
    return not left


def kill_a_host(folder, number, delay):
    """Returns when that was, how long anything of the host's lived after that, and what still does."""
    own = os.path.join(folder, f"host-{number}-")  # told by this in their environment, or among the guardian's arguments
    os.mkdir(own)
    env = {**os.environ, "TMPDIR": own}
    host = subprocess.Popen([sys.executable, __file__, "--be-a-host"], env=env, stdout=subprocess.PIPE, start_new_session=True)
    time.sleep(delay)  # the random moment
    host.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    said = host.communicate()[0].decode().split("\n")[:-1]
    found = remains(own)
    while found and time.monotonic() - begun < SECONDS:
        time.sleep(0.02)
        found = remains(own)
    for pid, _ in found:
        with contextlib.suppress(OSError, TypeError):
            os.kill(pid, signal.SIGKILL)
    return said[-1] if said else "before it began", time.monotonic() - begun, found


def remains(own):
    """Processes and files of a host's: [(pid or None, what), ...]."""
    found = [(None, name) for name in os.listdir(own)]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                line = file.read()
            with open(f"/proc/{pid}/environ", "rb") as file:
                known = own.encode() in line + file.read()
            with open(f"/proc/{pid}/stat", "rb") as file:
                dead = file.read().rpartition(b") ")[2][:1] in b"ZX"
            if known and not dead:
                found.append((int(pid), line.replace(b"\0", b" ").decode(errors="replace")[:100]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launches", type=int, default=1000, metavar="N")
    parser.add_argument("--calls", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another one each time)")
    parser.add_argument("--be-a-host", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_a_host:
        be_a_host()
    print(f"{'':<28}{'descriptors':>20}{'threads':>20}{'memory':>20}{'of which':>20}")
    good = [not options.launches or launches(options.launches), not options.calls or calls(options.calls),
            not options.kills or kills(options.kills, random.randrange(1000) if options.seed is None else options.seed)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
