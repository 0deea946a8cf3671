"""`serve` itself: what it takes and refuses, and what of a plugin's process is its business."""

import functools
import gc
import importlib.util
import json
import math
import operator
import os
import socket
import subprocess
import sys
import textwrap
import time
import zlib

import pytest
from conftest import WINDOWS, run_python, until

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="there is nothing of the kind on Windows")


class Greeter:
    def greet(self, name):
        return f"Hello, {name}!"


class Maker:
    def __init__(self, needed, *others, loud=False, **options):
        pass


# -- what is wrong is said, with the name of the option, and before anything else happens

@pytest.mark.parametrize("plugins", [
    Greeter(), Greeter, [Greeter], "greeter", None, {1: Greeter()}, {1: {}}, {}, {1: {"a": 1}, "b": 2}, {"a": 1, None: 2}])
def test_what_is_no_mapping_of_names_is_told(plugins):
    with pytest.raises(TypeError, match=r"plugins=.*: it is \{name: object, ...\} or \{version: "):
        miniplug.serve(plugins)


@pytest.mark.parametrize("options, kind, words", [
    ({"handshake": 1}, TypeError, "handshake=1: it is a Handshake"),
    ({"handshake": ("a", "b", "c")}, TypeError, "handshake="),
    ({"address": 5}, TypeError, "address=5: it is a str"),
    ({"address": b"/tmp/s"}, TypeError, "address=b'/tmp/s': it is a str"),
    ({"persist": "yes"}, TypeError, "persist='yes': it is a bool"),
    ({"persist": 1}, TypeError, "persist=1: it is a bool"),
    ({"info": "1.0"}, TypeError, "info='1.0': it is a dict"),
    ({"info": ["version"]}, TypeError, "info="),
    ({"max_workers": "4"}, ValueError, "max_workers='4': it is a whole number, at least 1"),
    ({"max_workers": 0}, ValueError, "max_workers=0: "),
    ({"max_message": 4095}, ValueError, "max_message=4095: it is a whole number, at least 4096"),
    *(({"authkey": key}, ValueError, "authkey: it is at least 16 bytes, or as many in hexadecimal digits")
      for key in (32, ["00"] * 32, "geheim", b"short")),
])
def test_a_wrong_option_is_told_by_its_name(options, kind, words, monkeypatch):
    monkeypatch.setattr(miniplug, "_serve", None)  # it does not come so far
    with pytest.raises(kind, match=words):
        miniplug.serve({"greeter": Greeter()}, **options)


def test_a_handshake_of_another_copy_of_the_file_will_do(write):
    """As of a module that host and plugin share, and which has vendored miniplug itself."""
    plugin = write("plugin.py", f"""
        import importlib.util
        import miniplug
        spec = importlib.util.spec_from_file_location("another", {miniplug.__file__!r})
        another = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(another)
        assert another.Handshake is not miniplug.Handshake
        miniplug.serve({{"zlib": "text"}}, handshake=another.Handshake(3))
    """)
    with miniplug.launch(plugin, handshake=miniplug.Handshake(3)) as served:
        assert served.protocol_version == 3


# -- what is a factory

@pytest.mark.parametrize("served, makes", [
    (Greeter, True), (dict, True), (lambda: Greeter(), True), (lambda loud=False: Greeter(), True),
    (functools.partial(Greeter), False), (functools.partial(dict, a=1), False), (functools.partial(Maker, 1), False),
    (time.time, None), (os.getpid, None),
    (Greeter().greet, False), (functools.partial(pow, 2), False), (lambda name: name, False),
    (lambda *names: names, False), (lambda **names: names, False), (lambda name, loud=False: name, False),
    (math.hypot, False), (zlib.crc32, False), (time.sleep, False), (max, False), (print, False), (os.stat, False),
    (json.dumps, False), (gc.collect, False), (operator.itemgetter(0), False), (Greeter(), False), (5, False),
])
def test_what_needs_arguments_or_takes_any_is_there_to_be_called(served, makes):
    if served in (time.time, os.getpid):  # not every Python tells what they take: then they are not called
        assert miniplug._makes_instances(served) in (True, False)
    else:
        assert miniplug._makes_instances(served) is makes


def test_a_function_in_c_is_called_by_who_has_it():
    with miniplug.launch("math:hypot") as plugin:
        assert plugin.dispense()(3.0, 4.0) == 5.0
    with miniplug.local({"crc32": zlib.crc32, "max": max, "sleep": time.sleep, "pid": os.getpid}) as plugin:
        assert plugin.dispense("crc32")(b"miniplug") == zlib.crc32(b"miniplug")
        assert plugin.dispense("crc32")(b"plug", zlib.crc32(b"mini")) == zlib.crc32(b"miniplug")
        assert plugin.dispense("max")([1, 3, 2]) == 3
        assert plugin.dispense("sleep")(0) is None


# -- green threads

