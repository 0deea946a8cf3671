"""What type checkers see: every option of launch, attach and local, and the types of what they give."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import miniplug

SOURCE = '''
import logging, sys
import miniplug

with miniplug.launch([sys.executable, "x.py"], name="x", handshake=miniplug.Handshake(1, "A", "b"), protocol_versions=[1],
                     python="python3", env={"A": "b"}, inherit_env=False, cwd=".", start_timeout=None, call_timeout=1.0,
                     stdin="discard", stdout="log", stderr=print, logger=logging.getLogger(), sha256={"x": "y"},
                     limits=miniplug.Limits(memory=1), max_restarts=1, restart_window=1.0, heartbeat=None, idle_timeout=1,
                     on_start=lambda plugin: plugin.dispense(), on_exit=None, managed=True, persist=False,
                     max_message=1) as plugin:
    plugin.name.upper()
config = plugin.reattach_config()
other: miniplug.Plugin = miniplug.attach(config, name="x", handshake=miniplug.Handshake(), protocol_versions=[1],
                                         call_timeout=1, heartbeat=1, logger=None, max_message=1)
third: miniplug.Plugin = miniplug.local({"x": object()}, info={}, max_workers=1)
limits = miniplug.Limits(memory=1, cpu_seconds=1.5)
tell: "tuple[int | None, float | None, int | None]" = (limits.memory, limits.cpu_seconds, limits.open_files)
'''
WRONG = {
    'miniplug.launch("x", start_timeuot=3)': "call-arg", 'miniplug.launch("x", start_timeout="3")': "arg-type",
    'miniplug.launch("x", stdout=3)': "arg-type", "miniplug.launch(3)": "arg-type",
    'miniplug.Plugin("x", env=["A"])': "arg-type", 'miniplug.attach({}, python="x")': "call-arg",
    'miniplug.attach({}, nmae="x")': "call-arg", 'miniplug.local({}, nmae="x")': "call-arg",
    "miniplug.Limits(memroy=3)": "call-arg", "limits.memory.bit_length()": "union-attr", "limits.memroy": "attr-defined"}


@pytest.mark.timeout(180)
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="there is no mypy")
def test_a_misspelt_option_is_found_before_it_runs(write, tmp_path):
    source = SOURCE + "".join(f"{line}\n" for line in WRONG)
    path, first = write("host.py", source), SOURCE.count("\n") + 1
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), path],
                          env=dict(os.environ, MYPYPATH=os.path.dirname(os.path.abspath(miniplug.__file__))),
                          capture_output=True, text=True, check=False, cwd=str(tmp_path))
    found = re.findall(r"^host\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout, re.MULTILINE)
    assert found == [(str(first + number), kind) for number, kind in enumerate(WRONG.values())], done.stdout + done.stderr
