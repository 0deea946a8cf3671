"""The Dask example, on a cluster of several processes on this machine.

This needs Dask: that of this environment; or, where MINIPLUG_TEST_DASK=1, in one that is made for it from a package index.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import WINDOWS
from readme import blocks

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "dask"
HAS_DASK = find_spec("distributed") is not None

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(WINDOWS, reason="the example shows a death by signal, which Windows has not"),
    pytest.mark.skipif(not HAS_DASK and os.environ.get("MINIPLUG_TEST_DASK") != "1", reason="Dask is not installed"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with Dask."""
    if HAS_DASK:
        return sys.executable
    folder = tmp_path_factory.mktemp("dask")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r",
                    str(EXAMPLE / "requirements.txt")], check=True)
    return python


@pytest.fixture
def clone(tmp_path):
    shutil.copy(str(ROOT / "miniplug.py"), str(tmp_path))
    shutil.copytree(str(EXAMPLE), str(tmp_path / "examples" / "dask"), ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(python, folder, *arguments):
    """Run a program to its end, with an own folder for what Dask writes; return what it printed."""
    env = {**os.environ, "DASK_TEMPORARY_DIRECTORY": str(folder / "scratch"), "PYTHONPATH": str(folder / "examples" / "dask")}
    done = subprocess.run([python, *map(str, arguments)], cwd=str(folder), env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_does_what_its_readme_shows(python, clone):
    (command,), (shown,) = ([text for kind, text in blocks(EXAMPLE / "README.md") if kind == wanted] for wanted in ("sh", "text"))
    assert command.startswith("python3 ")
    assert run(python, clone, *command.split()[1:]) == shown


def test_each_worker_has_a_process_which_a_crash_ends_and_the_next_task_starts(python, clone):
    program = clone / "program.py"
    program.write_text(dedent('''
        import json, os, signal, time
        from cluster import Client, LocalCluster, parse, prepare
        import miniplug

        def pid(dask_worker):
            plugin = dask_worker.plugins.get("parser")
            return os.getpid(), plugin and plugin.plugin.pid

        def pids(client):
            return {address: list(each) for address, each in sorted(client.run(pid).items())}

        def on(client, address, line):
            return client.submit(parse, line, workers=[address], pure=False)

        def until(condition):
            deadline = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < deadline, "it did not happen"
                time.sleep(0.01)

        def ended(pid):
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    return stat.read().rpartition(") ")[2][0] == "Z"
            except OSError:
                return True

        def main():
            told = {}
            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
                prepare(client)
                told["idle"] = list(pids(client).values())
                first, second = pids(client)
                told["results"] = [on(client, address, "a=1").result() for address in (first, second)]
                before = pids(client)
                told["before"] = list(before.values())
                for name, line in (("crash", "a=1\\0"), ("error", "a=x")):
                    error = on(client, first, line).exception()
                    told[name] = [type(error).__name__, isinstance(error, miniplug.RemoteError), isinstance(error, ValueError),
                                  getattr(error, "signal_name", None)]
                told["next"] = on(client, first, "a=2").result()
                after = pids(client)
                told["after"] = list(after.values())
                until(lambda: ended(before[first][1]))

                # A worker that is killed takes its plugin with it, and the one in its place has another.
                client.submit(os.kill, after[second][0], signal.SIGKILL, workers=[first], pure=False).result()
                until(lambda: ended(after[second][1]))
                workers = lambda: set(client.scheduler_info()["workers"]) - {first}
                until(lambda: workers() and second not in workers())
                (third,) = workers()
                told["late"] = on(client, third, "a=3").result()

                client.unregister_worker_plugin("parser")
                until(lambda: ended(after[first][1]))
                prepare(client)
                told["again"] = on(client, first, "a=4").result()
                left = [plugin for worker, plugin in pids(client).values() if plugin]
            until(lambda: all(map(ended, left)))  # the cluster is closed
            told["left"] = len(left)
            print(json.dumps(told))

        if __name__ == "__main__":
            main()
    '''), encoding="utf-8")
    told = json.loads(run(python, clone, program).splitlines()[-1])
    assert [plugin for worker, plugin in told["idle"]] == [None, None]  # it starts when it is needed
    assert told["results"] == [{"a": 1}, {"a": 1}]
    (worker1, plugin1), (worker2, plugin2) = told["before"]
    assert len({worker1, plugin1, worker2, plugin2}) == 4
    assert told["crash"] == ["PluginCrashed", False, False, "SIGABRT"]
    assert told["error"] == ["ValueError", True, True, None]  # an ordinary exception is none of that
    assert told["next"] == {"a": 2}
    assert told["after"][0][0] == worker1 and told["after"][0][1] not in (plugin1, None)  # a new process, the same worker
    assert told["after"][1] == [worker2, plugin2]
    assert told["late"] == {"a": 3} and told["again"] == {"a": 4} and told["left"] == 1
