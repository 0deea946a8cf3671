"""Limits and checksums: what a plugin may use, and what may run at all."""

import hashlib
import importlib.util
import marshal
import os
import shutil
import struct
import subprocess
import sys

import pytest
from conftest import WINDOWS, WORKSHOP, until

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="POSIX sets limits with ulimit")
resource = pytest.importorskip("resource") if not WINDOWS else None
MEMORY = 400 << 20

GREEDY = """
import os, signal, subprocess, sys, threading

class Greedy:
    def limits(self):
        import resource
        return {name: list(resource.getrlimit(getattr(resource, "RLIMIT_" + name))) for name in ("AS", "CPU", "NOFILE")}

    def childs_limits(self):
        code = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[0])"
        return int(subprocess.check_output([sys.executable, "-c", code]))

    def allocate(self, size):
        return len(bytearray(size))

    def spin(self):
        while True:
            pass

    def spin_regardless(self):
        import ctypes  # in a thread there is no signal.signal()
        ctypes.CDLL(None).signal(int(signal.SIGXCPU), ctypes.c_void_p(1))
        self.spin()

    def open_many(self):
        files = []
        while True:
            files.append(open(os.devnull))

    def threads(self, wait=threading.Event()):
        threading.stack_size(256 << 20)  # with little room left one may start, and fail before Python knows of it
        while True:
            threading.Thread(target=wait.wait, daemon=True).start()

    def echo(self, value):
        return value

    def pid(self):
        return os.getpid()
"""


@pytest.fixture
def greedy(write):
    return write("greedy.py", GREEDY) + ":Greedy"


def test_what_is_no_limit():
    for name in miniplug.Limits._fields:
        for value in (0, -1, "5", True, float("nan"), float("inf"), *([] if name == "cpu_seconds" else [1.5])):
            with pytest.raises(ValueError, match=f"^{name}="):
                miniplug.Limits(**{name: value})
    assert miniplug.Limits() == (None, None, None) and miniplug.Limits(cpu_seconds=0.5).cpu_seconds == 0.5
    with pytest.raises(AttributeError):
        miniplug.Limits().memory = 5
    with pytest.raises(TypeError, match="it is a Limits"):
        miniplug.Plugin(WORKSHOP, limits={"memory": 5})


@posix
def test_they_hold_for_the_plugin_and_what_it_starts(greedy):
    ours = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]
    with miniplug.launch(greedy, limits=miniplug.Limits(memory=MEMORY, cpu_seconds=6.5, open_files=64)) as plugin:
        proxy = plugin.dispense()
        assert proxy.limits() == {"AS": [MEMORY] * 2, "CPU": [7, 8], "NOFILE": [64, 64]}
        assert proxy.childs_limits() == MEMORY
        assert proxy.pid() == plugin.pid  # the shell became the plugin
    assert ours == [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]


@posix
def test_memory(greedy):
    with miniplug.launch(greedy, limits=miniplug.Limits(memory=MEMORY)) as plugin:
        proxy = plugin.dispense()
        with pytest.raises(MemoryError) as caught:
            proxy.allocate(MEMORY)
        assert isinstance(caught.value, miniplug.RemoteError)
        assert proxy.allocate(1000) == 1000


@posix
def test_a_message_that_does_not_fit_costs_the_plugin_alone(greedy):
    """The host sends more than the plugin has memory for: it fails there, and is explained here."""
    with miniplug.launch(greedy, limits=miniplug.Limits(memory=180 << 20)) as plugin:
        proxy = plugin.dispense()
        with pytest.raises((MemoryError, miniplug.PluginCrashed)) as caught:
            proxy.echo(bytes(200 << 20))
        if isinstance(caught.value, miniplug.PluginCrashed):
            assert "MemoryError" in str(caught.value)
            plugin.start()
        assert proxy.echo("x") == "x"


@posix
def test_processor_time(greedy):
    with miniplug.launch(greedy, limits=miniplug.Limits(cpu_seconds=1)) as plugin:
        with pytest.raises(miniplug.PluginCrashed) as caught:
            plugin.dispense().spin()
        assert caught.value.signal_name == "SIGXCPU" and caught.value.calls == ["spin"]
        assert "died of SIGXCPU, over its limit of cpu_seconds during spin()" in str(caught.value)


@posix
def test_processor_time_of_one_that_does_not_care(greedy):
    """It ignores SIGXCPU; a second later it is SIGKILL."""
    plugin = miniplug.launch(greedy, limits=miniplug.Limits(cpu_seconds=1))
    with pytest.raises(miniplug.PluginCrashed, match="died of SIGKILL"):
        plugin.dispense().spin_regardless()


