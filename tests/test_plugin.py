"""Launching, calling, ending and crashing, each with a real process."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from conftest import TEMPORARY, WINDOWS, WORKSHOP, alive, descriptors, freeze, run_python, swallow, until

import miniplug

windows = pytest.mark.skipif(not WINDOWS, reason="such statuses are those of Windows")
posix = pytest.mark.skipif(WINDOWS, reason="signals and process groups are POSIX")
ROOT = os.path.dirname(os.path.abspath(miniplug.__file__))


# -- three ways to write a plugin


def test_a_spec_with_a_path(write):
    path = write("greeter.py", "class GreeterHello:\n    def greet(self, name): return f'Hello, {name}!'\n")
    with miniplug.launch(path + ":GreeterHello") as plugin:
        assert plugin.dispense().greet("world") == "Hello, world!"
        assert plugin.dispense("greeterhello").greet("you") == "Hello, you!"
        assert plugin.name == "greeterhello"


def test_a_spec_with_a_name_of_its_own(write):
    path = write("greeter.py", "class GreeterHello:\n    def greet(self, name): return f'Hello, {name}!'\n")
    with miniplug.launch(f"polite={path}:GreeterHello") as plugin:
        assert plugin.dispense("polite").greet("world") == "Hello, world!"


def test_a_spec_with_a_module(write, tmp_path):
    write("pack/__init__.py", "")
    write("pack/greeter.py", "class Box:\n    class Inner:\n        def greet(self): return __name__\n")
    with miniplug.launch("pack.greeter:Box.Inner", cwd=tmp_path) as plugin:
        assert plugin.dispense("inner").greet() == "pack.greeter"


def test_a_script_that_serves(write):
    path = write("plugin.py", """
        import sys
        import miniplug

        class Greeter:
            def greet(self, name):
                return [name, __name__, sys.argv, __file__]

        if __name__ == "__main__":
            miniplug.serve({"greeter": Greeter()}, info={"version": 7})
    """)
    with miniplug.launch(path) as plugin:
        assert plugin.dispense("greeter").greet("x") == ["x", "__main__", [path], path]
        assert plugin.info == {"version": 7}
    with miniplug.launch([sys.executable, path], env={"PYTHONPATH": ROOT}) as plugin:
        assert plugin.dispense().greet("x") == ["x", "__main__", [path], path]


def test_a_script_is_compiled_as_its_own(write):
    """Not with what this library asks of the compiler for itself: annotations are what they would be."""
    path = write("script.py", """
        import miniplug
        class P:
            def kind(self, x: int = 0) -> str: return type(P.kind.__annotations__["x"]).__name__
        miniplug.serve({"p": P()})
    """)
    with miniplug.launch(path) as plugin:
        assert plugin.dispense().kind() == "type"


def test_the_command_line_serves_a_spec(write):
    path = write("greeter.py", "class GreeterHello:\n    def greet(self, name): return f'Hello, {name}!'\n")
    command = [sys.executable, "-m", "miniplug", "serve", path + ":GreeterHello", f"again={path}:GreeterHello"]
    with miniplug.launch(command, env={"PYTHONPATH": ROOT}) as plugin:
        assert plugin.dispense("greeterhello").greet("world") == "Hello, world!"
        assert plugin.dispense("again").greet("world") == "Hello, world!"


def test_a_served_module_gets_the_miniplug_that_serves_it(write):
    path = write("plugin.py", """
        import miniplug, sys

        class Which:
            def which(self):
                return [miniplug.__name__, miniplug.__file__, miniplug is sys.modules["miniplug"],
                        miniplug.PluginError.__module__, len([m for m in sys.modules.values()
                                                              if getattr(m, "__file__", None) == miniplug.__file__])]

            def asks(self):
                return miniplug.cancelled()
    """)
    for command in (path + ":Which", [sys.executable, miniplug.__file__, "serve", path + ":Which"]):
        with miniplug.launch(command) as plugin:
            which = plugin.dispense()
            name, file, same, module, _ = which.which()
            assert (name, same, module) == ("miniplug", True, "miniplug")
            assert os.path.samefile(file, miniplug.__file__)
            assert which.asks() is False


def test_vendored_inside_a_package(write, tmp_path):
    """The host has it as app._vendor.miniplug; so has the plugin, and it is the same there under both names."""
    write("app/__init__.py", "")
    write("app/_vendor/__init__.py", "")
    with open(miniplug.__file__, encoding="utf-8") as source:
        (tmp_path / "app/_vendor/miniplug.py").write_text(source.read(), encoding="utf-8")
    write("plugins/both.py", """
        import miniplug
        import app._vendor.miniplug as direct
        from app._vendor import miniplug as vendored

        class Both:
            def same(self):
                return miniplug is vendored is direct
    """)
    host = write("host.py", """
        from app._vendor import miniplug

        with miniplug.launch("plugins/both.py:Both", env={"PYTHONPATH": "."}) as plugin:
            print(plugin.dispense().same(), miniplug.PluginError.__module__)
    """)
    status, out, err = run_python(host, cwd=str(tmp_path))
    assert (status, out) == (0, "True app._vendor.miniplug\n"), err


def test_another_python_where_nothing_is_installed(other_pythons, write):
    path = write("plugin.py", "import sys\nclass Which:\n    def version(self): return list(sys.version_info[:2])\n")
    for version, python in other_pythons:
        with miniplug.launch(path + ":Which", python=python) as plugin:
            assert plugin.dispense().version() == list(version)


@pytest.fixture
def other_pythons():
    """Pythons of other versions on this machine."""
    found = {}
    if WINDOWS:
        pytest.skip("Wine has one Python, and would find those of the system outside")
    folders = [os.path.dirname(sys.executable), *os.environ.get("PATH", "").split(os.pathsep)]
    versions = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    if os.path.isdir(os.path.join(versions, "versions")):
        folders += [os.path.join(versions, "versions", each, "bin") for each in os.listdir(os.path.join(versions, "versions"))]
    for folder in folders:
        for minor in range(8, 14):
            path = os.path.join(folder, f"python3.{minor}")
            if (3, minor) != sys.version_info[:2] and os.access(path, os.X_OK) and (3, minor) not in found:
                works = subprocess.run([path, "-c", "import json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       check=False).returncode == 0
                if works:
                    found[3, minor] = path
    if not found:
        pytest.skip("this machine has one Python only")
    return sorted(found.items())


def test_sys_path_begins_with_the_files_folder(write, tmp_path):
    write("helper.py", "VALUE = 42\n")
    path = write("plugin.py", """
        import sys
        import helper

        class P:
            def get(self):
                return [helper.VALUE, sys.path[0]]
    """)
    with miniplug.launch(path + ":P") as plugin:
        assert plugin.dispense().get() == [42, str(tmp_path)]


def test_a_plugin_may_be_called_like_a_module(write):
    path = write("threading.py", "class P:\n    def get(self): return __name__\n")
    with miniplug.launch(path + ":P") as plugin:
        assert plugin.dispense().get() == "_plugin_threading"


# -- dispensing


def test_factories_make_an_instance_each_and_objects_are_shared(write):
    path = write("plugin.py", """
        import miniplug

        class Counter:
            def __init__(self): self.count = 0
            def up(self):
                self.count += 1
                return self.count

        if __name__ == "__main__":
            miniplug.serve({"shared": Counter(), "own": Counter, "made": lambda: Counter()})
    """)
    with miniplug.launch(path) as plugin:
        assert [plugin.dispense("shared").up() for _ in range(3)] == [1, 2, 3]
        assert [plugin.dispense("own").up() for _ in range(3)] == [1, 1, 1]
        assert [plugin.dispense("made").up() for _ in range(3)] == [1, 1, 1]
        with pytest.raises(miniplug.PluginNotFound, match="name=None: what is served is made, own, shared") as caught:
            plugin.dispense()
        assert caught.value.names == ["made", "own", "shared"]
        with pytest.raises(miniplug.PluginNotFound, match="name='no': what is served is made, own, shared"):
            plugin.dispense("no")


def test_system_tells_about_the_plugins(workshop, write):
    with miniplug.launch(WORKSHOP) as plugin:
        system = plugin.dispense("system")
        assert "workshop.greet" in system.listMethods() and "system.listMethods" in system.listMethods()
        assert system.methodHelp("workshop.greet") == "Say hello."
        assert system.methodSignature("workshop.greet") == "(name)"
        with pytest.raises(miniplug.MethodNotFound):
            system.methodHelp("workshop.nothing")


def test_describing_makes_one_instance_and_tells_what_is_served(write):
    path = write("plugin.py", """
        import miniplug
        made = []
        class Inner:
            def count(self): return len(made)
        class Managed:
            def __init__(self): made.append(self)
            def __enter__(self): return Inner()
            def __exit__(self, *error): pass
        miniplug.serve({"managed": Managed})
    """)
    with miniplug.launch(path) as plugin:
        system = plugin.dispense("system")
        for _ in range(3):
            assert "managed.count" in system.listMethods()
            assert system.methodSignature("managed.count") == "()"
        assert plugin.dispense().count() == 2


def test_names(workshop):
    assert "greet" in dir(workshop)
    assert not hasattr(workshop, "nothing")
    with pytest.raises(miniplug.MethodNotFound, match="did you mean 'greet'") as caught:
        workshop.great("x")
    assert isinstance(caught.value, AttributeError) and caught.value.matches[0] == "greet"
    with pytest.raises(miniplug.MethodNotFound, match="private"):
        workshop._secret()
    caller, number = workshop._target.here()
    for name in ("_private", "__class__", "__init__", "go", "go.set", "", "nothing"):  # past the proxy's own check
        with pytest.raises((miniplug.MethodNotFound, miniplug.RemoteError)):
            caller.call(number, name, (), {}, 5)
    assert workshop.greet("still") == "Hello, still!"


def test_an_object_with_its_own_dispatch_answers_every_name(write):
    path = write("plugin.py", """
        class P:
            def _dispatch(self, method, args, kwargs):
                return [method, list(args), kwargs]
    """)
    with miniplug.launch(path + ":P") as plugin:
        assert plugin.dispense().any_name(1, b=2) == ["any_name", [1], {"b": 2}]
        with pytest.raises(miniplug.MethodNotFound):
            plugin.dispense()._private()


def test_interfaces(workshop, write):
    import abc

    class Greeter(abc.ABC):
        @abc.abstractmethod
        def greet(self, name): ...

    class Painter(Greeter):
        def paint(self): ...

        def frame(self): ...

    with miniplug.launch(WORKSHOP) as plugin:
        greeter = plugin.dispense("workshop", Greeter)
        assert isinstance(greeter, Greeter) and greeter.greet("you") == "Hello, you!"
        with pytest.raises(miniplug.InterfaceMismatch, match=r"'frame'.*'paint'") as caught:
            plugin.dispense("workshop", Painter)
        assert len(caught.value.differences) == 2 and isinstance(caught.value, TypeError)


def test_context_managers_are_entered_and_exited(write, tmp_path):
    path = write("plugin.py", f"""
        import miniplug

        class Inner:
            def hello(self): return "hello"

        class Managed:
            def __init__(self, name): self.name = name
            def note(self, what):
                with open({str(tmp_path / 'notes')!r}, "a") as file: file.write(f"{{self.name}} {{what}}\\n")
            def __enter__(self):
                self.note("enter")
                return Inner()
            def __exit__(self, *error): self.note("exit")

        if __name__ == "__main__":
            miniplug.serve({{"shared": Managed("shared"), "own": lambda: Managed("own")}})
            Managed("after").note("serve")
    """)
    with miniplug.launch(path) as plugin:
        assert plugin.dispense("shared").hello() == plugin.dispense("shared").hello() == "hello"
        assert plugin.dispense("own").hello() == "hello"
    assert (tmp_path / "notes").read_text().split("\n")[:2] == ["shared enter", "own enter"]
    assert sorted((tmp_path / "notes").read_text().splitlines()[2:4]) == ["own exit", "shared exit"]
    assert (tmp_path / "notes").read_text().endswith("after serve\n")  # code after serve() runs on a graceful end


# -- starting goes wrong, and says why


def fails(command, kind=miniplug.LaunchError, **options):
    with pytest.raises(kind) as caught:
        miniplug.launch(command, **options)
    assert isinstance(caught.value, (miniplug.LaunchError, OSError))
    return caught.value


def test_a_command_line_is_told_to_be_a_list():
    assert "a program of the PATH is a list" in str(fails("python x.py"))


def test_no_such_program(tmp_path):
    assert f"did not start: {tmp_path / 'nothing'}: [" in str(fails([str(tmp_path / "nothing")]))
    assert "there is no such file" in str(fails(str(tmp_path / "nothing")))
    assert "there is no such file" in str(fails(str(tmp_path / "nothing.py:Attr")))
    assert f"there is no such file as {tmp_path}" in str(fails(str(tmp_path)))
    assert "the command is empty" in str(fails([]))
    assert ("irectory" if WINDOWS else str(tmp_path / "nothing")) in str(fails(WORKSHOP, cwd=str(tmp_path / "nothing")))
    assert f"{tmp_path / 'python9'}: [" in str(fails(WORKSHOP, python=str(tmp_path / "python9")))


def test_not_executable(write):
    path = write("data.txt", "no program")
    if WINDOWS:  # where every file is
        assert "did not start" in str(fails(path))
        return
    assert "Permission denied" in str(fails(path))
    os.chmod(path, 0o755)
    assert "Exec format error" in str(fails(path))


def test_it_exits_early(write):
    path = write("plugin.py", "import sys\nprint('to stdout')\nprint('reason', file=sys.stderr)\nsys.exit(7)\n")
    error = fails(path)
    assert error.exit_code == 7 and error.output == ["reason"] and error.command[-1] == path
    assert "exited with status 7" in str(error) and "reason" in str(error)


def test_it_dies_early(write):
    """Of a signal, or on Windows with a status that stands for one."""
    code, words = (0xC000001D, "status 0xc000001d") if WINDOWS else (-9, "SIGKILL")
    end = f"os._exit({code - (1 << 32)})" if WINDOWS else "os.kill(os.getpid(), 9)"
    error = fails(write("plugin.py", f"import os\nprint('only stdout', flush=True)\n{end}\n"))
    assert error.exit_code == code and words in str(error) and error.output == ["only stdout"]


def test_an_import_error(write):
    error = fails(write("plugin.py", "import no_such_module_anywhere\nclass P: pass\n") + ":P")
    assert error.exit_code == 1
    assert error.output[-1] == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert "no_such_module_anywhere" in str(error)
    assert "plugin.py" in error.output[1] and "miniplug.py" not in str(error.output)  # its own frames, and no others
    assert "importlib" not in str(error.output)


def test_a_missing_module_and_a_missing_attribute(write):
    (line,) = fails("no_such_module:Attr").output
    assert line.startswith(f"miniplug: there is no module 'no_such_module' in {os.getcwd()!r} or for ")
    error = fails(write("plugin.py", "class Greeter: pass\n") + ":Greater")
    assert "has no attribute 'Greater'" in str(error)


def test_another_cookie(write):
    path = write("plugin.py", """
        import miniplug
        miniplug.serve({"x": object()}, handshake=miniplug.Handshake(1, "MY_COOKIE", "secret"))
    """)
    error = fails(path, miniplug.HandshakeError)
    assert "expects another magic cookie in 'MY_COOKIE': give launch() its handshake" in str(error)
    assert "secret" not in str(error)
    with miniplug.launch(path, handshake=miniplug.Handshake(1, "MY_COOKIE", "secret")) as plugin:
        assert plugin.protocol_version == 1


def test_versions(write):
    path = write("plugin.py", """
        import miniplug

        class V:
            def __init__(self, number): self.number = number
            def version(self): return self.number

        miniplug.serve({1: {"v": V(1)}, 2: {"v": V(2)}, 4: {"v": V(4)}})
    """)
    for mine, agreed in (([1], 1), ([1, 2], 2), ([2, 3], 2), ([1, 2, 3, 4, 5], 4)):
        with miniplug.launch(path, protocol_versions=mine) as plugin:
            assert plugin.protocol_version == agreed == plugin.dispense().version()
    error = fails(path, miniplug.HandshakeError, protocol_versions=[3, 5])
    assert "the host has [3, 5], the plugin has [1, 2, 4]" in str(error)
    assert error.host["protocol_versions"] == [3, 5] and error.plugin["protocol_versions"] == [1, 2, 4]
    assert "the host has [0], the plugin has" in str(fails(path, miniplug.HandshakeError, protocol_versions=[0]))


def test_a_spec_is_served_under_whatever_the_host_asks_for():
    handshake = miniplug.Handshake(9, "SOME_COOKIE", "value")
    with miniplug.launch(WORKSHOP, handshake=handshake) as plugin:
        assert plugin.protocol_version == 9
        assert "SOME_COOKIE" not in plugin.dispense().env()


def test_it_never_connects(write):
    path = write("plugin.py", "import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    start = time.monotonic()
    error = fails(path, start_timeout=0.5)
    assert time.monotonic() - start < 5
    assert "did not connect within 0.5 s" in str(error)


def test_no_plugin_at_all(write):
    error = fails([sys.executable, "-c", "print('hello')"], miniplug.HandshakeError)
    assert "without connecting: it does not call serve()" in str(error) and error.output == ["hello"] and error.exit_code == 0


def test_started_by_hand(write):
    path = write("plugin.py", "import miniplug\nmini = miniplug.serve({'x': object()})\n")
    status, out, err = run_python(path)
    assert status == 1 and out == ""
    assert err.startswith("This program is a plugin") and err.count("\n") == 1


def test_a_process_serves_once(write):
    path = write("plugin.py", """
        import miniplug
        miniplug.serve({"x": object()})
        try:
            miniplug.serve({"x": object()})
        except RuntimeError as error:
            print(error)
    """)
    lines = []
    miniplug.launch(path, stdout=lines.append).close()
    assert lines == ["this process has served its host already: serve() works once"]


def test_plugins_that_cannot_be_served():
    with pytest.raises(TypeError):
        miniplug.serve({})
    with pytest.raises(TypeError):
        miniplug.serve({1: {}})
    with pytest.raises(TypeError):
        miniplug.serve({1: {"x": object()}, "y": object()})
    with pytest.raises(ValueError, match="reserved"):
        miniplug.serve({"system": object()})
    for option, value in (("max_workers", 0), ("max_message", 4095), ("max_message", 1e6)):
        with pytest.raises(ValueError, match=f"{option}={value}: it is a whole number, at least"):
            miniplug.serve({"x": object()}, **{option: value})
    with pytest.raises(ValueError, match="protocol_version='1'"):
        miniplug.serve({"x": object()}, handshake=miniplug.Handshake("1"))


def test_bad_options():
    with pytest.raises(ValueError, match="stdout='lug'"):
        miniplug.Plugin(WORKSHOP, stdout="lug")
    with pytest.raises(ValueError, match="stdin='log'"):
        miniplug.Plugin(WORKSHOP, stdin="log")
    for option in ("start_timeout", "call_timeout"):
        for value in ("3", float("nan"), -1):
            with pytest.raises(ValueError, match=f"{option}={value!r}"):
                miniplug.Plugin(WORKSHOP, **{option: value})
    for option, value in (("max_message", 0), ("max_message", "1"), ("protocol_versions", "12"), ("protocol_versions", [1, -1]),
                          ("handshake", miniplug.Handshake(1.0))):
        with pytest.raises(ValueError, match=r"whole numbers?, (each )?at least"):
            miniplug.Plugin(WORKSHOP, **{option: value})
    with pytest.raises(TypeError, match="handshake=3: it is a Handshake"):
        miniplug.Plugin("x", handshake=3)
    with pytest.raises(TypeError, match=r"env=\{'A': 1\}: it is a dict of str to str"):
        miniplug.Plugin("x", env={"A": 1})
    for command in (None, dict, ["python", 3]):
        with pytest.raises(TypeError, match="it is a path, a spec, or a list of arguments"):
            miniplug.Plugin(command)
    with pytest.raises(TypeError, match=r"it is a logging\.Logger"):
        miniplug.Plugin(WORKSHOP, logger=logging.LoggerAdapter(logging.getLogger("x"), {}))
    with pytest.raises(TypeError):
        miniplug.launch(WORKSHOP, no_such_option=1)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_application_without_an_interpreter(monkeypatch, frozen):
    if frozen:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", "/opt/some/editor")
    assert "pass python=" in str(fails(WORKSHOP))


@posix
def test_too_old_a_python(write):
    """A program that claims to be Python 3.6 runs the first lines of what a plugin is started with, and no more."""
    fake = write("python3.6", f"""\
        #!{sys.executable}
        import sys
        code = sys.argv[2].replace("import sys", "import sys; sys.version_info = (3, 6)", 1)
        sys.argv[1:3] = []
        exec(code)
    """)
    os.chmod(fake, 0o755)
    assert "miniplug needs Python 3.8 or newer" in str(fails(WORKSHOP, python=fake))


# -- what a start costs

LOADED = """
    import gc
    import multiprocessing.connection
    import sys
    import weakref

    class Knot:
        def __init__(self):
            self.itself = self

        def __del__(self):
            print("untied", flush=True)

    class Loaded:
        def modules(self):
            return [*sys.modules]
        def collector(self):
            return gc.isenabled(), gc.get_freeze_count(), gc.is_tracked(self) and self in gc.get_objects()
        def tie(self):
            Knot()
            return gc.collect()
        def keep(self):
            self.knot = Knot()  # up to the end
        def tempfile(self):
            before = "tempfile" in sys.modules
            address = multiprocessing.connection.arbitrary_address("AF_UNIX")  # by which it is used after all
            import tempfile
            folder = multiprocessing.connection.tempfile.gettempdir()
            return before, address.startswith(tempfile.gettempdir()), folder == tempfile.gettempdir(), tempfile.__file__