@pytest.mark.parametrize("library", ["gevent", "eventlet"])
@pytest.mark.parametrize("side", ["serve", "command line"])
def test_under_monkey_patches_it_says_so(library, side, write):
    """The real library if it is here, and else what its patches look like."""
    write(f"{library}/__init__.py", "def sleep(seconds): raise AssertionError")
    what = "miniplug.serve({'x': 1}, persist=True)"
    if side == "command line":
        what = "sys.exit(miniplug._main(['serve', 'json:dumps', '--persist']))"
    path = write("script.py", f"""
        import sys
        try:
            if sys.argv[1] == "gevent":
                from gevent.monkey import patch_all as patch
            else:
                from eventlet import monkey_patch as patch
            patch()
        except ImportError:  # the one beside this file: its like
            import time
            from {library} import sleep as patched
            time.sleep = patched
        import miniplug
        {what}
    """)
    status, out, err = run_python(path, library)
    assert status == 1 and out == ""
    assert f"miniplug does not run under the monkey patches of {library}: have the plugins in a" in err.splitlines()[-1]


# -- one file, one module

COMMONS = """
    import dataclasses

    from app._vendor import miniplug

    @miniplug.register
    @dataclasses.dataclass
    class Point:
        x: int

    @miniplug.register
    class TooFar(Exception):
        pass
"""
TOOL = """
    import miniplug
    import app._vendor.miniplug
    from app.commons import Point, TooFar

    class Tool:
        def names(self):
            return app._vendor.miniplug is miniplug, miniplug.__file__
        def double(self, point):
            return Point(point.x * 2)
        def fail(self):
            raise TooFar("there")
        def cancelled(self):
            return app._vendor.miniplug.cancelled()
        def lend(self):
            return app._vendor.miniplug.ref([1])
"""


@pytest.fixture
def app(write, tmp_path):
    """An application that has vendored miniplug, and a plugin of it. Returns the folder."""
    with open(miniplug.__file__, encoding="utf-8") as file:
        source = file.read()
    (tmp_path / "app" / "_vendor").mkdir(parents=True)
    (tmp_path / "app" / "_vendor" / "miniplug.py").write_text(source, encoding="utf-8")
    write("app/__init__.py", "")
    write("app/_vendor/__init__.py", "")
    write("app/commons.py", COMMONS)
    write("plugins/tool.py", TOOL)
    return tmp_path


HOST = """
    import json, sys
    sys.path.insert(0, {folder!r})
    from app._vendor import miniplug
    from app.commons import Point, TooFar
    with {start} as plugin:
        tool = plugin.dispense()
        same, file = tool.names()
        assert same, file
        assert tool.double(Point(2)) == Point(4)
        try:
            tool.fail()
        except TooFar as error:
            assert isinstance(error, miniplug.RemoteError)
        assert tool.cancelled() is False
        assert list(tool.lend().copy()) == [1]
    print("fine")
"""


@pytest.mark.parametrize("way", ["by its path", "by its path in its folder", "as a module", "as a module that is imported"])
def test_a_vendored_copy_that_is_run_is_what_its_plugin_imports(app, write, way):
    env = dict(os.environ, PYTHONPATH=str(app))
    run, cwd = [str(app / "app" / "_vendor" / "miniplug.py")], str(app)
    if way == "by its path in its folder":
        run, cwd = ["miniplug.py"], str(app / "app" / "_vendor")
    elif way.startswith("as a module"):
        run = ["-m", "app._vendor.miniplug"]
    if way.endswith("imported"):
        write("app/__init__.py", "from app._vendor import miniplug")
    command = [sys.executable, "-W", "ignore", *run, "serve", str(app / "plugins" / "tool.py") + ":Tool", "--persist"]
    process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True)
    try:
        config = json.loads(process.stdout.readline())
        start = f"miniplug.attach({config!r})"
        assert run_python(write("host.py", HOST.format(folder=str(app), start=start))) == (0, "fine\n", "")
        done = run_python(write("killer.py", f"import miniplug; miniplug.attach({config!r}).kill()"))
        assert done[0] == 0
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_vendored_copy_launches_and_is_what_its_plugin_imports(app, write):
    start = f"miniplug.launch({str(app / 'plugins' / 'tool.py') + ':Tool'!r}, env={{'PYTHONPATH': {str(app)!r}}})"
    assert run_python(write("host.py", HOST.format(folder=str(app), start=start))) == (0, "fine\n", "")


def test_a_vendored_copy_calls_from_the_command_line(app):
    env = dict(os.environ, PYTHONPATH=str(app))
    vendored = str(app / "app" / "_vendor" / "miniplug.py")
    for run in ([vendored], ["-m", "app._vendor.miniplug"]):
        command = [sys.executable, *run, "call", str(app / "plugins" / "tool.py") + ":Tool", "names"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True, cwd=str(app))
        same, file = eval(done.stdout)
        assert same is True and os.path.samefile(file, vendored)


def test_another_file_of_that_name_is_another_module(write, tmp_path):
    """What only is called so is not this file."""
    write("other/miniplug.py", "whose = 'another'")
    write("other/__init__.py", "")
    plugin = write("plugin.py", """
        import miniplug, other.miniplug
        class P:
            def whose(self):
                return other.miniplug.whose, hasattr(miniplug, "whose")
    """)
    with miniplug.launch(f"{plugin}:P") as served:
        assert served.dispense().whose() == ("another", False)


