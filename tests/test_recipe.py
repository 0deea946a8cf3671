"""What a plugin is made from: paths, the interpreter with its flags and variables, and what is said of options and
commands that will not do."""

import json
import logging
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, run_python

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="links and frozen folders of this kind are POSIX")
ROOT = os.path.dirname(os.path.abspath(miniplug.__file__))
TELLER = """
    import os, sys

    class Teller:
        def folder(self): return os.getcwd()
        def environ(self): return dict(os.environ)
        def flags(self): return [list(sys.flags), sys.warnoptions, sys._xoptions, __debug__]
        def executable(self): return sys.executable, sys.prefix, sys.path
        def die(self): os._exit(3)
"""


def environ(command, **options):
    return miniplug.Plugin(command, **options)._supervisor.recipe.environ()


# -- paths

@pytest.mark.parametrize("kind", ["spec", "script", "list", "module", "cwd", "cwd and list"])
def test_a_host_that_changes_its_folder_restarts_the_same_plugin(write, tmp_path, monkeypatch, kind):
    path = write("a/teller.py", TELLER + """
    if __name__ == "__main__":
        import miniplug
        miniplug.serve({"teller": Teller()})
    """)
    write("b/teller.py", "raise SystemExit('the wrong one')\n")
    commands = {"spec": ("teller.py:Teller", None), "script": ("teller.py", None), "module": ("teller:Teller", None),
                "list": ([sys.executable, "teller.py"], None), "cwd": ("teller.py:Teller", "../a"),
                "cwd and list": ([sys.executable, os.path.join(os.curdir, "teller.py")], os.path.join("..", "a"))}
    command, cwd = commands[kind]
    monkeypatch.chdir(os.path.join(str(tmp_path), "a" if cwd is None else "b"))
    plugin = miniplug.Plugin(command, cwd=cwd, max_restarts=3, env={"PYTHONPATH": ROOT}, stderr="discard")
    monkeypatch.chdir(os.path.join(str(tmp_path), "b") if cwd is None else str(tmp_path))
    with plugin:
        teller = plugin.dispense()
        folder = os.path.realpath(os.path.dirname(path))
        assert os.path.realpath(teller.folder()) == folder
        monkeypatch.chdir(os.path.join(str(tmp_path), "b"))
        plugin.restart()
        assert os.path.realpath(teller.folder()) == folder
        with pytest.raises(miniplug.PluginCrashed):
            teller.die()
        assert os.path.realpath(teller.folder()) == folder


@posix
def test_an_interpreter_by_a_relative_path(write, tmp_path, monkeypatch):
    path = write("teller.py", TELLER)
    os.symlink(sys.executable, str(tmp_path / "python-of-mine"))
    monkeypatch.chdir(str(tmp_path))
    plugin = miniplug.Plugin(path + ":Teller", python="./python-of-mine")
    monkeypatch.chdir("/")
    with plugin:
        assert os.path.basename(plugin.dispense().executable()[0]) == "python-of-mine"


def test_a_digest_by_a_relative_path(write, tmp_path, monkeypatch):
    import hashlib

    path = write("teller.py", TELLER)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    monkeypatch.chdir(str(tmp_path))
    plugin = miniplug.Plugin("teller.py:Teller", sha256={"teller.py": digest})
    monkeypatch.chdir(HERE)
    with plugin:
        assert plugin.dispense().flags()


def test_a_file_that_was_imported_by_a_relative_path(write, tmp_path):
    """So it is where sys.path has a relative entry: the library's own file is known absolutely all the same."""
    script = write("host.py", f"""
        import os, sys
        os.chdir({ROOT!r})
        sys.path.insert(0, os.curdir)
        import miniplug
        miniplug.__file__ = "miniplug.py"
        os.chdir({str(tmp_path)!r})
        with miniplug.launch({WORKSHOP!r}) as plugin:
            print(plugin.dispense().greet("you"))
    """)
    assert run_python(script)[:2] == (0, "Hello, you!\n")


# -- another interpreter

OWN = {"PYTHONHOME": "/no/home", "PYTHONEXECUTABLE": "/no/python", "PYTHONPATH": "/no/path", "__PYVENV_LAUNCHER__": "/no/launcher"}