"""


def test_a_plugin_loads_nothing_that_its_first_call_does_not_need(write):
    """OpenSSL, above all: of that a start would have more than a tenth."""
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True)
    names = {"_hashlib", "asyncio", "concurrent.futures", "ctypes", "hashlib", "hmac", "importlib.util", "inspect", "logging",
             "pathlib", "random", "shutil", "tempfile", "traceback", "typing"}
    with miniplug.launch(write("loaded.py", LOADED) + ":Loaded") as plugin:
        assert names.intersection(plugin.dispense().modules()) <= set(bare.stdout.split())


@pytest.mark.skipif(not hasattr(gc, "freeze"), reason="its collector has nothing of the kind")
def test_garbage_is_looked_for_in_what_is_the_plugins_own(write):
    lines = []
    with miniplug.launch(write("loaded.py", LOADED) + ":Loaded", stdout=lines.append) as plugin:
        loaded = plugin.dispense()
        enabled, frozen, own = loaded.collector()
        assert enabled and frozen > 5000 and own
        assert loaded.tie() > 0
        until(lambda: lines == ["untied"])
        loaded.keep()
    assert lines == ["untied", "untied"]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there multiprocessing.connection imports it only to use it")
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=posix)], ids=["late", "early"])
def test_a_plugin_has_tempfile_when_it_is_asked_for(write, tmp_path, early):
    """Early: a Python whose multiprocessing.connection uses it while it is imported."""
    if early:
        write("_winapi.py", "from tempfile import gettempdir; gettempdir(); raise ImportError")
    with miniplug.launch(write("loaded.py", LOADED) + ":Loaded", env={"PYTHONPATH": str(tmp_path)} if early else {}) as plugin:
        *found, file = plugin.dispense().tempfile()
        assert found == [early, True, True] and os.path.basename(file) == "tempfile.py"


@pytest.mark.parametrize("allowed", range(5))
def test_no_thread_to_be_had(monkeypatch, allowed):
    """Whichever of the threads that a start needs cannot be started: an error that says so, and nothing left."""
    start, started = threading.Thread.start, []

    def refuse(self):
        started.extend([self.name] * self.name.startswith(("miniplug-door", "miniplug-output", "miniplug-watch")))
        if self.name.startswith("miniplug-") and (len(started) > allowed or self.name == "miniplug-hello"):
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        if allowed < 4:
            assert "can't start new thread" in str(fails(WORKSHOP, start_timeout=5))
        else:  # the one that would greet the plugin: the door does that itself
            miniplug.launch(WORKSHOP).close()
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"


@posix
@pytest.mark.skipif(not hasattr(subprocess.Popen, "_on_error_fd_closer"), reason="before Python 3.11 Popen itself leaves "
                    "open what it has opened when it finds no descriptor for the next")
def test_no_descriptor_to_be_had():
    import resource

    miniplug.launch(WORKSHOP).close()  # what it imports is not what is short
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling = [os.dup(0) for _ in range(100)]  # so that there is no gap below the highest
    before = descriptors()
    outcomes = []
    for more in range(1, 20):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(filling) + more, hard))
        try:
            miniplug.launch(WORKSHOP, start_timeout=1).close()
            outcomes.append(True)
        except miniplug.LaunchError:
            outcomes.append(False)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        until(lambda: descriptors().keys() <= before.keys(), 5)
    for fd in filling:
        os.close(fd)
    assert outcomes[0] is False and outcomes[-1] is True


@posix
def test_the_door_closes_without_a_descriptor_to_wake_it(monkeypatch):
    def no_descriptor(address, timeout):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(miniplug, "_connect", no_descriptor)
    miniplug.launch(WORKSHOP).close()  # that no thread is left is looked at after every test


def test_the_door_cuts_off_nobody_whom_it_has_let_in(monkeypatch):
    """Also when it closes before the thread that met the plugin has gone on."""
    closed = threading.Event()

    class Door(miniplug._Door):
        def __init__(self, greet, arrived, **others):
            super().__init__(greet, lambda *result: (arrived(*result), closed.wait(5)), **others)

        def close(self):
            super().close()
            closed.set()

    monkeypatch.setattr(miniplug, "_Door", Door)
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"


def test_after_a_failed_start_it_can_start(write, tmp_path):
    path = write("plugin.py", """
        import os, sys
        if not os.path.exists("ready"):
            sys.exit("not ready")
        class P:
            def hello(self): return "hello"
    """)
    plugin = miniplug.Plugin(path + ":P", cwd=tmp_path)
    with pytest.raises(miniplug.LaunchError, match="not ready"):
        plugin.start()
    assert plugin.running is False and plugin.pid is None and plugin.exit_code == 1
    (tmp_path / "ready").write_text("")
    with plugin:
        assert plugin.dispense().hello() == "hello"


def test_closing_while_it_starts(write):
    path = write("plugin.py", "import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    up = threading.Event()
    plugin = miniplug.Plugin(path, stdout=lambda line: up.set())
    caught = []

    def start():
        try:
            plugin.start()
        except miniplug.PluginClosed as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    assert up.wait(20)
    plugin.close()
    thread.join(10)
    assert len(caught) == 1 and not plugin.running


# -- ending


def test_state_over_a_life():
    plugin = miniplug.Plugin(WORKSHOP)
    assert (plugin.running, plugin.pid, plugin.exit_code, plugin.wait(0)) == (False, None, None, None)
    assert "pid None" in repr(plugin)
    plugin.start()
    assert plugin.start() is plugin
    assert plugin.running and plugin.exit_code is None and plugin.wait(0) is None
    shop = plugin.dispense()
    assert shop.pid() == plugin.pid and str(plugin.pid) in repr(plugin)
    assert 0 < plugin.ping() < 5
    plugin.close()
    plugin.close()
    plugin.kill()
    assert (plugin.running, plugin.pid, plugin.exit_code, plugin.wait()) == (False, None, 0, 0)
    for use in (lambda: shop.greet("x"), plugin.ping, plugin.dispense, lambda: plugin.info):
        with pytest.raises(miniplug.PluginClosed):
            use()
    plugin.start()
    assert shop.greet("again") == "Hello, again!"  # the same proxy, on a fresh instance
    plugin.kill()
    assert plugin.exit_code != 0
    with pytest.raises(miniplug.PluginClosed):
        shop.greet("x")


def test_first_use_starts_it_once():
    plugin = miniplug.Plugin(WORKSHOP)
    pids = []
    threads = [threading.Thread(target=lambda: pids.append(plugin.dispense().pid())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 8 and len(set(pids)) == 1
    plugin.close()


def test_calls_in_flight_end_with_close(workshop, tmp_path):
    with miniplug.launch(WORKSHOP) as plugin:
        shop = plugin.dispense()
        raised = []

        def wait():
            try:
                shop.until_cancelled(str(tmp_path / "note"))
            except miniplug.PluginClosed as error:
                raised.append(error)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert shop.await_entered()
    for thread in threads:
        thread.join(10)
    assert (tmp_path / "note").read_text() == "True"  # cancelled() turned true, and it had time to say so
    assert plugin.exit_code == 0


@pytest.mark.parametrize("trouble", ["spin", "stick", "stop", pytest.param("ignore_sigterm", marks=posix)])
def test_close_is_bounded_whatever_the_plugin_does(trouble):
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    if trouble == "stop":
        freeze(plugin.pid)
    elif trouble == "ignore_sigterm":
        shop.ignore_sigterm()
        freeze(plugin.pid)
    else:
        threading.Thread(target=swallow, args=(getattr(shop, trouble),)).start()
        if trouble == "spin":
            shop.greet("x")  # it is in the loop, or about to be
    pid = plugin.pid
    start = time.monotonic()
    plugin.close(grace=0.2)
    assert time.monotonic() - start < 2.2
    assert not alive(pid) and not plugin.running


@pytest.mark.parametrize("how", ["close", "kill", "crash"])
def test_the_whole_tree_ends(how):
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    child = shop.spawn()
    assert alive(child)
    start = time.monotonic()
    if how == "crash":
        with pytest.raises(miniplug.PluginCrashed):
            shop.hard_exit(1)
    else:
        getattr(plugin, how)()
    assert time.monotonic() - start < 3
    until(lambda: not alive(child))


def test_a_grandchild_that_left_the_group_holds_up_nothing():
    """It holds the plugin's stdout and stderr open, and no signal to the group reaches it. A job it cannot leave."""
    plugin = miniplug.launch(WORKSHOP)
    stray = plugin.dispense().spawn(detached=True)
    start = time.monotonic()
    plugin.close()
    assert time.monotonic() - start < 2
    if WINDOWS:
        until(lambda: not alive(stray))
    else:
        assert alive(stray)
        os.kill(stray, signal.SIGKILL)


