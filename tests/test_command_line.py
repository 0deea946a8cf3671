"""python -m miniplug, as a person meets it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, run_python

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="signals and modes are POSIX")
ENV = dict(os.environ, PYTHONPATH=os.path.dirname(HERE))


def run(*arguments):
    """As a person runs it, in a process of its own: (status, stdout, stderr)."""
    return run_python(miniplug.__file__, *arguments)


def run_here(*arguments):
    """The same in this process, which is quicker."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        miniplug._main(arguments)
    code = ended.value.code
    said = err.getvalue() + (f"{code}\n" if isinstance(code, str) else "")  # the interpreter prints that, and exits with 1
    out.flush()
    return 1 if isinstance(code, str) else code or 0, out.buffer.getvalue().decode(), said


def prints(*arguments):
    """What a run that goes well prints."""
    status, out, err = run_here(*arguments)
    assert (status, err) == (0, ""), err
    return out


def fails(*arguments, status=1):
    """The one line of a run that goes wrong."""
    code, out, err = run_here(*arguments)
    assert (code, out, err.count("\n")) == (status, "", 1), (out, err)
    return err.rstrip("\n")


@pytest.mark.parametrize("arguments, said", [
    ((), "VERB"),
    (("nothing", "x"), "'nothing'"),
    (("--no",), "VERB"),
    (("serve",), "SPEC"),
    (("call",), "PLUGIN, METHOD"),
    (("call", WORKSHOP), "METHOD"),
    (("call", WORKSHOP, "greet", "--no-such-option"), "--no-such-option"),
    (("inspect",), "PLUGIN"),
    (("doctor", "x"), "x"),
])
def test_bad_usage_is_status_2(arguments, said):
    line = fails(*arguments, status=2)
    assert line.startswith("python -m miniplug") and said in line


def test_help_and_version():
    assert prints("--version") == f"miniplug {miniplug.__version__}\n"
    assert all(verb in prints("--help") for verb in ("serve", "call", "inspect", "doctor"))
    assert all(word in prints("call", "--help") for word in ("PLUGIN", "METHOD", "ARG", "--verbose"))


def test_the_module_runs_by_its_name(tmp_path):
    out = subprocess.check_output([sys.executable, "-m", "miniplug", "--version"], cwd=str(tmp_path), env=ENV)
    assert out.decode().strip() == f"miniplug {miniplug.__version__}"


# -- serve


def test_serving_by_hand_says_that_this_is_a_plugin():
    status, out, err = run("serve", WORKSHOP)
    assert (status, out) == (1, "") and err.startswith("This program is a plugin") and err.count("\n") == 1
    assert "--persist" in err and "--listen ADDRESS" in err


@pytest.mark.parametrize("specs, said", [
    ([WORKSHOP, WORKSHOP], "the name 'workshop' is taken: write NAME="),
    (["system=" + WORKSHOP], "the name 'system' is taken: write NAME="),
    (["no-spec"], "'no-spec' is no spec: write module:Attr"),
])
def test_bad_specs_are_one_line(specs, said):
    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.launch([sys.executable, miniplug.__file__, "serve", *specs])
    assert len(caught.value.output) == 1 and said in caught.value.output[0] and caught.value.exit_code == 1


# -- call


def test_call_prints_the_result():
    assert run("call", WORKSHOP, "greet", "world") == (0, '"Hello, world!"\n', "")
    assert run("call", WORKSHOP, "greet") == (1, "", fails("call", WORKSHOP, "greet") + "\n")


@pytest.mark.parametrize("arguments, printed", [
    (["1"], "1"),
    (["-1"], "-1"),
    (["1.5"], "1.5"),
    (["true"], "true"),
    (["null"], "null"),
    (["[1, {\"a\": 2}]"], '[1, {"a": 2}]'),
    (["a string"], '"a string"'),
    (['"quoted"'], '"quoted"'),
    (["[not json"], '"[not json"'),
    (["ünï"], '"ünï"'),
    ([""], '""'),
    (["--", "-x", "-1e3"], '["-x", -1000.0]'),
    (["NaN"], "nan"),
    (["12345678901234567890"], "12345678901234567890"),
])
def test_arguments_are_json_or_else_strings(arguments, printed):
    assert prints("call", WORKSHOP, "echo", *arguments) == printed + "\n"


def test_what_is_no_json_is_printed_as_python_writes_it(write):
    plugin = write("values.py", """
        import datetime
        class Values:
            def get(self, index):
                return [(1, "a"), {1: 2}, b"bytes", datetime.date(2020, 1, 2), [(1,)]][index]
    """) + ":Values"
    printed = [prints("call", plugin, "get", str(index)).strip() for index in range(5)]
    assert printed == ["(1, 'a')", "{1: 2}", "b'bytes'", "datetime.date(2020, 1, 2)", "[(1,)]"]