@pytest.mark.parametrize("command", ["teller.py:Teller", "teller.py", "teller:Teller"])
def test_another_interpreter_does_not_get_what_belongs_to_the_hosts_own(monkeypatch, command):
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONUTF8", "1")
    other = "/opt/other/bin/python3"
    inherited = environ(command)
    assert OWN.items() <= {name: inherited.get(miniplug._variable(name)) for name in OWN}.items()
    assert environ(command, python=sys.executable) == inherited
    theirs = environ(command, python=other)
    assert not {miniplug._variable(name) for name in OWN} & set(theirs) and theirs["PYTHONUTF8"] == "1"
    assert environ(command, python=other, env={"PYTHONPATH": "x"})["PYTHONPATH"] == "x"
    as_it_is = environ([other, "teller.py"])
    assert as_it_is["PYTHONPATH"] == "/no/path" and as_it_is["PYTHONHOME"] == "/no/home"


@pytest.mark.parametrize("before", [None, "", "/opt/lib"])
def test_another_interpreter_gets_the_library_path_that_was_there_before_a_frozen_host(monkeypatch, before):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", "/tmp/_MEI123", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/tmp/_MEI123" + (":" + before if before else ""))
    monkeypatch.setenv("LIBPATH", "/opt/mine")
    if before:
        monkeypatch.setenv("LD_LIBRARY_PATH_ORIG", before)
    theirs = environ("teller.py", python="/usr/bin/python3")
    assert theirs.get("LD_LIBRARY_PATH", "") == (before or "")
    assert "LD_LIBRARY_PATH_ORIG" not in theirs and theirs["LIBPATH"] == "/opt/mine"
    assert "_MEI123" in environ(["/usr/bin/python3", "teller.py"])["LD_LIBRARY_PATH"]
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.delattr(sys, "_MEIPASS")
    assert "_MEI123" in environ("teller.py", python="/usr/bin/python3")["LD_LIBRARY_PATH"]