@pytest.mark.parametrize("managed", [True, False])
def test_an_unmanaged_one_is_not_waited_for_at_exit(write, tmp_path, managed):
    """It ends by itself, as its host is gone; on Windows the job gives it no time for that."""
    plugin = write("plugin.py", f"""
        import time
        class Slow:
            def __enter__(self): return self
            def __exit__(self, *error):
                time.sleep(0.7)
                open({str(tmp_path / 'left')!r}, "w").close()
            def hello(self): return "hello"
    """)
    host = write("host.py", f"""
        import miniplug
        print(miniplug.launch({plugin + ":Slow"!r}, managed={managed}).dispense().hello())
    """)
    assert run_python(host) == (0, "hello\n", "")
    assert (tmp_path / "left").exists() is managed
    until(lambda: (tmp_path / "left").exists() or WINDOWS)


def test_interpreter_exit_closes_what_is_open(write, tmp_path):
    """And does not wait for the grace, when they have ended."""
    host = write("host.py", f"""
        import miniplug, sys
        miniplug._GRACE = 600
        plugins = [miniplug.launch({WORKSHOP!r}) for _ in range(3)]
        print(*[plugin.pid for plugin in plugins], flush=True)
        if sys.argv[1] == "raise":
            raise SystemExit(5)
    """)
    for way, status in (("return", 0), ("raise", 5)):
        code, out, err = run_python(host, way)  # which does not wait for 600 seconds
        assert (code, err) == (status, ""), err
        assert not any(alive(int(pid)) for pid in out.split())


