"""What calls of each kind cost: processor time of host and plugin together, beside a proxy of BaseManager's. run.py starts it.

    python3 benchmarks/calls.py [--library PATH] [--rounds N] [--calls N] [--plugins N] [--only ROW ...]

Host and plugins share one core. Processor time hardly depends on what else the machine does, and it is what a user pays. In
each round each side makes each row's calls, in turn, beginning with the other side each time. What is told is medians over the
rounds, in microseconds a call; a ratio is the median of the rounds' ratios. BaseManager has no deadline, no callback and
nothing to await: with the first it makes the same call without; the others are beside a plain call of miniplug's own.
--library measures another miniplug.py, or the one in another folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import BaseManager

import called
from called import MANY, record, values
from measure import PROC, children, rss
from peers.common import use_library

CORE = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
THREADS = 16
AT_ONCE = 50
PAUSE = 0.030  # seconds
SPEC = called.__file__ + ":Served"
MIXED = {**record(1), "when": datetime.date(2026, 11, 28), "bytes": b"sixteen of these", "pair": (1, "two")}


# -- the two sides


class Side:
    """Its methods are those of what is served. `hurried` is greet() with a deadline, where there is one."""

    def __init__(self, proxy):
        self.processor, self.greet, self.echo, self.values, self.call_back = (
            getattr(proxy, name, None) for name in ("processor", "greet", "echo", "values", "call_back"))
        self.hurried = self.greet
        self.pool = ThreadPoolExecutor(THREADS)  # whose threads keep their connections
        self.loop = asyncio.new_event_loop()


class Miniplug(Side):
    def __init__(self):
        import miniplug  # whichever is measured

        self.plugin = miniplug.launch(SPEC)
        super().__init__(self.plugin.dispense())
        self.hurried = self.greet.timeout(60)

    def close(self):
        self.loop.close()
        self.pool.shutdown()
        self.plugin.close()


class Manager(BaseManager):
    pass


Manager.register("Served", called.Served)


class Managed(Side):
    def __init__(self):
        self.manager = Manager(ctx=multiprocessing.get_context("spawn"))
        self.manager.start()
        super().__init__(self.manager.Served())

    def close(self):
        self.loop.close()
        self.pool.shutdown()
        self.manager.shutdown()


SIDES = {"miniplug": Miniplug, "manager": Managed}


# -- the calls


def again(method, *args):
    """What makes such a call so often."""
    def run(side, count):
        call = getattr(side, method)
        for _ in range(count):
            call(*args)

    return run


def after_a_pause(side, count):
    for _ in range(count):
        time.sleep(PAUSE)
        side.greet("world")


def in_threads(side, count):
    together = threading.Barrier(THREADS)

    def run(share):
        together.wait()
        for _ in range(share):
            side.greet("world")

    list(side.pool.map(run, [count // THREADS] * THREADS))


def with_a_callback(side, count):
    for number in range(count):
        side.call_back(lambda value: value, number)


def awaited(side, count):
    async def run():
        for _ in range(count):
            await side.greet.submit("world")

    side.loop.run_until_complete(run())


def awaited_at_once(side, count):
    async def run():
        for _ in range(count // AT_ONCE):
            await asyncio.gather(*[side.greet.submit("world") for _ in range(AT_ONCE)])

    side.loop.run_until_complete(run())


# share: of the calls that a round makes of a small one. beside: the other side, or a plain call of our own. reach: what ratio
Row = namedtuple("Row", "title run share beside reach")
ROWS = {
    "greet": Row('`greet("world")`', again("greet", "world"), 1, "manager", 1.35),
    "deadline": Row("`greet` with a deadline", again("hurried", "world"), 1, "manager", 1.45),
    "none": Row("`echo` of None", again("echo", None), 1, "manager", 1.4),
    "bytes": Row("`echo` of 16 bytes", again("echo", b"sixteen of these"), 1, "manager", 2.0),
    "tuple": Row("`echo` of a tuple", again("echo", (1, "two")), 1, "manager", 2.0),
    "record": Row("a record of 20 fields", again("echo", record(0)), 1 / 2, "manager", 2.2),
    "mixed": Row("a record with a date, bytes and a tuple", again("echo", MIXED), 1 / 2, "manager", 2.8),
    "integers": Row("1,000 integers", again("echo", [n * 1001 for n in range(1000)]), 1 / 10, "manager", 1.3),
    "floats": Row("1,000 floats", again("echo", [n / 7 for n in range(1000)]), 1 / 10, "manager", 1.3),
    "records": Row("100 records", again("echo", [record(n) for n in range(100)]), 1 / 40, "manager", 2.2),
    "mib": Row("1 MiB of bytes", again("echo", b"x" * (1 << 20)), 1 / 20, "manager", 0.3),
    "pause": Row("`greet`, 30 ms after the last call", after_a_pause, 1 / 40, "manager", 1.25),
    "threads": Row(f"{THREADS} threads on one plugin", in_threads, 4, "manager", 1.0),
    "callback": Row("a call with one callback to a new reference", with_a_callback, 1 / 4, "greet", 5.0),
    "awaited": Row("an awaited call, one after another", awaited, 1 / 2, "greet", 3.0),
    "at once": Row(f"an awaited call, {AT_ONCE} at once", awaited_at_once, 1, "greet", 1.3),
    **{name: Row(f"{MANY:,} {name} in one result", again("values", name), 0, "manager", None) for name in called.makers()},
}
TURN = Row("{count} plugins called in turn", None, None, "manager", 1.5)


def cost(side, row, calls):
    """Of one of so many calls, in microseconds."""
    count = max(int(calls * row.share), AT_ONCE if row.run is awaited_at_once else THREADS if row.run is in_threads else 1)
    there, here = side.processor(), time.process_time()
    row.run(side, count)
    here = time.process_time() - here
    return (here + side.processor() - there) / count * 1e6


def check(sides, names):
    """Both give what they should."""
    for side in sides.values():
        assert side.greet("world") == "Hello, world!"
        for value in (None, (1, "two"), MIXED, b"bytes", record(1)):
            assert repr(side.echo(value)) == repr(value)
        for name in set(names) & set(called.makers()):
            assert repr(side.values(name)) == repr(values(name)), name


def measure(names, rounds, calls):
    """{row: {side: [microseconds, one for each round]}}."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, make in SIDES.items():
            sides[name] = make()
            stack.callback(sides[name].close)
        check(sides, names)
        found = {}
        for turn in range(-1, rounds):
            for name in names:
                row = ROWS[name]
                among = [each for each in sides if each == "miniplug" or row.beside == each]
                for each in among[::-1] if turn % 2 else among:
                    figure = cost(sides[each], row, calls)
                    if turn >= 0:  # one round is for warming up
                        found.setdefault(name, {}).setdefault(each, []).append(figure)
            tell(f"round {turn + 1} of {rounds}: calls")
        return found


