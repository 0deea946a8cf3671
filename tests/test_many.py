"""Plugins by the hundred: one guardian for all of them, and none is left when the host is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import HERE, WINDOWS, alive

COUNT = 100
HOST = """
    import concurrent.futures, faulthandler, json, os, subprocess, sys
    import miniplug

    faulthandler.dump_traceback_later(100)  # if it does not end, this is why


    def children():
        if not os.path.isdir("/proc/self"):
            lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True).stdout.splitlines()
            return {int(line.split()[0]) for line in lines if line.split()[1] == str(os.getpid())}
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat") as file:
                    state, parent = file.read().rpartition(") ")[2].split()[:2]
            except OSError:
                continue
            if parent == str(os.getpid()) and state not in "ZX":
                found.add(int(pid))
        return found


    def launch(number):
        plugin = miniplug.launch(sys.argv[1] + ":Workshop", name=f"number{number}")
        proxy = plugin.dispense()
        return plugin, proxy, proxy.pid()


    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        launched = list(pool.map(launch, range(int(sys.argv[2]))))
    pids = [plugin.pid for plugin, _, _ in launched]
    print(json.dumps({"plugins": pids, "asked": [pid for _, _, pid in launched], "children": sorted(children())}), flush=True)
    if sys.stdin.readline():  # nothing comes if it is to be killed
        for plugin, proxy, _ in launched:
            assert proxy.greet("you") == "Hello, you!"
        half = launched[::2]
        for plugin, _, _ in half:
            plugin.close()
        print(json.dumps({"children": sorted(children())}), flush=True)
"""

posix = pytest.mark.skipif(WINDOWS, reason="there a job ends what is left: no guardian")


@pytest.fixture
def host(write):
    """A host of that many plugins, and what it said of them."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(HERE), HERE]))
    process = subprocess.Popen([sys.executable, write("host.py", HOST), os.path.join(HERE, "workshop.py"), str(COUNT)], env=env,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with process:
        yield process, json.loads(process.stdout.readline())
        process.kill()


@posix
@pytest.mark.timeout(180)
def test_a_hundred_plugins_have_one_guardian(host):
    process, told = host
    assert told["plugins"] == told["asked"] and len(set(told["plugins"])) == COUNT
    guardians = set(told["children"]) - set(told["plugins"])
    assert len(guardians) == 1
    process.stdin.write("go on\n")
    process.stdin.flush()
    later = set(json.loads(process.stdout.readline())["children"])
    assert later == set(told["plugins"][1::2]) | guardians
    assert process.wait(60) == 0  # it closes the others
    assert not any(map(alive, [*told["plugins"], *guardians]))


@posix
@pytest.mark.timeout(180)
def test_a_hundred_plugins_end_with_their_host(host):
    process, told = host
    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    while any(map(alive, told["children"])):
        assert time.monotonic() < killed + 5, len(list(filter(alive, told["children"])))
        time.sleep(0.02)