def test_interpreter_exit_waits_for_nothing_but_the_plugins_end(write):
    host = write("host.py", f"""
        import miniplug
        miniplug._GRACE = 600.0
        print(miniplug.launch({WORKSHOP!r}).dispense().greet("you"))
    """)
    assert run_python(host) == (0, "Hello, you!\n", "")


# -- crashing


def crashes(call, *args):
    start = time.monotonic()
    with pytest.raises(miniplug.PluginCrashed) as caught:
        call(*args)
    assert time.monotonic() - start < 3
    assert isinstance(caught.value, ConnectionError)
    return caught.value


@pytest.mark.parametrize("way, args, code, signal_name", [
    ("hard_exit", (3,), 3, None),
    ("hard_exit", (0,), 0, None),
    pytest.param("kill_self", ("SIGKILL",), -9, "SIGKILL", marks=posix),
    pytest.param("kill_self", ("SIGTERM",), -15, "SIGTERM", marks=posix),
    pytest.param("segfault", (), -11, "SIGSEGV", marks=posix),
    pytest.param("abort", (), -6, "SIGABRT", marks=posix),
    pytest.param("hard_exit", (-1,), 0xFFFFFFFF, None, marks=windows),
    pytest.param("segfault", (), 0xC0000005, None, marks=windows),
])
def test_a_crash_says_how(way, args, code, signal_name):
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    error = crashes(getattr(shop, way), *args)
    assert (error.exit_code, error.signal_name, error.calls) == (code, signal_name, [way])
    status = f"status {code if code < 1 << 30 else hex(code)}"
    assert way in str(error) and (signal_name or status) in str(error)
    assert plugin.running is False and plugin.exit_code == code and plugin.pid is None
    assert crashes(shop.greet, "x").exit_code == code  # until start()
    assert plugin.start().dispense().greet("you") == shop.greet("you") == "Hello, you!"
    plugin.close()