# -- a file may be called like a module that is built in, which none can take the place of

IN_C = {"math", "select", "unicodedata", "array", "_struct", "xxsubtype", "_tracemalloc"}


@pytest.mark.parametrize("name", sorted(name for name in IN_C if importlib.util.find_spec(name)))
def test_a_plugin_called_like_a_module_in_c(name, write):
    plugin = write(f"{name}.py", """
        class P:
            def name(self):
                import math, select, unicodedata
                return __name__, math.floor(1.5), unicodedata.name("a")
    """)
    with miniplug.launch(f"{plugin}:P") as served:
        assert served.dispense().name() == (f"_plugin_{name}", 1, "LATIN SMALL LETTER A")


# -- a module that is not there

@pytest.mark.parametrize("spec, missing", [("no_such_module_x:P", "no_such_module_x"), ("json.no_such:P", "json.no_such")])
def test_a_module_that_is_not_there_is_told_with_where_it_is_looked_for(spec, missing, tmp_path):
    with pytest.raises(miniplug.LaunchError) as caught:
        miniplug.launch(spec, cwd=tmp_path)
    assert f"there is no module '{missing}' in " in str(caught.value) and "set cwd, or PYTHONPATH" in str(caught.value)
    assert os.path.basename(tmp_path) in caught.value.output[-1]


def test_what_a_module_lacks_itself_is_told_as_it_is(write, tmp_path):
    write("lacks.py", "import no_such_module_y")
    with pytest.raises(miniplug.LaunchError, match="ModuleNotFoundError: No module named 'no_such_module_y'"):
        miniplug.launch("lacks:P", cwd=tmp_path)


# -- the environment

def test_no_child_of_a_plugin_sees_the_variables(write):
    """Of a spec, of a script, and of one that persists; started by the module while it loads, and by a method."""
    source = """
        import os, subprocess, sys

        def names():
            code = "import os; print([name for name in os.environ if name.startswith('MINIPLUG')])"
            return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()

        FIRST = names()

        class P:
            def seen(self):
                return FIRST, names(), [name for name in os.environ if name.startswith("MINIPLUG")]
    """
    spec = write("plugin.py", source) + ":P"
    main = "if __name__ == '__main__':\n    import miniplug\n    miniplug.serve({'p': P})\n"
    script = write("script.py", textwrap.dedent(source) + main)
    for command, options in ((spec, {}), (script, {}), (spec, {"persist": True}), (spec, {"sha256": sha256(spec[:-2])})):
        with miniplug.launch(command, **options) as plugin:
            first, second, own = plugin.dispense().seen()
            assert [first.strip(), second.strip(), own] == ["[]", "[]", []]


def sha256(path):
    import hashlib

    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_serving_once_is_all(write):
    plugin = write("plugin.py", """
        import miniplug
        miniplug.serve({"x": "text"})
        try:
            miniplug.serve({"x": "text"})
        except RuntimeError as error:
            print(error)
    """)
    lines = []
    miniplug.launch(plugin, stdout=lines.append).close()
    assert lines == ["this process has served its host already: serve() works once"]


# -- where it listens

@posix
@pytest.mark.parametrize("made", ["a folder", "a link"])
def test_a_name_that_somebody_else_has_taken_is_left_alone(tmp_path, monkeypatch, made):
    """A link of another user's would lead to files of this one's."""
    monkeypatch.setattr(miniplug, "_temp_folders", lambda: [str(tmp_path)])
    monkeypatch.setattr(miniplug.os, "urandom", lambda size: bytes.fromhex("0123456789abcdef")[:size])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "s").write_text("precious")
    taken = tmp_path / "miniplug-0123456789abcdef"
    if made == "a link":
        os.symlink(str(precious), str(taken))
    else:
        precious.rename(taken)
    listener = miniplug._Listener()
    try:
        assert miniplug._transport(listener.address) == "tcp" and listener.folder == ""
        assert listener.passed_over == [f"{tmp_path} (File exists)"]
    finally:
        listener.close()
    assert (taken / "s").read_text() == "precious"


@posix
def test_nobody_who_connects_waits_for_ever(tmp_path):
    """To a plugin that was stopped, and before which many have stood already."""
    address, queue = str(tmp_path / "s"), []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(0)
        try:
            while True:
                queue.append(socket.socket(socket.AF_UNIX))
                queue[-1].setblocking(False)
                queue[-1].connect(address)
        except OSError:
            pass
        try:
            with pytest.raises((TimeoutError, ConnectionRefusedError)):
                miniplug._connect(address, 0.2)
        finally:
            for sock in queue:
                sock.close()


def test_close_does_not_wait_where_there_is_no_descriptor_to_wake_the_door(monkeypatch):
    def no_descriptor(address, timeout):
        raise OSError(24, "Too many open files")

    door = miniplug._Door(lambda channel, address: None, lambda channel, result: None)
    if not WINDOWS:  # there nothing else wakes it
        monkeypatch.setattr(miniplug, "_connect", no_descriptor)
    door.close()
    until(lambda: not door._thread.is_alive())