@posix
def test_a_sigkill_of_somebody_elses_is_not_blamed_on_the_limit(greedy):
    with miniplug.launch(greedy, limits=miniplug.Limits(cpu_seconds=5, memory=MEMORY)) as plugin:
        proxy = plugin.dispense()
        os.kill(plugin.pid, 9)
        with pytest.raises(miniplug.PluginCrashed) as caught:
            proxy.pid()
        assert "died of SIGKILL" in str(caught.value) and "limit" not in str(caught.value)


@posix
def test_open_files(greedy):
    with miniplug.launch(greedy, limits=miniplug.Limits(open_files=40)) as plugin:
        proxy = plugin.dispense()
        with pytest.raises(OSError) as caught:
            proxy.open_many()
        assert caught.value.errno == 24
        assert proxy.echo("still there") == "still there"


@posix
def test_a_thread_that_cannot_start_fails_its_call_alone(greedy):
    """Each thread takes address space for its stack: with none left a call fails, and the session goes on."""
    with miniplug.launch(greedy, limits=miniplug.Limits(memory=MEMORY)) as plugin:
        proxy = plugin.dispense()
        with pytest.raises((RuntimeError, MemoryError)):
            proxy.threads()
        calls = [proxy.echo.submit(number) for number in range(20)]
        for number, call in enumerate(calls):
            try:
                assert call.result(20) == number
            except (RuntimeError, MemoryError) as error:
                assert isinstance(error, miniplug.RemoteError)
        assert proxy.echo("still there") == "still there"


@posix
def test_a_plugin_that_has_too_little_memory_to_start_says_so(greedy):
    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.launch(greedy, limits=miniplug.Limits(memory=2 << 20))
    assert caught.value.exit_code not in (0, None)  # what the loader or the shell says differs