def test_a_segmentation_fault_tells_where():
    plugin = miniplug.launch(WORKSHOP, stderr="discard")
    error = crashes(plugin.dispense().segfault)
    assert any("in segfault" in line for line in error.output)


def test_the_last_lines_are_in_the_error():
    plugin = miniplug.launch(WORKSHOP, stdout="discard", stderr="discard")
    error = crashes(plugin.dispense().say_and_die, "bye")
    assert error.output == ["err: bye"] and "err: bye" in str(error)


def test_every_call_in_flight_gets_it():
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    errors = []

    def wait():
        try:
            shop.enter_and_wait()
        except miniplug.PluginCrashed as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(10)]
    for thread in threads:
        thread.start()
    assert shop.await_running(10) == 10
    error = crashes(shop.hard_exit, 9)
    for thread in threads:
        thread.join(5)
    assert len(errors) == 10 and len(set(map(id, errors))) == 10
    assert {error.exit_code for error in errors} == {9}
    assert sorted(error.calls) == ["enter_and_wait"] * 10 + ["hard_exit"]


def test_a_crash_between_calls():
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    pid = plugin.pid
    if WINDOWS:
        subprocess.run(["taskkill", "/f", "/pid", str(pid)], check=False, stdout=subprocess.DEVNULL)
    else:
        os.kill(pid, signal.SIGKILL)
    assert plugin.wait(10) is not None
    assert not plugin.running
    crashes(shop.greet, "x")


def test_a_plugin_that_returns_from_serve_by_itself(write):
    path = write("plugin.py", """
        import threading, os, miniplug

        class P:
            def leave(self):
                threading.Thread(target=lambda: os._exit(0)).start()
                threading.Event().wait()

        miniplug.serve({"p": P()})
    """)
    plugin = miniplug.launch(path)
    error = crashes(plugin.dispense().leave)
    assert error.exit_code == 0 and "exited with status 0" in str(error)


# -- what a method raises


def test_a_builtin_exception_arrives_as_itself(workshop):
    with pytest.raises(ValueError) as caught:
        workshop.fail("ValueError", "bad", 1)
    error = caught.value
    assert isinstance(error, miniplug.RemoteError) and error.args == ("bad", 1)
    assert (error.type_name, error.message) == ("ValueError", "('bad', 1)")
    assert "in fail" in error.remote_traceback and "miniplug.py" not in error.remote_traceback
    import traceback

    printed = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert "in fail" in printed and "ValueError: ('bad', 1)" in printed
    assert workshop.greet("on") == "Hello, on!"


def test_attributes_survive(workshop):
    with pytest.raises(FileNotFoundError) as caught:
        workshop.open_missing()
    assert (caught.value.errno, caught.value.filename) == (2, "/no/such/file/anywhere")
    assert str(caught.value) == "[Errno 2] No such file or directory: '/no/such/file/anywhere'"
    with pytest.raises(KeyError) as key:
        workshop.fail("KeyError", "k")
    assert str(key.value) == "'k'"
    with pytest.raises(UnicodeDecodeError) as unicode:
        workshop.fail("UnicodeDecodeError", "utf-8", b"\xff", 0, 1, "why")
    assert unicode.value.reason == "why"


