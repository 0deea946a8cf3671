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
    "connection": EVERYONE | {"mib64", "submit", "stream", "payloads", "crowds", "plugins"},
    "miniplug": EVERYONE | {"mib64", "submit", "stream", "payloads", "crowds", "flights", "plugins", "backlog", "imports", "soak"},
    "manager": EVERYONE | {"stream"},
    "pool": EVERYONE | {"submit"},
    "xmlrpc": EVERYONE,
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no core to pin to by this way, and the run takes minutes there")
def test_a_quick_run_measures_everything(tmp_path):
    before = (ROOT / "README.md").read_bytes()
    few = ["--rounds", "1", "--calls", "20", "--seconds", "0.02"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", *few, "--output", str(tmp_path)],
                          capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {name: set(works) for name, works in results.items()} == WANTED
    for works in results.values():
        for numbers in works.values():
            assert all(type(number) in (int, float) for rounds in numbers.values() for number in rounds)
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert done.stdout.count("| small call, against ") == written.count("| small call, against ") == 7
    assert "miniplug" in written and "reached" in written
    assert (ROOT / "README.md").read_bytes() == before


@pytest.mark.skipif(os.name == "nt" or not os.path.isdir("/proc/self/fd"), reason="it reads /proc")
def test_the_soak_runs():
    """So few launches and calls say nothing of leaks; that a killed host leaves nothing is always so."""
    few = ["--launches", "5", "--calls", "3000", "--kills", "1", "--seed", "2"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), *few], capture_output=True, encoding="utf-8",
                          stdin=subprocess.DEVNULL, check=False)
    assert not done.stderr
    for title in ("5 launches: host", "3,000 calls: host", "    and plugin", "1 hosts killed", "    0 processes and files left"):
        assert f"\n{title}" in done.stdout