@posix
def test_an_argument_list_that_is_not_python(tmp_path):
    """A shell is the plugin: it is no good one, but what it says shows its limits and its environment."""
    with pytest.raises(miniplug.HandshakeError) as caught:
        miniplug.launch(["sh", "-c", "ulimit -n; ulimit -v; pwd", "with spaces", "a 'quote'"], cwd=str(tmp_path),
                        limits=miniplug.Limits(open_files=50, memory=MEMORY))
    assert caught.value.output == ["50", str(MEMORY // 1024), str(tmp_path)]
    assert caught.value.command[:2] == ["sh", "-c"]


@posix
def test_arguments_and_environment_stay_as_they_are(write):
    code = """
        import os, sys
        for name in sorted(os.environ):
            if not name.startswith("MINIPLUG") and name not in ("PWD", "OLDPWD", "SHLVL", "_"):  # some shells set them
                print(name, "=", os.environ[name])
        print(sys.argv[1:])
    """
    path = write("shows.py", code)
    shown = []
    for limits in (None, miniplug.Limits(open_files=50)):
        with pytest.raises(miniplug.HandshakeError) as caught:
            miniplug.launch([sys.executable, path, "a b", "", "$HOME", "*"], limits=limits, inherit_env=False,
                            env={"dotted.name": "1", "PATH": os.environ["PATH"], "LC_ALL": "C", "X": "a\nb"})
        shown.append(caught.value.output)
    assert shown[0] == shown[1] and "dotted.name = 1" in shown[0] and "['a b', '', '$HOME', '*']" in shown[0]


@posix
@pytest.mark.parametrize("program, said", [("/no/such/program", "not found"), ("/etc/passwd", "ermission denied")])
def test_a_program_that_cannot_run(program, said):
    with pytest.raises(miniplug.LaunchError, match=said):
        miniplug.launch([program], limits=miniplug.Limits(open_files=50))


@posix
def test_a_stricter_limit_of_the_hosts_stays(greedy, write):
    """The host's own hard limit cannot be raised; that is no reason not to start."""
    host = write("host.py", f"""
        import resource, miniplug
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        resource.setrlimit(resource.RLIMIT_CPU, (50, 50))
        with miniplug.launch({greedy!r}, limits=miniplug.Limits(open_files=500, cpu_seconds=50)) as plugin:
            print(plugin.dispense().limits())
    """)
    env = dict(os.environ, PYTHONPATH=os.path.dirname(miniplug.__file__))
    out = subprocess.check_output([sys.executable, host], env=env, universal_newlines=True)
    assert "'NOFILE': [100, 100]" in out and "'CPU': [50, 50]" in out


@posix
def test_without_a_shell_there_is_no_start_without_limits(monkeypatch):
    monkeypatch.setattr(miniplug, "_SHELL", "/no/sh")
    with pytest.raises(miniplug.LaunchError, match="No such file or directory: '/no/sh'"):
        miniplug.launch(WORKSHOP, limits=miniplug.Limits(open_files=100))
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"


@posix
def test_they_hold_again_after_a_crash(greedy):
    with miniplug.launch(greedy, limits=miniplug.Limits(open_files=50)) as plugin:
        proxy = plugin.dispense()
        os.kill(plugin.pid, 9)
        until(lambda: not plugin.running)
        plugin.start()
        assert proxy.limits()["NOFILE"] == [50, 50]


@pytest.mark.skipif(struct.calcsize("P") != 8, reason="the offsets are those of 64-bit Windows")
def test_the_job_object_of_windows():
    """The bytes of JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""
    def fields(limits):
        data = limits._as_job()
        assert len(data) == 144
        job_time, flags = struct.unpack_from("<qI", data, 8)
        assert set(data[:8] + data[20:120] + data[128:]) == {0}
        return job_time, flags, struct.unpack_from("<Q", data, 120)[0]

    assert fields(miniplug.Limits()) == (0, 0x2000, 0)
    assert fields(miniplug.Limits(cpu_seconds=1.5)) == (15_000_000, 0x2004, 0)
    assert fields(miniplug.Limits(memory=1 << 30)) == (0, 0x2200, 1 << 30)
    assert fields(miniplug.Limits(memory=1 << 90, cpu_seconds=1e300, open_files=5)) == ((1 << 63) - 1, 0x2204, (1 << 64) - 1)


# -- checksums


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def refused(*args, **options):
    with pytest.raises(miniplug.ChecksumError) as caught:
        miniplug.launch(*args, **options)
    assert isinstance(caught.value, miniplug.LaunchError) and caught.value.path in str(caught.value)
    assert caught.value.expected in str(caught.value) and caught.value.actual in str(caught.value)
    return caught.value


@pytest.fixture
def marking(write, tmp_path):
    """A plugin that leaves a mark when its file is run: (its path, whether it has)."""
    path = write("marking.py", """
        import os
        open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "ran"), "w").close()
        class Marking:
            def hello(self): return "hello"
        if __name__ == "__main__":
            import miniplug
            miniplug.serve({"marking": Marking()})
    """)
    return path, lambda: (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [
    lambda path: path + ":Marking",
    lambda path: path,
    lambda path: [sys.executable, "-c", miniplug._BOOTSTRAP, miniplug.__file__, "miniplug", "run", path],
], ids=["spec", "script", "list"])
def test_nothing_runs_before_the_digest_is_right(marking, command):
    path, ran = marking
    if isinstance(command(path), list):
        wrong = refused(command(path), sha256={path: "0" * 64})
    else:
        wrong = refused(command(path), sha256="0" * 64)
    assert (wrong.path, wrong.expected, wrong.actual) == (path, "0" * 64, digest(path)) and not ran()
    with miniplug.launch(command(path), sha256={path: digest(path)}) as plugin:
        assert plugin.dispense().hello() == "hello" and ran()
    if not isinstance(command(path), list):
        with miniplug.launch(command(path), sha256=digest(path).upper()) as plugin:
            assert plugin.dispense().hello() == "hello"


def test_a_file_that_changes_is_refused_at_the_next_start(marking):
    path, _ = marking
    with miniplug.launch(path + ":Marking", sha256=digest(path)) as plugin:
        plugin.close()
        with open(path, "a") as file:
            file.write("# changed\n")
        with pytest.raises(miniplug.ChecksumError):
            plugin.start()
        assert not plugin.running


def test_paths_are_relative_to_cwd(marking, tmp_path):
    path, ran = marking
    (tmp_path / "data.txt").write_text("data")
    right = {"marking.py": digest(path), "data.txt": hashlib.sha256(b"data").hexdigest()}
    wrong = refused("marking.py:Marking", cwd=tmp_path, sha256={**right, "data.txt": "f" * 64})
    assert wrong.path == str(tmp_path / "data.txt") and not ran()
    absolute = {tmp_path / "data.txt": right["data.txt"], b"marking.py": right["marking.py"]}
    with miniplug.launch("marking.py:Marking", cwd=tmp_path, sha256=absolute) as plugin:
        assert plugin.dispense().hello() == "hello"
    with miniplug.launch("marking.py:Marking", cwd=tmp_path, sha256=right["marking.py"]) as plugin:
        assert plugin.dispense().hello() == "hello"


@posix
def test_a_program_by_name_is_not_one_on_the_path(write, tmp_path, monkeypatch):
    """The file that is checked is the one that runs."""
    for folder in ("there", "here"):
        os.chmod(write(f"{folder}/tool", f"#!{sys.executable}\nprint('from {folder}')\n"), 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'there'}{os.pathsep}{os.environ['PATH']}")
    here = digest(tmp_path / "here" / "tool")
    assert refused(["tool"], cwd=tmp_path / "here", sha256=digest(tmp_path / "there" / "tool")).actual == here
    with pytest.raises(miniplug.HandshakeError) as caught:
        miniplug.launch(["tool"], cwd=tmp_path / "here", sha256=here)
    assert caught.value.output == ["from here"]


@posix
def test_the_program_of_an_argument_list(write):
    path = write("program", "#!/bin/sh\necho ran\n")
    os.chmod(path, 0o755)
    refused([path], sha256="0" * 64)
    with pytest.raises(miniplug.HandshakeError) as caught:
        miniplug.launch([path], sha256=digest(path))
    assert caught.value.output == ["ran"]


def poison(path):
    """Put other bytecode where Python looks for that of a source file, which stays as it is."""
    source = os.stat(path)
    cache = importlib.util.cache_from_source(path)
    code = compile("value = 'not checked'\nclass Plugin:\n    def hello(self): return value", path, "exec")
    os.makedirs(os.path.dirname(cache), exist_ok=True)
    with open(cache, "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(source.st_mtime), source.st_size) + marshal.dumps(code))


@pytest.mark.parametrize("command", ["{}:Plugin", "{}", None], ids=["spec", "script", "list"])
def test_bytecode_in_a_cache_is_not_what_was_checked(write, command):
    helper = write("helper_xyz.py", "value = 'checked'\n")
    path = write("checked.py", """
        import helper_xyz
        class Plugin:
            def hello(self): return helper_xyz.value
        if __name__ == "__main__":
            import miniplug
            miniplug.serve({"plugin": Plugin()})
    """)
    poison(path)
    poison(helper)
    argv = command.format(path) if command else [sys.executable, path]
    env = {"PYTHONPATH": os.path.dirname(miniplug.__file__)}
    with miniplug.launch(argv, env=env) as plugin:  # it works
        assert plugin.dispense().hello() == "not checked"
    with miniplug.launch(argv, env=env, sha256={path: digest(path), helper: digest(helper)}) as plugin:
        assert plugin.dispense().hello() == "checked"
    os.unlink(importlib.util.cache_from_source(helper))
    with miniplug.launch(argv, env=env, sha256=digest(path)) as plugin:
        assert plugin.dispense().hello() == "checked"


def test_a_file_that_cannot_be_read(marking, tmp_path):
    path, ran = marking
    with pytest.raises(miniplug.LaunchError, match=r"missing\.txt") as caught:
        miniplug.launch(path + ":Marking", sha256={str(tmp_path / "missing.txt"): "0" * 64})
    assert not isinstance(caught.value, miniplug.ChecksumError) and not ran()
    with pytest.raises(miniplug.LaunchError, match="did not start: \\["):
        miniplug.launch(path + ":Marking", sha256={str(tmp_path): "0" * 64})


@pytest.mark.parametrize("sha256", ["", "0" * 63, "0" * 65, "g" * 64, "0x" + "0" * 62, {"a": None}, {"a": "0"}, {"a": b"0" * 64}])
def test_what_is_no_digest(sha256):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        miniplug.Plugin(WORKSHOP, sha256=sha256)


@pytest.mark.parametrize("sha256", [b"0" * 64, ["0" * 64], 7, True, False, 0])
def test_what_is_no_digest_of_any_kind(sha256):
    with pytest.raises(ValueError, match=r"64 hexadecimal digits, or \{path: digest\}"):
        miniplug.Plugin(WORKSHOP, sha256=sha256)


def test_a_module_has_no_file_to_check():
    with pytest.raises(ValueError, match=r"\{path: digest\}"):
        miniplug.Plugin("workshop:Workshop", sha256="0" * 64)


def test_a_large_file(marking, tmp_path):
    path, _ = marking
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(1 << 20) * 3 + b"end")
    with miniplug.launch(path + ":Marking", sha256={large: digest(large)}) as plugin:
        assert plugin.dispense().hello() == "hello"
    shutil.copy(path, str(large))
    refused(path + ":Marking", sha256={large: "ab" * 32})