def test_an_unregistered_subclass_arrives_as_its_nearest_base(workshop):
    with pytest.raises(KeyError) as caught:
        workshop.fail_own()
    assert isinstance(caught.value, miniplug.RemoteError)
    assert caught.value.type_name.endswith("Own") and caught.value.args == ("outer", 7)
    assert "inner" in caught.value.remote_traceback


@pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration"])
def test_what_would_end_the_host_arrives_as_plain_remote_error(workshop, kind):
    with pytest.raises(miniplug.RemoteError) as caught:
        workshop.fail(kind)
    assert caught.value.type_name == str(caught.value) == kind and not isinstance(caught.value, (StopIteration, StopAsyncIteration))
    assert workshop.greet("on") == "Hello, on!"


def test_sys_exit_in_a_method_ends_nothing(workshop):
    with pytest.raises(miniplug.RemoteError):
        workshop.exit(1)
    assert workshop.greet("on") == "Hello, on!"


def test_every_builtin_exception_arrives(workshop):
    import builtins

    for name, kind in sorted(vars(builtins).items()):
        if isinstance(kind, type) and issubclass(kind, BaseException) and not name.endswith("Group"):
            args = {"UnicodeDecodeError": ("utf-8", b"\xff", 0, 1, "why"), "UnicodeEncodeError": ("utf-8", "x", 0, 1, "why"),
                    "UnicodeTranslateError": ("x", 0, 1, "why")}.get(name, ("text",))
            with pytest.raises(miniplug.RemoteError) as caught:
                workshop.fail(name, *args)
            if issubclass(kind, Exception) and "Iteration" not in name:
                told = args if kind is not Exception else ("Exception: text",)
                assert isinstance(caught.value, kind) and caught.value.args == told, name


def test_wrong_arguments_are_a_type_error(workshop):
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        workshop.greet()


def test_what_cannot_travel_is_named(workshop):
    with pytest.raises(miniplug.NotSerializable, match=r"args\[1\]\['a'\]\[0\] is of type object") as caught:
        workshop.echo(1, {"a": [object()]})
    assert caught.value.path == "args[1]['a'][0]" and isinstance(caught.value, TypeError)
    with pytest.raises(miniplug.NotSerializable, match=r"kwargs\['x'\]"):
        workshop.echo(x=object())
    with pytest.raises(miniplug.NotSerializable, match=r"the result\[1\]\['deep'\] is of type object"):
        workshop.unserializable()
    assert workshop.greet("on") == "Hello, on!"


def test_an_exception_whose_arguments_cannot_travel(write):
    path = write("plugin.py", """
        class P:
            def fail(self): raise ValueError("text", object())
            def worse(self):
                class Bad(Exception):
                    def __str__(self): raise RuntimeError("no text")
                raise Bad(object())
            def huge(self): raise ValueError("x" * 3000000)
    """)
    with miniplug.launch(path + ":P", max_message=1000000) as plugin:
        with pytest.raises(ValueError) as caught:
            plugin.dispense().fail()
        assert "text" in str(caught.value) and isinstance(caught.value, miniplug.RemoteError)
        with pytest.raises(miniplug.RemoteError):
            plugin.dispense().worse()
        with pytest.raises(ValueError, match=r"^x{1000}\.\.\.$") as caught:
            plugin.dispense().huge()
        assert isinstance(caught.value, miniplug.RemoteError)


def test_remote_errors_can_be_pickled(workshop):
    import copy
    import pickle

    with pytest.raises(FileNotFoundError) as caught:
        workshop.open_missing()
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):  # noqa: S301
        assert isinstance(twin, FileNotFoundError) and isinstance(twin, miniplug.RemoteError)
        assert twin.filename == caught.value.filename and twin.remote_traceback == caught.value.remote_traceback


def test_too_large(write):
    with miniplug.launch(WORKSHOP, max_message=100000) as plugin:
        shop = plugin.dispense()
        assert len(shop.echo("x" * 90000)) == 90000
        with pytest.raises(miniplug.MessageTooLarge) as caught:  # the plugin takes it; its answer is what is too large
            shop.echo("x" * 110000)
        assert caught.value.limit == 100000 and caught.value.size > 110000 and isinstance(caught.value, ValueError)
        with pytest.raises(miniplug.MessageTooLarge):
            shop.echo(b"x" * 110000)
        assert shop.greet("on") == "Hello, on!"
    path = write("plugin.py", """
        import miniplug
        class P:
            def take(self, x): return len(x)
        miniplug.serve({"p": P()}, max_message=100000)
    """)
    with miniplug.launch(path) as plugin:
        with pytest.raises(miniplug.MessageTooLarge, match="the other side takes 100000"):
            plugin.dispense().take("x" * 110000)
        assert plugin.dispense().take("x" * 90000) == 90000


# -- deadlines


def test_call_timeout(tmp_path):
    import asyncio
    import concurrent.futures

    with miniplug.launch(WORKSHOP, call_timeout=0.2) as plugin:
        shop = plugin.dispense()
        with pytest.raises(miniplug.CallTimeout, match=r"sleep\(\) took longer than 0.2 s") as caught:
            shop.sleep(1)
        assert (caught.value.method, caught.value.seconds) == ("sleep", 0.2)
        for kind in (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError):
            assert isinstance(caught.value, kind)
        assert shop.sleep.timeout(10)(0.3) == 0.3
        assert plugin.dispense(timeout=10).sleep(0.3) == 0.3
        with pytest.raises(miniplug.CallTimeout):
            shop.until_cancelled(str(tmp_path / "note"))
        until(lambda: (tmp_path / "note").exists() and (tmp_path / "note").read_text() == "True")
        assert shop.greet("on") == "Hello, on!"
        assert miniplug.cancelled() is False


def test_a_remote_timeout_error_is_not_a_call_timeout(workshop):
    with pytest.raises(TimeoutError) as caught:
        workshop.fail("TimeoutError", "of its own")
    assert isinstance(caught.value, miniplug.RemoteError) and not isinstance(caught.value, miniplug.CallTimeout)


# -- the environment


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FROM_HOST", "host")
    monkeypatch.setenv("BOTH", "host")
    monkeypatch.setenv("MINIPLUG_SOMETHING", "host")
    with miniplug.launch(WORKSHOP, env={"BOTH": "mine", "EXTRA": "1"}, cwd=tmp_path) as plugin:
        shop = plugin.dispense()
        env = shop.env()
        assert (env["FROM_HOST"], env["BOTH"], env["EXTRA"]) == ("host", "mine", "1")
        assert not [name for name in env if name.startswith("MINIPLUG")]
        assert "MINIPLUG" not in shop.child_env()
        assert os.path.samefile(shop.cwd(), str(tmp_path))
    with miniplug.launch(WORKSHOP, env={"EXTRA": "1"}, inherit_env=False) as plugin:
        env = plugin.dispense().env()
        assert "FROM_HOST" not in env and env["EXTRA"] == "1"
        if not WINDOWS:  # LC_CTYPE: Python itself sets it where no locale is given
            assert env.keys() <= {"EXTRA", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}