def test_a_stream_is_printed_as_it_comes(write):
    """Each line is there before the next item is made: the plugin waits for a file that this test makes on reading one."""
    plugin = write("streams.py", """
        import os, time
        class Streams:
            def count(self, folder):
                for number in range(3):
                    deadline = time.monotonic() + 20
                    while not os.path.exists(os.path.join(folder, str(number))):
                        assert time.monotonic() < deadline
                        time.sleep(0.01)
                    yield {"number": number}
            async def slowly(self):
                yield "async"
    """)
    folder = os.path.dirname(plugin)
    process = subprocess.Popen([sys.executable, miniplug.__file__, "call", plugin + ":Streams", "count", folder],
                               stdout=subprocess.PIPE, env=ENV, universal_newlines=True)
    for number in range(3):
        open(os.path.join(folder, str(number)), "w").close()
        assert json.loads(process.stdout.readline()) == {"number": number}
    assert process.stdout.read() == "" and process.wait(20) == 0
    process.stdout.close()
    assert prints("call", plugin + ":Streams", "slowly") == '"async"\n'


def test_one_of_several_plugins(write):
    path = write("several.py", """
        import miniplug
        class One:
            def hello(self): return "one"
        class Two:
            def hello(self): return "two"
        miniplug.serve({"one": One, "two": Two})
    """)
    assert prints("call", path, "two.hello") == '"two"\n'
    assert {"one.hello", "two.hello"} <= set(json.loads(prints("call", path, "system.listMethods")))
    assert "one" in fails("call", path, "hello")
    assert "three" in fails("call", path, "three.hello")


def test_a_plugin_with_a_handshake_of_its_own(write, monkeypatch):
    """Its cookie is found in the environment, and whatever version it speaks will do."""
    path = write("cookie.py", """
        import miniplug
        class One:
            def hello(self): return "one"
        miniplug.serve({"one": One}, handshake=miniplug.Handshake(3, "COOKIE", "a=b"))
    """)
    assert "another magic cookie in 'COOKIE'" in fails("call", path, "hello")
    monkeypatch.setenv("COOKIE", "a=b")
    assert prints("call", path, "hello") == '"one"\n'