# -- a hundred plugins


def in_turn(count, rounds):
    """The same of that many plugins called in turn; and what it takes to have them."""
    others = children()  # such as multiprocessing's resource tracker
    with contextlib.ExitStack() as stack:
        begun, used = time.perf_counter(), time.process_time()
        plugins = [started(stack, Miniplug) for _ in range(count)]
        found = {"launch ms": (time.perf_counter() - begun) / count * 1e3,
                 "launch ms, of which the host": (time.process_time() - used) / count * 1e3, **held(plugins, others)}
        sides = {"miniplug": plugins, "manager": [started(stack, Managed) for _ in range(count)]}
        calls = {name: [] for name in sides}
        for turn in range(rounds):
            for name in sorted(sides, reverse=turn % 2):
                calls[name].append(cost_in_turn(sides[name], 20))
            tell(f"round {turn + 1} of {rounds}: {count} plugins in turn")
        return {"calls": calls, **found, "count": count}


def started(stack, make):
    side = make()
    stack.callback(side.close)
    side.greet("world")
    return side


def cost_in_turn(sides, times):
    there, here = sum(side.processor() for side in sides), time.process_time()
    for _ in range(times):
        for side in sides:
            side.greet("world")
    here = time.process_time() - here
    return (here + sum(side.processor() for side in sides) - there) / times / len(sides) * 1e6