def test_the_cookie_does_not_reach_children(write):
    path = write("plugin.py", """
        import os, miniplug
        class P:
            def env(self): return dict(os.environ)
        miniplug.serve({"p": P()}, handshake=miniplug.Handshake(1, "A_COOKIE", "v"))
    """)
    with miniplug.launch(path, handshake=miniplug.Handshake(1, "A_COOKIE", "v")) as plugin:
        assert "A_COOKIE" not in plugin.dispense().env()


def test_where_it_runs(write, tmp_path, monkeypatch):
    """`cwd`: what is relative in the command starts there; it may itself be relative to where the host is."""
    write("there/beside.py", "value = 'beside'")
    write("there/where.py", """
        import os, sys
        class Where:
            def cwd(self): return os.path.basename(os.getcwd())
            def path0(self): return os.path.basename(os.path.realpath(sys.path[0]))
            def beside(self):
                import beside
                return beside.value
        if __name__ == "__main__":
            import miniplug
            miniplug.serve({"where": Where()})
    """)
    monkeypatch.chdir(tmp_path)
    for command in ("where.py:Where", "where:Where", "where.py", str(tmp_path / "there" / "where.py") + ":Where"):
        with miniplug.launch(command, cwd="there") as plugin:
            where = plugin.dispense()
            assert (where.cwd(), where.path0(), where.beside()) == ("there", "there", "beside")
    assert "nowhere" in str(fails([sys.executable], cwd="nowhere")) or WINDOWS


def test_stdin(tmp_path):
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().read_stdin() == ""
    (tmp_path / "input").write_text("from a file")
    with open(str(tmp_path / "input")) as file, miniplug.launch(WORKSHOP, stdin=file) as plugin:
        assert plugin.dispense().read_stdin() == "from a file"


def test_paths_with_spaces_and_other_letters(write, tmp_path):
    folder = tmp_path / "with spaces" / "ünïcödé"
    folder.mkdir(parents=True)
    path = write("with spaces/ünïcödé/plüg in.py", "class P:\n    def hello(self): return 'hello'\n")
    with miniplug.launch(path + ":P") as plugin:
        assert plugin.dispense().hello() == "hello"
    with miniplug.launch("plüg in.py:P", cwd=str(folder)) as plugin:
        assert plugin.dispense().hello() == "hello"
    script = write("with spaces/ünïcödé/scrïpt.py", """
        import miniplug, os, sys
        class P:
            def where(self): return os.path.basename(__file__), sys.executable
        miniplug.serve({"p": P()})
    """)
    for limits in (None, None if WINDOWS else miniplug.Limits(open_files=100)):
        with miniplug.launch(script, cwd=str(folder), limits=limits) as plugin:
            assert plugin.dispense().where() == ("scrïpt.py", sys.executable)


@pytest.mark.skipif(WINDOWS or sys.version_info[:3] == (3, 13, 0), reason="no folder that somebody is in goes on Windows; 3.13.0 "
                    "cannot import socket there")
def test_where_the_current_folder_is_gone(write, tmp_path, monkeypatch):
    """What is absolute starts; what is not is not there."""
    plugin = write("plugin.py", "class P:\n    def hello(self): return 'hello'\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("TMPDIR", "relative")
    for command, method in ((plugin + ":P", "hello"), ("os:path", "basename")):
        with miniplug.launch(command) as started:
            assert hasattr(started.dispense(), method)
    for options in ({"command": "plugin.py:P"}, {"command": plugin + ":P", "sha256": {"plugin.py": "0" * 64}}):
        with pytest.raises(miniplug.LaunchError, match=r"no such file|No such file"):
            miniplug.launch(**options)


@pytest.mark.skipif(WINDOWS, reason="no file has a colon in its name")
def test_a_program_with_a_colon_in_its_name(write):
    """What has a folder is no module."""
    path = write("tool:v2", f"""\
        #!{sys.executable}
        import sys
        sys.path.append({os.path.dirname(miniplug.__file__)!r})
        import miniplug
        class Tool:
            def hello(self): return "hello"
        miniplug.serve({{"tool": Tool}})
    """)
    os.chmod(path, 0o755)
    with miniplug.launch(path) as plugin:
        assert plugin.name == "tool:v2" and plugin.dispense().hello() == "hello"
    with pytest.raises(miniplug.LaunchError, match="no such file"):
        miniplug.launch(os.path.dirname(path) + "/module:Attr")


@pytest.mark.parametrize("name", ["json.py", "struct.py"])
def test_what_lies_in_the_current_folder_is_not_what_miniplug_imports(write, tmp_path, name):
    write(name, "raise SystemExit('imported')")
    plugin = write("plugin.py", "class P:\n    def hello(self): return 'hello'\n")
    with miniplug.launch(plugin + ":P", cwd=tmp_path) as started:
        assert started.dispense().hello() == "hello"
    script = write("script.py", "import miniplug\nclass P:\n    def hello(self): return 'hello'\nminiplug.serve({'p': P})\n")
    with miniplug.launch(script, cwd=tmp_path) as started:
        assert started.dispense().hello() == "hello"


@posix
def test_an_interpreter_and_a_temp_folder_with_spaces_and_other_letters(tmp_path, monkeypatch):
    folder = tmp_path / "ünïcödé ænd 'such'"
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    short = tempfile.mkdtemp(prefix="ü n ", dir="/tmp")  # short enough for a socket
    monkeypatch.setenv("TMPDIR", short)
    try:
        with miniplug.launch(WORKSHOP, python=python) as plugin:
            assert plugin.dispense().greet("x") == "Hello, x!"
        assert os.listdir(short) == []
    finally:
        os.rmdir(short)


@posix
@pytest.mark.parametrize("folder", ["deep", "nothing", "/proc"])
def test_a_temp_folder_that_is_too_deep_or_missing_or_read_only(monkeypatch, tmp_path, folder):
    """It takes another one."""
    if folder == "deep":
        folder = str(tmp_path / ("x" * 90) / ("y" * 90))
        os.makedirs(folder)
    monkeypatch.setenv("TMPDIR", os.path.join(TEMPORARY, folder))
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"


@posix
@pytest.mark.parametrize("home", ["/proc", "/no/such/home"])
def test_a_home_that_nobody_can_write_to(write, home):
    """Neither side leaves or needs anything there."""
    host = write("host.py", f"""
        import miniplug
        with miniplug.launch({WORKSHOP!r}) as plugin:
            print(plugin.dispense().env()["HOME"])
    """)
    env = dict(os.environ, HOME=home, PYTHONPATH=os.path.dirname(miniplug.__file__))
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        env.pop(name, None)
    assert subprocess.check_output([sys.executable, host], env=env, universal_newlines=True) == home + "\n"


@posix
@pytest.mark.parametrize("vendored", [False, True])
def test_a_frozen_application_serves_its_own_plugins(write, tmp_path, vendored):
    """A real executable whose Python says that it is frozen: it starts itself again for each plugin."""
    name = "app_vendor.miniplug" if vendored else "miniplug"
    if vendored:
        write("app_vendor/__init__.py", "")
        shutil.copy(miniplug.__file__, str(tmp_path / "app_vendor" / "miniplug.py"))
    main = write("main.py", f"""
        import sys
        sys.frozen, sys.executable = True, {str(tmp_path / "my app")!r}
        import {name} as miniplug
        miniplug.freeze_support()
        print("in the application", sys.argv[1:], flush=True)
        with miniplug.launch({str(tmp_path / "plugin.py")!r} + ":Frozen", stderr="inherit") as plugin:
            print(plugin.dispense().where(), flush=True)
        with miniplug.launch({str(tmp_path / "plugin.py")!r}, stderr="inherit") as plugin:
            print(plugin.dispense().where(), flush=True)
            print(plugin.dispense().twice(lambda x: x + 1), flush=True)
    """)
    write("plugin.py", f"""
        import os, sys
        import miniplug, {name.partition(".")[0]}
        class Frozen:
            def where(self):
                return (sys.frozen, miniplug.__name__, sys.modules[{name!r}] is miniplug,
                        [name for name in os.environ if name.startswith("MINIPLUG")])
            def twice(self, function): return function(function(0))
        if __name__ == "__main__":
            miniplug.serve({{"frozen": Frozen()}})
            print("code after serve() runs", file=sys.stderr)
    """)
    app = tmp_path / "my app"
    app.write_text(f'#!/bin/sh\nexec {sys.executable} "{main}" "$@"\n')
    app.chmod(0o755)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), os.path.dirname(miniplug.__file__)]))
    done = subprocess.run([str(app), "--its-own-option"], env=env, capture_output=True, text=True, timeout=30, check=False)
    where = str((True, name, True, []))
    assert done.stdout.splitlines() == ["in the application ['--its-own-option']", where, where, "2"], done.stderr
    assert done.stderr == "code after serve() runs\n"