@posix
def test_another_interpreter(write, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nWRAPPED=yes exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert json.loads(prints("call", "--python", str(python), WORKSHOP, "env"))["WRAPPED"] == "yes"


@pytest.mark.parametrize("arguments, said", [
    (["/no/such/plugin.py:Attr", "x"], "there is no such file"),
    (["no_such_module_xyz:Attr", "x"], "there is no module 'no_such_module_xyz' in "),
    ([WORKSHOP + "2", "x"], "has no attribute 'Workshop2'"),
    ([WORKSHOP, "gret", "x"], "did you mean 'greet'"),
    ([WORKSHOP, "_private"], "_private"),
    ([WORKSHOP, "_target"], "has no method '_target': it is private"),
    ([WORKSHOP, "__class__"], "__class__"),
    ([WORKSHOP, "workshop.__repr__"], "__repr__"),
    ([WORKSHOP, ""], "only its methods"),
    ([WORKSHOP, "greet"], "miniplug: TypeError: "),
    ([WORKSHOP, "fail", "ValueError", "first\nsecond"], "miniplug: ValueError: first"),
    ([WORKSHOP, "fail"], "miniplug: ValueError"),
    ([WORKSHOP, "hard_exit", "3"], "exited with status 3 during hard_exit()"),
    pytest.param([WORKSHOP, "segfault"], "died of SIGSEGV during segfault()", marks=posix),
    ([WORKSHOP, "say_and_die", "last words"], "The last it wrote: err: last words"),
    ([WORKSHOP, "unserializable"], "miniplug: the result[1]['deep'] is of type object: "),
    ([WORKSHOP, "fail", "BrokenPipeError", "of the plugin's"], "miniplug: BrokenPipeError: of the plugin's"),
    ([WORKSHOP, "fail", "KeyboardInterrupt"], "miniplug: KeyboardInterrupt"),
])
def test_what_goes_wrong_is_one_line_and_status_1(arguments, said):
    assert said in fails("call", *arguments)


def test_what_the_plugin_writes_is_on_stderr_with_verbose():
    assert prints("call", WORKSHOP, "say", "hello") == "null\n"
    for option in ("--verbose", "-v"):
        status, out, err = run("call", WORKSHOP, "say", "hello", option)
        assert (status, out) == (0, "null\n") and err == "INFO:miniplug.workshop.stdout:hello\n"
    status, out, err = run("call", "-v", WORKSHOP, "log", "10", "a record")
    assert (status, out) == (0, "null\n") and err == "DEBUG:miniplug.workshop.shop:a record\n"


@posix
def test_ctrl_c_is_no_traceback():
    process = subprocess.Popen([sys.executable, miniplug.__file__, "call", "-v", WORKSHOP, "start_and_wait"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENV, universal_newlines=True)
    assert "started" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err


@posix
def test_nobody_reads_on(write):
    """As with ``| head``: no traceback, and the plugin's stream is closed."""
    plugin = write("endless.py", "import itertools\nclass Endless:\n    def count(self): return itertools.count()\n") + ":Endless"
    process = subprocess.Popen([sys.executable, miniplug.__file__, "call", plugin, "count"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENV, universal_newlines=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(20) == 1
    process.stderr.close()


@posix
@pytest.mark.parametrize("arguments", [("call", WORKSHOP, "greet", "you"), ("inspect", WORKSHOP), ("doctor",)])
def test_what_cannot_be_printed_is_one_line(arguments):
    """A full disk is one line, on stderr; a reader that is gone is none; and a stdout that is closed is nobody's fault."""
    argv = [sys.executable, miniplug.__file__, *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, env=ENV, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (1, b"miniplug: [Errno 28] No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, env=ENV, timeout=50, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *argv], stderr=subprocess.PIPE, env=ENV, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# -- inspect


def test_inspect(write):
    path = write("told.py", """
        import miniplug
        class Greeter:
            def greet(self, name: str, *, loud: bool = False) -> str:
                \"\"\"Say hello.

                Loudly, if asked to.
                \"\"\"
            def other(self): pass
        class Adder:
            def add(self, a, b=1): "Add two numbers."
        miniplug.serve({"greeter": Greeter, "adder": Adder})
    """)
    assert prints("inspect", path) == """\
adder
    add(a, b=1)
        Add two numbers.
greeter
    greet(name: str, *, loud: bool = False) -> str
        Say hello.

        Loudly, if asked to.
    other()
"""
    assert "no such file" in fails("inspect", path + "x.py")


# -- doctor


def test_doctor():
    lines = prints("doctor").splitlines()
    found = {line[4:20].strip(): (line[:4].strip(), line[20:]) for line in lines}
    assert list(found) == ["miniplug", "transport", "loopback TCP", "FIPS mode", "process tree", "a plugin"]
    assert lines[-1] == "ok  a plugin        runs"
    assert found["process tree"] == ("ok", f"a {'job object' if WINDOWS else 'group'} for each plugin")


def doctor(capsys):
    """What each check says: (whether it is well, more about it)."""
    with pytest.raises(SystemExit):
        miniplug._main(["doctor", "--json"])
    return {row["check"]: (row["ok"], row["detail"]) for row in json.loads(capsys.readouterr().out)["checks"]}


def test_doctor_in_json():
    told = json.loads(prints("doctor", "--json"))
    assert told["ok"] is True and told["checks"][-1]["check"] == "a plugin" and told["checks"][-1]["ok"] is True
    assert all(check.keys() == {"check", "ok", "detail"} for check in told["checks"])


@posix
def test_doctor_tells_of_a_temp_folder_that_will_not_do(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")
    (line,) = [line for line in prints("doctor").splitlines() if line[4:].startswith("transport")]
    assert line.startswith("ok  transport       /tmp/") and "; not in /proc (" in line


def test_doctor_where_no_plugin_runs(tmp_path):
    status, out, err = run("doctor", "--python", str(tmp_path / "no-python"))
    assert (status, err) == (1, "") and out.splitlines()[-1].startswith("no  a plugin        ") and "no-python" in out
    status, out, err = run("doctor", "--json", "--python", str(tmp_path / "no-python"))
    assert (status, err, json.loads(out)["ok"]) == (1, "", False)


def test_doctor_where_fips_mode_is_on(monkeypatch, capsys):
    import hashlib

    def refuses(*args, **options):
        raise ValueError("[digital envelope routines] unsupported")

    monkeypatch.setattr(hashlib, "md5", refuses)
    checks = doctor(capsys)
    assert checks["FIPS mode"][1].startswith("on") and checks["a plugin"][0] is True


def test_doctor_tries_loopback_tcp(monkeypatch, capsys):
    works, detail = doctor(capsys)["loopback TCP"]
    assert works is not WINDOWS and "127.0.0.1:" in detail  # where a pipe is always to be had
    bind = miniplug._Listener._bind

    def fails(listener, address):
        if address.startswith("127."):
            raise OSError(101, "Network is unreachable")
        return bind(listener, address)

    monkeypatch.setattr(miniplug._Listener, "_bind", fails)
    works, detail = doctor(capsys)["loopback TCP"]
    assert works is False and "unreachable" in detail


@pytest.mark.parametrize("spec", ["greeter.Greeter", "greeter.py;Greeter", "greeter.py:", "greeter.py", "Greeter", ":Greeter", ""])
def test_serve_tells_the_form_of_a_spec(spec):
    status, out, err = run("serve", spec, "--persist")
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert err == f"miniplug: {spec!r} is no spec: write module:Attr or path/to/file.py:Attr\n"


@pytest.mark.parametrize("spec, words", [("no/such/file.py:Attr", "there is no file "),
                                         ("no_such_module_x:A", "there is no module "),
                                         (WORKSHOP + ".Nothing", "has no attribute 'Nothing'")])
def test_serve_tells_what_is_not_there(spec, words):
    status, out, err = run("serve", spec, "--persist")
    assert (status, out) == (1, "") and err.count("\n") == 1 and words in err


def test_call_of_a_function_that_is_served(write):
    hello = write("hello.py", """
        def hello(name):
            return f"Hello, {name}!"
        """)
    assert run("call", hello + ":hello", "hello", "bob") == (0, '"Hello, bob!"\n', "")
    assert run("call", hello + ":hello", "submit", "bob") == (0, '"Hello, bob!"\n', "")
