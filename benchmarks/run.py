"""Measures miniplug beside its peers, and writes results.md, calls.svg, latency.svg and the README's section.

    python3 benchmarks/run.py              everything, in a virtual environment of its own, benchmarks/.venv
    python3 benchmarks/run.py --quick      under a minute: miniplug and the standard library's own
    python3 benchmarks/run.py --library PATH --output FOLDER        the same of another miniplug.py, to compare with

Only a whole run of the library here rewrites those files; what another one finds is printed, and written with --output.

What calls of each kind cost, in processor time, is what calls.py measures. The rest is by the clock: each round runs each peer
once at each work, in a process of its own (measure.py), beginning with another peer each time. What is told is medians over the
rounds; a ratio is the median of the rounds' ratios. Where latency is measured, host and plugin share one core. go-plugin is
measured where Go and its packages are installed (Debian: golang-go, golang-github-hashicorp-go-plugin-dev,
golang-google-grpc-dev, golang-goprotobuf-dev). What leaks, soak.py tells.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import calls
from peers.common import use_library

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
VENV = HERE / ".venv"
REQUIREMENTS = HERE / "requirements.txt"
GO_SOURCE = HERE / "peers" / "goplugin"
GO_PATH = "/usr/share/gocode"  # where Debian's packages put Go libraries
DASH, TIMES = "\u2013", "\u00d7"
BEGIN, END = "<!-- begin: written by benchmarks/run.py -->\n", "<!-- end -->\n"

Peer = namedtuple("Peer", "title package")  # package: what it needs that the standard library has not
PEERS = {
    "connection": Peer("stock `Connection`, bytes", None),
    "miniplug": Peer("**miniplug**", None),
    "manager": Peer("BaseManager", None),
    "goplugin netrpc": Peer("go-plugin, net/rpc", "go"),
    "goplugin grpc": Peer("go-plugin, gRPC", "go"),
    "rpyc": Peer("RPyC, tuned", "rpyc"),
    "pyro5": Peer("Pyro5", "Pyro5"),
    "pool": Peer("ProcessPoolExecutor, spawn", None),
    "grpc": Peer("gRPC, Python", "grpc"),
    "xmlrpc": Peer("xmlrpc", None),
}
STANDARD = [name for name, peer in PEERS.items() if peer.package is None]

# What is measured, on one core or on all, and of whom. In this order: what comes first leaves no trace in the memory.
PINNED, FREE = True, False
BOTH, OWN = ["connection", "miniplug"], ["miniplug"]
WORKS = {
    "memory": (FREE, PEERS), "backlog": (PINNED, OWN), "greet": (PINNED, PEERS), "record": (PINNED, PEERS),
    "mib1": (PINNED, PEERS), "mib64": (PINNED, PEERS), "submit": (PINNED, PEERS), "stream": (PINNED, PEERS),
    "nap": (FREE, PEERS), "threads": (FREE, PEERS), "start": (FREE, PEERS), "imports": (PINNED, OWN),
}


# -- getting ready

def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the standard library's peers, and few calls")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", choices=[*PEERS, *WORKS, "calls"],
                        help=f"a peer or a work, and no other; may be repeated: {', '.join([*PEERS, *WORKS])}, calls")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--calls", type=int, help="how many small calls a round makes; of others accordingly fewer")
    parser.add_argument("--plugins", type=int, help="how many are called in turn")
    parser.add_argument("--library", metavar="PATH", help="measure this miniplug.py, or the one in this folder")
    parser.add_argument("--seconds", type=float, help="about how long a work may take in one round")
    parser.add_argument("--output", type=Path, help="a folder to write to; the README stays as it is")
    options = parser.parse_args(arguments)
    for name, quick, full in (("rounds", 2, 7), ("calls", 400, 10000), ("plugins", 3, 100), ("seconds", 0.1, 1.0)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def environment():
    """For the children: nothing in it changes how Python runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def command(*arguments, **options):
    done = subprocess.run([str(each) for each in arguments], env=environment(), stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", check=False, **options)
    if done.returncode:
        raise OSError(((done.stderr or done.stdout).strip() or f"exit status {done.returncode}").splitlines()[-1])
    return done.stdout.strip()


def prepare_venv():
    """The Python of the virtual environment with the peers in it; this one if that cannot be had."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = VENV / "requirements.txt"
    try:
        if not done.exists() or done.read_text(encoding="utf-8") != REQUIREMENTS.read_text(encoding="utf-8"):
            say("installing the peers into benchmarks/.venv")
            command(sys.executable, "-m", "venv", "--clear", VENV)
            command(python, "-m", "pip", "install", "-q", "-r", REQUIREMENTS)
            generated = VENV / "generated"
            generated.mkdir()
            command(python, "-m", "grpc_tools.protoc", f"-I{HERE / 'peers'}", f"--python_out={generated}",
                    f"--grpc_python_out={generated}", "greeter.proto")
            shutil.copy(str(REQUIREMENTS), str(done))
    except OSError as error:
        say(f"only what is installed is measured: {error}")
        return sys.executable
    return str(python)


def build_go():
    """Raises OSError where go-plugin cannot be had."""
    environ = {"GO111MODULE": "off", "GOPATH": os.pathsep.join(filter(None, [os.environ.get("GOPATH"), GO_PATH]))}
    os.environ.update(environ)
    if not shutil.which("go"):
        raise OSError("there is no Go here")
    command("go", "build", "-o", go_program(), ".", cwd=str(GO_SOURCE), timeout=600)


def go_program():
    return VENV / "goplugin"


def available(names):
    """The peers among these that can be had, and why the others cannot."""
    found, missing = [], {}
    for name in names:
        package = PEERS[name].package
        try:
            if package == "go" and not any(each.startswith("goplugin") for each in found):
                build_go()
            elif package not in (None, "go") and not importlib.util.find_spec(package):
                raise OSError(f"{package} is not installed")
            found.append(name)
        except OSError as error:
            missing[name] = str(error)
            say(f"{plain(name)} is left out: {error}")
    return found, missing


def say(text):
    print(text, file=sys.stderr, flush=True)


def plain(name):
    return PEERS[name].title.replace("*", "").replace("`", "")


# -- measuring

def core():
    return max(os.sched_getaffinity(0))


def measure(name, works, pinned, options):
    """{work: {key: number}} from a child. Raises OSError and subprocess.TimeoutExpired."""
    program = [go_program(), name.split()[1]] if name.startswith("goplugin") else [
        sys.executable, "-c", "from measure import main; main()", name]
    pin = (lambda: os.sched_setaffinity(0, {core()})) if pinned and hasattr(os, "sched_setaffinity") else None
    return json.loads(command(*program, options.calls, options.seconds, *works, cwd=str(HERE), preexec_fn=pin, timeout=1200))


def measure_calls(options):
    """What calls.py has found. Its rounds are short: there are twice as many."""
    return json.loads(command(sys.executable, HERE / "calls.py", "--json", "--rounds", 2 * options.rounds, "--plugins",
                              options.plugins, "--calls", max(options.calls // 25, 1), cwd=str(HERE), timeout=3600))


def plan(names, works, options):
    """What one round runs: (peer, works, pinned). Each work has a process of its own, so that what one did to the memory does
    not tell on the next; in a quick run only the echoes have."""
    for pinned in (PINNED, FREE):
        some = [work for work in works if WORKS[work][0] is pinned]
        large = [work for work in some if work.startswith("mib")]
        groups = [[work for work in some if work not in large], large] if options.quick else [[work] for work in some]
        for group in groups:
            for name in names:
                yield name, [work for work in group if is_for(name, work, options)], pinned


def is_for(name, work, options):
    return name in WORKS[work][1] and not (options.quick and work == "mib64" and name not in BOTH)


def run(names, works, options):
    """{peer: {work: {key: [a number, or None, for each round]}}}, and whether all went well."""
    results, well = {name: {} for name in names}, True
    for turn in range(options.rounds):
        rotated = names[turn % len(names):] + names[:turn % len(names)]
        for name, some, pinned in plan(rotated, works, options):
            if not some:
                continue
            say(f"round {turn + 1} of {options.rounds}: {plain(name)}: {', '.join(some)}")
            try:
                found = measure(name, some, pinned, options)
            except (OSError, subprocess.TimeoutExpired) as error:
                say(f"FAILED: {error}")
                well = False
                continue
            for work, numbers in found.items():
                for key, number in numbers.items():
                    results[name].setdefault(work, {}).setdefault(key, [None] * options.rounds)[turn] = number
    return results, well


class Results:
    """Asked for numbers: None where there is none. `calls` is what calls.py has found, or nothing."""

    def __init__(self, results, calls):
        self.results = results
        self.calls = calls

    def rounds(self, name, work, key):
        return self.results.get(name, {}).get(work, {}).get(key, [])

    def number(self, name, work, key):
        found = [number for number in self.rounds(name, work, key) if number is not None]
        return statistics.median(found) if found else None

    def ratio(self, one, other):
        """Of two (peer, work, key)."""
        pairs = zip(self.rounds(*one), self.rounds(*other))
        found = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
        return statistics.median(found) if found else None


# -- the figures to reach

def figures(results):
    """(what, what to reach, what was measured, whether it was reached); the last two None where nothing was measured."""
    def of(work, key, name="miniplug"):
        return (name, work, key)

    def ratio(what, one, other, limit, at_most=True):
        found = results.ratio(one, other)
        sign = "≤" if at_most else "≥"
        reached = None if found is None else found <= limit if at_most else found >= limit
        return what, f"{sign} {limit:g} {TIMES}", found and f"{found:.2f} {TIMES}", reached

    for title, own, _, found, reach, _ in map(tuple, calls.rows(results.calls)) if results.calls else ():
        if reach:
            yield f"{title}, processor time", f"≤ {reach:g} {TIMES}", f"{micro(own)}, {found:.2f} {TIMES}", found <= reach
    for name in ("goplugin netrpc", "goplugin grpc", "rpyc", "pyro5", "grpc"):
        found = results.ratio(of("greet", "median", name), of("greet", "median"))
        yield (f"small call, against {plain(name)}", "faster", found and f"{found:.2f} {TIMES} as fast",
               None if found is None else found > 1)
    for work, title, limit in (("mib1", "1 MiB", 2.5), ("mib64", "64 MiB", 1.5)):
        stock, own = of(work, "median", "connection"), of(work, "median")
        yield ratio(f"{title} echo, throughput against the stock echo", stock, own, limit, False)
    overlap = results.number("miniplug", "nap", "overlap")
    yield ("16 threads in a method that sleeps 10 ms", "≥ 0.9 of 16-fold overlap", overlap and f"{overlap / 16:.2f} of 16-fold",
           None if overlap is None else overlap >= 0.9 * 16)
    yield ratio("pipelined submit, against one by one", of("submit", "rate"), of("submit", "one by one"), 1, False)
    yield ratio("stream of small items, against calls", of("stream", "rate"), of("stream", "one by one"), 5, False)
    held = results.number("miniplug", "backlog", "MiB")
    yield ("the memory of a stream that nobody reads", "bounded (≤ 16 MiB)", None if held is None else f"{held:.1f} MiB",
           None if held is None else held <= 16)
    yield ratio("launch to first reply to closed, against the stock echo", of("start", "ms"), of("start", "ms", "connection"), 1.25)
    yield ratio("the same, against BaseManager", of("start", "ms"), of("start", "ms", "manager"), 0.8)
    yield ratio("`import miniplug`, against `import multiprocessing.connection`", of("imports", "miniplug"),
                of("imports", "connection"), 1.4)
    they = results.calls.get("plugins", {})
    yield (f"{they.get('count', 100)} plugins: guardians", "1", shown(they.get("guardians")),
           they["guardians"] == 1 if "guardians" in they else None)
    yield (f"{they.get('count', 100)} idle plugins: processor time, all together", "none (≤ 1 % of a core)",
           shown(they.get("idle"), "{:.1%}"), they["idle"] <= 0.01 if "idle" in they else None)


# -- what is written

def table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def shown(number, form="{:.3g}"):
    return DASH if number is None else form.format(number)


def micro(number):
    """Microseconds."""
    if number is None:
        return DASH
    unit, size = next(((unit, size) for unit, size in (("s", 1e6), ("ms", 1e3)) if number >= size), ("µs", 1))
    return f"{number / size:.3g} {unit}" if number < 100 * size else f"{number / size:.0f} {unit}"


def per_second(number):
    return DASH if number is None else f"{number / 1000:.3g} k/s"


def times(results, name, work, key):
    """How many times the stock echo's."""
    found = results.ratio((name, work, key), ("connection", work, key))
    return "" if found is None else f", {found:.2g} {TIMES}" if found < 10 else f", {found:.0f} {TIMES}"


def main_table(results):
    rows = [[PEERS[name].title,
             micro(results.number(name, "greet", "median")) + times(results, name, "greet", "median"),
             *(micro(results.number(name, work, "median")) for work in ("record", "mib1", "mib64")),
             per_second(results.number(name, "threads", "rate")),
             shown(results.number(name, "start", "ms"), "{:.3g} ms")] for name in results.results]
    return table(["", "small call", "20-field record", "1 MiB echo", "64 MiB echo", "16 threads", "launch, call, close"], rows)


def other_table(results):
    rows = [[PEERS[name].title,
             micro(results.number(name, "greet", "p99")),
             shown(results.number(name, "nap", "overlap"), "{:.1f}"),
             per_second(results.number(name, "threads", "one")),
             per_second(results.number(name, "submit", "rate")),
             per_second(results.number(name, "stream", "rate")),
             *(shown(results.number(name, "memory", side), "{:.0f} MiB") for side in ("host", "plugin"))]
            for name in results.results]
    return table(["", "small call, p99", "overlap of 16 naps", "1 thread", "submitted", "stream items", "host", "plugin"], rows)


def figures_table(results):
    words = {None: "not measured", True: "reached", False: "**not reached**"}
    rows = [[what, reach, measured or DASH, words[reached]] for what, reach, measured, reached in figures(results)]
    return table(["figure", "reach", "measured", ""], rows)


def calls_table(results, reach=True):
    """Of each kind of call, the dear ones too."""
    lines = []
    for title, own, other, ratio, limit, beside in calls.rows(results.calls):
        note = {"greet": "the plain call"}.get(beside, "")
        lines.append([title, micro(own), f"{micro(other)}{' (' + note + ')' if note else ''}", shown(ratio, f"{{:.2f}} {TIMES}"),
                      *([f"≤ {limit:g} {TIMES}" if limit else ""] if reach else [])])
    return table(["call", "miniplug", "BaseManager", "ratio", *(["reach"] if reach else [])], lines)


def many(results):
    """What it takes to have them."""
    found = results.calls.get("plugins", {})
    if "guardians" not in found:
        return ""
    return (f"{found['count']} plugins: {found['launch ms']:.0f} ms to launch each on one core, "
            f"{found['launch ms, of which the host']:.1f} ms of which the host's; "
            f"{found['plugin MiB']:.1f} MiB each, {found['host MiB']:.0f} MiB the host; guardians: {found['guardians']}, "
            f"{found['guardians MiB']:.1f} MiB. (Pages that processes share are counted in each.)\n")


def machine(names):
    """What it ran on, and which versions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    versions = [f"Python {platform.python_version()}"]
    pinned = dict(line.split("==") for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if "==" in line)
    packages = {"grpc": "grpcio", "rpyc": "rpyc", "pyro5": "Pyro5"}
    versions += [f"{packages[name]} {pinned[packages[name]]}" for name in names if name in packages]
    if any(name.startswith("goplugin") for name in names):
        versions += [command("go", "version").replace("go version ", "").replace("go", "Go ", 1).split(" linux")[0]]
        versions += [f"{title} {debian(package)}" for title, package in (
            ("go-plugin", "golang-github-hashicorp-go-plugin-dev"), ("grpc-go", "golang-google-grpc-dev"))]
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"{model}, {os.cpu_count()} cores; {system}; {', '.join(versions)}; {datetime.date.today().isoformat()}"


def debian(package):
    try:
        return command("dpkg-query", "-W", "-f", "${Version}", package)
    except OSError:
        return "of unknown version"


CALLS = """Processor time of host and plugin together, for one call, both on one core{unpinned}; medians of {rounds} rounds in which
both sides took turns. A BaseManager has no deadline, no cancelling, no callback, no stream and no safe codec; what it has not is
beside miniplug's own plain call.
"""
ABOUT = """By the clock: medians of {rounds} interleaved rounds; {times} is against the stock `Connection` that echoes bytes,
in the same round. Calls, echoes, submitted calls and streams ran with host and plugin on one core{unpinned};
threads and launches on all. `16 threads` make the small call on one plugin. The pool has one process.
"""


def about(text, options, rounds):
    unpinned = "" if hasattr(os, "sched_setaffinity") else " (not here: this system has no way to)"
    return text.format(times=TIMES, rounds=rounds, unpinned=unpinned)


def by_calls(results, options, reach=True):
    if not results.calls:
        return ""
    return "\n".join([calls_table(results, reach), about(CALLS, options, 2 * options.rounds)])


def document(results, missing, options):
    left_out = "".join(f"Left out: {PEERS[name].title}: {reason}.\n" for name, reason in missing.items())
    return "\n".join(["# How fast\n", f"`python3 benchmarks/run.py` has written this. {machine(results.results)}.\n",
                      "## What a call costs\n", by_calls(results, options), many(results), "## By the clock\n",
                      main_table(results), other_table(results), about(ABOUT, options, options.rounds), left_out,
                      "## Figures to reach\n", figures_table(results)])


def write(folder, results, missing, options):
    folder.mkdir(parents=True, exist_ok=True)
    both = {"calls": results.calls, "peers": results.results}
    (folder / "results.json").write_text(json.dumps(both, indent=1), encoding="utf-8")
    (folder / "results.md").write_text(document(results, missing, options), encoding="utf-8")
    try:
        import pictures
    except ImportError:
        say("matplotlib is not installed: no pictures")
    else:
        pictures.draw(folder, results, {name: plain(name) for name in results.results})


def write_readme(results, options):
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    assert begin, "the README has no place for it"
    picture = "![the time of a small call, with miniplug and its peers](benchmarks/latency.svg)\n"
    parts = [by_calls(results, options, reach=False), picture, about(ABOUT, options, options.rounds),
             machine(results.results) + ".\n"]
    README.write_text(before + BEGIN + "\n".join(parts) + END + after, encoding="utf-8")


def main(arguments):
    options = parse(arguments)
    use_library(arguments)
    if not options.quick and Path(sys.prefix).resolve() != VENV:
        python = prepare_venv()
        if python != sys.executable:
            return subprocess.call([python, __file__, *arguments], env=environment())
    names = [name for name in (STANDARD if options.quick else PEERS) if name in options.only or not set(options.only) & set(PEERS)]
    works = [work for work in WORKS if work in options.only or not set(options.only) & {*WORKS, "calls"}]
    names, missing = available(names)
    found = measure_calls(options) if "calls" in options.only or not options.only else {}
    results, well = run(names, works, options)
    results = Results(results, found)
    print("\n".join([by_calls(results, options), many(results), main_table(results), other_table(results), figures_table(results),
                     about(ABOUT, options, options.rounds)]))
    if options.output:
        write(options.output, results, missing, options)
    elif not options.quick and not options.only and not options.library:
        write(HERE, results, missing, options)
        write_readme(results, options)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