def test_freeze_support_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(miniplug, "_frozen_mains", [])
    assert miniplug.freeze_support() is None and not miniplug._frozen_mains
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "call miniplug.freeze_support()" in str(fails(WORKSHOP))
    assert miniplug.freeze_support() is None and miniplug._frozen_mains
    monkeypatch.setattr(sys, "executable", "/no/such/app")
    program, *arguments = fails(WORKSHOP).command
    assert os.path.normpath(program) == os.path.abspath("/no/such/app")
    assert arguments == ["--miniplug-plugin", "serve", f"workshop={WORKSHOP}"]


@posix
def test_without_any_folder_it_is_loopback_tcp(monkeypatch):
    monkeypatch.setattr(miniplug.os, "mkdir", lambda *args: (_ for _ in ()).throw(OSError("read-only")))
    with miniplug.launch(WORKSHOP) as plugin:
        shop = plugin.dispense()
        assert ":" in shop._target.here()[0]._session.channel.sock.getsockname()[0] + ":"
        assert shop.greet("x") == "Hello, x!"
        assert len(shop.echo(b"x" * 5000000)) == 5000000


# -- the process


@posix
def test_the_plugin_leads_a_group_of_its_own(workshop):
    assert workshop.group() == workshop.pid() != os.getpgrp()


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_in_a_forked_child_nothing_is_owned():
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        said = []
        for use in (lambda: shop.greet("x"), plugin.start, plugin.ping):
            try:
                use()
            except miniplug.PluginError as error:
                said.append("forked" in str(error))
        waiting = threading.Thread(target=plugin.wait, daemon=True)
        waiting.start()
        waiting.join(5)
        said += [waiting.is_alive(), plugin.running, plugin.pid, plugin.exit_code]
        plugin.close()
        os.write(write, repr(said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"[True, True, True, False, False, None, None]"
    os.close(read), os.close(write)
    assert shop.greet("still") == "Hello, still!"
    plugin.close()
    assert plugin.exit_code == 0


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("end", ["sys.exit(0)", "raise ValueError('in the child')", "pass"])
def test_a_forked_child_of_the_plugin_does_not_serve_beside_it(write, end):
    path = write("plugin.py", f"""
        import os, sys
        class P:
            def pid(self): return os.getpid()
            def fork(self):
                self.child = os.fork()
                if not self.child:
                    {end}
                return os.getpid()
            def await_child(self): return os.waitpid(self.child, 0)[1]
    """)
    with miniplug.launch(path + ":P", stderr="discard") as plugin:
        proxy = plugin.dispense(timeout=10)
        assert proxy.fork() == plugin.pid
        assert proxy.await_child() == (256 if "raise" in end else 0)
        assert {proxy.pid() for _ in range(50)} == {plugin.pid}
    assert plugin.exit_code == 0


@pytest.mark.parametrize("seconds", [3e6, 1e10, float("inf")])
def test_very_long_deadlines(workshop, seconds):
    assert workshop.echo.timeout(seconds)(1) == 1
    with miniplug.launch(WORKSHOP, start_timeout=seconds) as plugin:
        plugin.kill()
        assert plugin.wait(seconds) is not None


def test_start_while_it_closes():
    plugin = miniplug.launch(WORKSHOP)
    shop = plugin.dispense()
    threading.Thread(target=swallow, args=(shop.enter_and_wait,)).start()
    assert shop.await_entered()
    closing = threading.Thread(target=plugin.close, args=(1.0,))
    closing.start()
    until(lambda: plugin._supervisor.run.asked)
    plugin.start()
    assert shop.greet("x") == "Hello, x!"
    closing.join()
    plugin.close()


def test_a_stray_that_never_stops_writing():
    plugin = miniplug.launch(WORKSHOP, stdout="discard")
    shop = plugin.dispense()
    stray = shop.spawn(detached=True, code="while True: print('x' * 1000)")
    start = time.monotonic()
    plugin.close()
    assert time.monotonic() - start < 4
    until(lambda: not alive(stray))  # of SIGPIPE, or what Python makes of it; on Windows the job ends it


@posix
def test_a_host_that_does_not_reap():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        plugin = miniplug.launch(WORKSHOP)
        error = crashes(plugin.dispense().hard_exit, 3)
        assert error.exit_code is None and "ended" in str(error)
    finally:
        signal.signal(signal.SIGCHLD, before)


@posix
def test_a_relative_temp_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", "t")
    with miniplug.launch(WORKSHOP, cwd="/") as plugin:
        assert plugin.dispense().greet("x") == "Hello, x!"


def test_a_plugin_without_streams(write):
    path = write("plugin.py", """
        import sys, miniplug
        class P:
            def hello(self): return "hello"
        sys.stdout.close()
        sys.stderr.close()
        miniplug.serve({"p": P()})
    """)
    with miniplug.launch(path) as plugin:
        assert plugin.dispense().hello() == "hello"


def test_proxies_are_not_copied(workshop):
    import copy

    for way in (copy.copy, copy.deepcopy):
        with pytest.raises(miniplug.NotSerializable, match="cannot be copied"):
            way(workshop)


def test_a_gone_proxy_gives_its_instance_back(write, tmp_path):
    path = write("plugin.py", f"""
        import miniplug
        class Own:
            def __enter__(self): return self
            def __exit__(self, *error):
                with open({str(tmp_path / 'gone')!r}, "w"): pass
            def hello(self): return "hello"
        miniplug.serve({{"own": Own, "other": object()}})
    """)
    with miniplug.launch(path) as plugin:
        own = plugin.dispense("own")
        assert own.hello() == "hello"
        method = own.hello
        del own
        assert method() == "hello"  # a method keeps it
        del method
        plugin.dispense("other")
        until((tmp_path / "gone").exists)


def test_a_proxy_that_was_released_is_not_called():
    with miniplug.launch(WORKSHOP) as plugin:
        proxy = plugin.dispense()
        greet = proxy.greet
        assert greet("world") == "Hello, world!"
        miniplug.release(proxy)
        for call in (greet, greet.submit, greet.notify):
            with pytest.raises(miniplug.DeadReference, match="was released"):
                call("world")
        assert plugin.dispense().greet("again") == "Hello, again!"