@posix
def test_a_virtual_environment_is_used_whatever_the_host_has_set(write, tmp_path, monkeypatch):
    import venv

    venv.create(str(tmp_path / "environment"), with_pip=False, symlinks=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    path = write("plugin/teller.py", TELLER + "    import colorsys\n    if hasattr(colorsys, 'evil'): raise SystemExit('evil')\n")
    write("evil/colorsys.py", "evil = True\n")
    write("evil/sitecustomize.py", "raise SystemExit('evil')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "evil"))
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setenv("PYTHONEXECUTABLE", "/nonexistent")
    with miniplug.launch(path + ":Teller", python=python) as plugin:
        executable, prefix, where = plugin.dispense().executable()
        assert executable == python and prefix == str(tmp_path / "environment") and str(tmp_path / "evil") not in where


@posix
def test_the_line_that_names_the_cause_is_among_those_that_are_quoted(write, monkeypatch):
    path = write("teller.py", TELLER)
    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.launch(path + ":Teller", env={"PYTHONHOME": "/nonexistent"}, stderr="discard")
    own = subprocess.run([sys.executable, "-c", ""], env={"PYTHONHOME": "/nonexistent"}, capture_output=True, text=True,
                         check=False)
    assert "encodings" in str(caught.value) and ("PYTHONHOME = " in str(caught.value)) == ("PYTHONHOME = " in own.stderr)


def test_a_long_report_is_quoted_with_the_line_that_names_it(write):
    path = write("plugin.py", """
        import sys
        sys.stderr.write("Fatal Python error: Segmentation fault\\n\\n")
        for number in range(25):
            sys.stderr.write(f'  File "x.py", line {number} in f\\n')
        sys.exit(3)
    """)
    with pytest.raises(miniplug.LaunchError, match="Fatal Python error: Segmentation fault") as caught:
        miniplug.launch(path, stderr="discard")
    assert "line 24 in f" in str(caught.value) and len(str(caught.value).splitlines()) <= 31


# -- the host's own interpreter

def test_its_flags_reach_a_spec_and_a_script(write, tmp_path):
    path = write("teller.py", TELLER + """
    if __name__ == "__main__":
        import miniplug
        miniplug.serve({"teller": Teller()})
    """)
    write("evil/sitecustomize.py", f"open({str(tmp_path / 'evil' / 'was here')!r}, 'w')\n")
    host = write("host.py", f"""
        import json, sys
        sys.path.insert(0, {ROOT!r})
        import miniplug
        for command in ({path!r}, {path + ':Teller'!r}):
            with miniplug.launch(command) as plugin:
                teller = plugin.dispense()
                flags, warnings, options, debug = teller.flags()
                mine = [[*sys.flags], sys.warnoptions, sys._xoptions, __debug__]
                assert [flags, warnings, options, debug] == mine, (flags, mine)
        print("well")
    """)
    flags = ["-I", "-S", "-O", "-X", "utf8", "-W", "error::UserWarning"]
    done = subprocess.run([sys.executable, *flags, host], env=dict(os.environ, PYTHONPATH=str(tmp_path / "evil")),
                          capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
    assert not (tmp_path / "evil" / "was here").exists()


def test_another_interpreter_has_flags_of_its_own(monkeypatch):
    monkeypatch.setattr(subprocess, "_args_from_interpreter_flags", lambda: ["-I"])
    own, other = (miniplug.Plugin(WORKSHOP, python=python)._supervisor.recipe for python in (None, sys.executable + "-other"))
    assert own.argv()[1] == "-I" and other.argv()[1] == "-c"


def test_a_frozen_host_without_the_file_says_what_to_pack(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(miniplug, "_FILE", os.path.join(str(tmp_path), "app", "_vendor", "miniplug.pyc"))
    with pytest.raises(miniplug.LaunchError, match=r"miniplug\.py is not there: pack it as a data file"):
        miniplug.launch(WORKSHOP, python=sys.executable)
    os.makedirs(str(tmp_path / "app" / "_vendor"))
    with open(os.path.join(ROOT, "miniplug.py"), "rb") as file:
        (tmp_path / "app" / "_vendor" / "miniplug.py").write_bytes(file.read())
    with miniplug.launch(WORKSHOP, python=sys.executable) as plugin:
        assert plugin.dispense().greet("you") == "Hello, you!"


# -- MINIPLUG_ATTACH

@pytest.mark.parametrize("text, words", [
    ("{}}", "Extra data"), ("[]", "'list' object has no attribute 'items'")])
def test_a_variable_that_is_no_such_thing(monkeypatch, text, words):
    monkeypatch.setenv("MINIPLUG_ATTACH", text)
    with pytest.raises(miniplug.LaunchError, match=f"MINIPLUG_ATTACH is not {{NAME: config}} as JSON: {words}"):
        miniplug.launch(WORKSHOP)


def test_it_is_told_whether_it_was_attached_to(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "miniplug")
    with miniplug.launch(WORKSHOP, persist=True) as owner:
        assert not caplog.records
        monkeypatch.setenv("MINIPLUG_ATTACH", json.dumps({"shop": owner.reattach_config()}))
        with miniplug.launch(WORKSHOP, name="shop") as plugin:
            assert plugin.pid == owner.pid
        with miniplug.launch(WORKSHOP, name="shpo") as plugin:
            assert plugin.pid != owner.pid
    said = [(each.name, each.getMessage()) for each in caplog.records if "MINIPLUG_ATTACH" in each.getMessage()]
    names = "MINIPLUG_ATTACH names ['shop']:"
    assert said == [("miniplug.shop", f"{names} 'shop' is attached to, process {owner_pid(said)}"),
                    ("miniplug.shpo", f"{names} 'shpo' is launched")]
    assert not any(owner.reattach_config()["authkey"] in text for _, text in said) if owner.running else True


def owner_pid(said):
    return re.findall(r"process (\d+)", said[0][1])[0]


# -- what is said of what will not do

@pytest.mark.parametrize("options, words", [
    ({"env": ["A=1"]}, r"env=\['A=1'\]: it is a dict"), ({"env": "A=1"}, "env='A=1': it is a dict"),
    ({"python": [sys.executable, "-I"]}, "python=.* it is a path"),
    ({"protocol_versions": 1}, "protocol_versions=1: it is a list of whole numbers"),
    ({"protocol_versions": 0}, "protocol_versions=0: it is a list of whole numbers"),
    ({"stdout": subprocess.DEVNULL}, "stdout=-3: it is 'log', 'inherit', 'discard', a function, or a text file"),
    ({"stderr": subprocess.PIPE}, "stderr=-1: it is 'log'"), ({"stdin": subprocess.DEVNULL}, "stdin=-3: it is 'discard'"),
    ({"stdin": None}, "stdin=None"), ({"stdout": None}, "stdout=None"),
    ({"persist": "yes"}, "persist='yes': it is a bool"), ({"managed": None}, "managed=None"),
    ({"limits": {"memory": 1}}, "limits=.*it is a Limits"), ({"on_exit": "x"}, "on_exit='x': it is a function"),
    ({"name": 3}, "name=3: it is a str"), ({"cwd": 3}, "cwd=3: it is a path")], ids=lambda value: str(value)[:40])
def test_an_option_that_will_not_do_is_named(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        miniplug.Plugin(WORKSHOP, **options)


def test_a_binary_file_takes_no_lines(tmp_path):
    with open(str(tmp_path / "x"), "wb") as file, pytest.raises(ValueError, match="a text file"):
        miniplug.Plugin(WORKSHOP, stdout=file)


@pytest.mark.parametrize("command, words", [
    *((command, r"a spec is 'path/to/file\.py:Attr' or 'module:Attr'") for command in
      ("greeter.Greeter", "greeter.py;Greeter", "greeter.py:", "greeter.py:Greeter()", "greeter.py::Greeter",
       "greeter.py:Greeter.")),
    ("no_such.py:Greeter", "there is no such file"), ("a/greeter", "there is no such file")])
def test_a_command_that_is_nearly_a_spec(write, tmp_path, command, words):
    write("greeter.py", "class Greeter: pass\n")
    with pytest.raises(miniplug.LaunchError, match=words):
        miniplug.launch(command, cwd=tmp_path)


def test_a_script_without_serve_is_told_so(write):
    path = write("greeter.py", "class Greeter: pass\n")
    with pytest.raises(miniplug.HandshakeError, match=r"it does not call serve\(\)"):
        miniplug.launch(path)


def test_a_module_that_is_not_there(tmp_path):
    with pytest.raises(miniplug.LaunchError, match=r"no module 'no_such_module' .*cwd, or PYTHONPATH"):
        miniplug.launch("no_such_module:Greeter", cwd=tmp_path, stderr="discard")


@posix
def test_what_is_no_python(write):
    with pytest.raises(miniplug.HandshakeError, match="it exited without connecting"):
        miniplug.launch(WORKSHOP, python="/bin/true")


@posix
def test_a_program_of_the_path_is_run_as_a_list_only(write, tmp_path, monkeypatch):
    program = write("more", "#!/bin/sh\nexit 0\n")
    os.chmod(program, 0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    with pytest.raises(miniplug.LaunchError, match=r"there is no such file .* a program of the PATH is a list"):
        miniplug.launch("more")
    with pytest.raises(miniplug.HandshakeError, match="without connecting"):
        miniplug.launch(["more"])


BEGINNER = """
    class Needs:
        def __init__(self, path): self.path = path

    class Shop:
        price = 5
        def ask(self): return input()
        def buy(self, what, pause=1): raise TypeError("the argument 'timeout' is somebody else's")
"""


def test_a_beginners_mistakes_are_told_with_what_to_do(write):
    path = write("shop.py", BEGINNER)

    with miniplug.launch(path + ":Shop") as plugin:
        shop = plugin.dispense()
        for what, kind, words in (
            (lambda: shop.price, AttributeError, "has no method 'price'"),
        ):
            with pytest.raises(kind, match=words):
                what()


def test_a_class_that_cannot_be_made_without_arguments(write):
    path = write("shop.py", BEGINNER)
    with miniplug.launch(path + ":Needs") as plugin:
        for what in (plugin.dispense, plugin.describe):
            with pytest.raises(TypeError, match="'path'"):
                what()


@pytest.mark.parametrize("package, module", [("gevent", "gevent._threading"), ("eventlet", "eventlet.green.socket")])
def test_under_monkey_patches_it_says_so_at_once(monkeypatch, package, module):
    function = types.FunctionType((lambda: None).__code__, {"__name__": module})
    monkeypatch.setattr(function, "__module__", module)
    monkeypatch.setattr("time.sleep", function)
    for begin in (lambda: miniplug.launch(WORKSHOP), lambda: miniplug.Plugin(WORKSHOP), lambda: miniplug.local({"x": object()})):
        with pytest.raises(RuntimeError, match=f"monkey patches of {package}"):
            begin()