def held(plugins, others):
    """What they are, after a while in which nobody calls; of what only /proc tells nothing where there is none."""
    processor = sum(side.processor() for side in plugins) + time.process_time()
    time.sleep(3)
    processor = sum(side.processor() for side in plugins) + time.process_time() - processor
    pids = {side.plugin.pid for side in plugins}
    guardians = set(children()) - pids - set(others)
    if not PROC:
        return {"idle": processor / 3}
    return {"idle": processor / 3, "guardians": len(guardians), "host MiB": rss([os.getpid()]),
            "plugin MiB": rss(pids) / len(pids), "guardians MiB": rss(guardians)}


# -- what is told


def ratios(found, name):
    """Of the rounds."""
    row, own = ROWS.get(name, TURN), found[name]["miniplug"]
    other = found[name]["manager"] if row.beside == "manager" else found.get(row.beside, {}).get("miniplug", [])
    return [mine / theirs for mine, theirs in zip(own, other)]


def rows(found):
    """(title, microseconds of miniplug, of the other, ratio, what to reach), each but the first two None where there is none."""
    for name, sides in found["calls"].items():
        row = ROWS.get(name, TURN)
        beside = sides.get("manager") or found["calls"].get(row.beside, {}).get("miniplug")
        each = ratios(found["calls"], name)
        yield (row.title.format(count=found.get("plugins", {}).get("count")), statistics.median(sides["miniplug"]),
               statistics.median(beside) if beside else None, statistics.median(each) if each else None, row.reach, row.beside)


def tell(text):
    print(text, file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", metavar="PATH", help="measure this miniplug.py, or the one in this folder")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--calls", type=int, default=400, help="how many small calls a round makes; of others accordingly fewer")
    parser.add_argument("--plugins", type=int, default=100, metavar="N", help="how many are called in turn (0: not measured)")
    parser.add_argument("--only", nargs="*", choices=[*ROWS, "turn"], metavar="ROW", help=", ".join([*ROWS, "turn"]))
    parser.add_argument("--json", action="store_true", help="all figures of all rounds")
    return parser.parse_args()


def main():
    options = parse()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if plain != os.environ:  # they change how Python runs: without bytecode each plugin compiles the library anew, say
        return subprocess.call([sys.executable, *sys.argv], env=plain)
    use_library(sys.argv)
    if CORE is not None:
        os.sched_setaffinity(0, {CORE})
    wanted = options.only or [*ROWS, "turn"]
    found = {"calls": {}}
    many = set(called.makers())
    # What large values leave of the memory would tell on others; and 1 MiB depends on what was there before.
    for among in ({"mib"}, set(ROWS) - many - {"mib"}, many):
        names = [name for name in ROWS if name in among and name in wanted]
        if names:
            found["calls"].update(measure(names, options.rounds, options.calls))
    found["calls"] = {name: found["calls"][name] for name in ROWS if name in found["calls"]}
    if "turn" in wanted and options.plugins:
        found["plugins"] = in_turn(options.plugins, options.rounds)
        found["calls"]["turn"] = found["plugins"].pop("calls")
    if options.json:
        print(json.dumps(found))
        return 0
    for title, own, other, ratio, reach, beside in rows(found):
        shown = "" if ratio is None else f"{other:9.1f}  {ratio:5.2f} x {'of our own greet' if beside == 'greet' else ''}"
        print(f"{title:45}{own:9.1f}{shown}  {'' if reach is None else f'(reach {reach:g})'}")
    for name, number in found.get("plugins", {}).items():
        print(f"{name:45}{number:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
