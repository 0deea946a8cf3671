"""The benchmarks run, and measure all that they promise. How fast anything is, no test asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EVERYONE = {"memory", "greet", "record", "mib1", "nap", "threads", "start"}
WANTED = {
    "connection": EVERYONE | {"mib64", "submit", "stream"},
    "miniplug": EVERYONE | {"mib64", "submit", "stream", "backlog", "imports"},
    "manager": EVERYONE | {"stream"},
    "pool": EVERYONE | {"submit"},
    "xmlrpc": EVERYONE,
}
ALONE = {"callback", "awaited", "at once"}  # BaseManager has nothing of the kind


@pytest.mark.skipif(os.name == "nt", reason="Windows has no core to pin to by this way, and the run takes minutes there")
def test_a_quick_run_measures_everything(tmp_path):
    before = (ROOT / "README.md").read_bytes()
    few = ["--rounds", "1", "--calls", "20", "--seconds", "0.02", "--plugins", "2"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", *few, "--output", str(tmp_path)],
                          capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {name: set(works) for name, works in results["peers"].items()} == WANTED
    for works in results["peers"].values():
        for numbers in works.values():
            assert all(type(number) in (int, float) for rounds in numbers.values() for number in rounds)
    rows = results["calls"]["calls"]
    assert len(rows) == 25 and {name for name, sides in rows.items() if "manager" not in sides} == ALONE
    for sides in rows.values():
        assert all(type(number) is float and len(rounds) == 2 for rounds in sides.values() for number in rounds)
    assert results["calls"]["plugins"]["count"] == 2
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert done.stdout.count("| small call, against ") == written.count("| small call, against ") == 5
    assert "| 2 plugins called in turn |" in written and "miniplug" in written and "reached" in written
    assert (ROOT / "README.md").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="as above")
def test_another_library_is_measured(write, tmp_path):
    """Host and plugin import that one."""
    note = tmp_path / "imported"
    source = (ROOT / "miniplug.py").read_text(encoding="utf-8")
    other = write("other.py", f"{source}\n\nwith open({str(note)!r}, 'a') as _file:\n    print(os.getpid(), file=_file)\n")
    few = ["--rounds", "1", "--calls", "1", "--only", "greet", "none", "--json"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "calls.py"), *few, "--library", other],
                          capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["calls"]) == {"greet", "none"}
    assert len(set(note.read_text().split())) == 2


@pytest.mark.skipif(os.name == "nt" or not os.path.isdir("/proc/self/fd"), reason="it reads /proc")
def test_the_soak_runs():
    """So few launches and calls say nothing of leaks; that a killed host leaves nothing is always so."""
    few = ["--launches", "5", "--calls", "3000", "--kills", "1", "--seed", "2"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), *few], capture_output=True, encoding="utf-8",
                          stdin=subprocess.DEVNULL, check=False)
    assert not done.stderr
    for title in ("5 launches: host", "3,000 calls: host", "    and plugin", "1 hosts killed", "    0 processes and files left"):
        assert f"\n{title}" in done.stdout
