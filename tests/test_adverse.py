"""What nobody plans for: exceptions that are traps, calls from where no call should be, full stacks, forks, odd commands."""

import asyncio
import copy
import gc
import inspect
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipapp

import pytest
from conftest import HERE, WINDOWS, WORKSHOP, run_python, until
from test_session import in_threads, pair  # noqa: F401

import miniplug

posix = pytest.mark.skipif(WINDOWS, reason="a pair of AF_UNIX sockets, or signals")

PLUGIN = """
    import asyncio, os, sys, threading
    import miniplug

    class Exits(Exception):
        def __str__(self): raise SystemExit(3)

    class Interrupts(Exception):
        def __str__(self): raise KeyboardInterrupt

    class Hides(Exception):
        def __getattribute__(self, name):
            if name in ("args", "__dict__", "__traceback__", "__class__"): raise RuntimeError(name)
            return super().__getattribute__(name)
        def __repr__(self): raise SystemExit(4)

    class Property(ValueError):
        @property
        def args(self): raise SystemExit(5)

    class Kind(type):
        def __getattribute__(self, name):
            if name in ("__mro__", "__qualname__", "__module__"): raise RuntimeError(name)
            return super().__getattribute__(name)

    class Unnamed(Exception, metaclass=Kind): pass

    class Next:
        def __iter__(self): return self
        def __next__(self): raise SystemExit(6)
        def close(self): raise KeyboardInterrupt

    class Await:
        def __await__(self): raise SystemExit(7)

    class Box:
        def __init__(self, held): self.held = held

    def leave(held): raise SystemExit(8)

    miniplug.register(Box, name="box", encode=lambda box: box.held, decode=leave)

    class P:
        def hello(self, *args): return "hello"
        def exits(self): raise Exits
        def interrupts(self): raise Interrupts
        def hides(self): raise Hides
        def property(self): raise Property("x")
        def unnamed(self): raise Unnamed
        def next(self): return Next()
        def awaits(self): return Await()
        async def exits_async(self): raise Exits
        async def sys_exit_async(self): sys.exit(3)
        async def interrupt_async(self): raise KeyboardInterrupt
        def generator(self):
            yield 1
            raise SystemExit(9)
        async def async_generator(self):
            yield 1
            raise KeyboardInterrupt
        def unencodable(self):
            return Box(Box(object()))
        def box(self):
            return Box(1)
        async def task_exits(self):
            async def leave(): raise SystemExit(1)
            self.task = asyncio.ensure_future(leave())
            await asyncio.sleep(0.01)
            return "goes on"
        def call(self, function, *args): return function(*args)
        def some(self):
            yield from range(3)
        def sleep(self, seconds):
            import time
            time.sleep(seconds)
        async def fork_async(self):
            return os.fork()
        def fork_generator(self):
            child = os.fork()
            yield child
            yield os.getpid()
        def reap(self, pid): return os.waitpid(pid, 0)[1]
        def pid(self): return os.getpid()
"""


class Box:
    def __init__(self, held):
        self.held = held


decoders = []
miniplug.register(Box, name="box", encode=lambda box: box.held, decode=lambda held: decoders[0](held))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    import textwrap

    path = tmp_path_factory.mktemp("adverse") / "plugin.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return f"{path}:P"


@pytest.fixture
def proxy(path):
    with miniplug.launch(path, stderr="discard", call_timeout=10) as plugin:
        yield plugin.dispense()


# -- exceptions that are traps


def test_whatever_a_method_raises_is_an_answer(proxy):
    for name in ("exits", "interrupts", "hides", "property", "unnamed", "awaits", "unencodable", "exits_async",
                 "sys_exit_async", "interrupt_async"):
        with pytest.raises((miniplug.RemoteError, miniplug.NotSerializable)):
            getattr(proxy, name)()
        assert proxy.hello() == "hello", name
    for name, expected in (("next", []), ("generator", [1]), ("async_generator", [1])):
        got = []
        with pytest.raises(miniplug.RemoteError):
            for item in getattr(proxy, name)():
                got.append(item)  # noqa: PERF402 -- those that came before it raised
        assert got == expected and proxy.hello() == "hello"


def test_a_trap_that_a_callback_raises_comes_home(proxy):
    class Kind(type):
        def __getattribute__(self, name):
            if name in ("__mro__", "__qualname__", "__module__"):
                raise RuntimeError(name)
            return super().__getattribute__(name)

    class Unnamed(Exception, metaclass=Kind):
        pass

    trap = Unnamed()

    def fail():
        raise trap

    try:
        proxy.call(fail)
    except Exception as error:
        assert error is trap  # pytest.raises could not print it
    else:
        raise AssertionError("nothing was raised")
    assert proxy.hello() == "hello"


def test_a_type_survives_when_its_text_is_too_long(write):
    path = write("plugin.py", """
        class P:
            def fail(self, length): raise KeyError("\\x00" * length)
            def dispense(self): return "x"
    """)
    with miniplug.launch(path + ":P", max_message=10000) as plugin:
        with pytest.raises(KeyError) as caught:
            plugin.dispense().fail(20000)
        assert len(str(caught.value)) < 10000 and isinstance(caught.value, miniplug.RemoteError)


def test_a_task_of_the_plugins_own_that_exits_does_not_end_the_loop(proxy):
    assert [proxy.task_exits(), proxy.task_exits()] == ["goes on", "goes on"]


def test_a_decode_that_exits_fails_that_call_only(proxy):
    def leave(held):
        raise SystemExit(4)

    decoders[:] = [leave]
    for call in (proxy.box, lambda: proxy.box.submit().result(10), lambda: proxy.hello(Box(1))):
        with pytest.raises(miniplug.NotSerializable, match="cannot be made from what came: SystemExit"):
            call()
        assert proxy.hello() == "hello"


@pytest.mark.parametrize("kind, carried", [
    ("PluginError", {}), ("LaunchError", {"command": ["x"], "exit_code": 3, "output": ["a"]}), ("PluginClosed", {}),
    ("HandshakeError", {"host": {"codec": "json"}, "plugin": {}}), ("AuthenticationError", {"exit_code": 1}),
    ("PluginCrashed", {"exit_code": -9, "signal_name": "SIGKILL", "output": ["a"], "calls": ["m"]}), ("DeadReference", {}),
    ("ProtocolError", {"calls": ["m"]}), ("PluginNotFound", {"names": ["a"]}), ("CallTimeout", {"method": "m", "seconds": 1.5}),
    ("MethodNotFound", {"name": "x", "matches": ["y"]}), ("InterfaceMismatch", {"differences": ["d"]}),
    ("NotSerializable", {"path": "p", "type_name": "t"}), ("MessageTooLarge", {"size": 3, "limit": 2})])
def test_errors_can_be_pickled_and_copied_with_all_they_carry(kind, carried):
    """As a pool of processes does."""
    error = getattr(miniplug, kind)("text", **carried)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
        assert type(twin) is type(error) and str(twin) == "text" and vars(twin) == {**vars(error), **carried}


# -- calls from where no call should be


def interrupted(handler, function):
    """Call a function, and have a signal handler of the main thread's run in the midst of it."""
    ran = []
    before = signal.signal(signal.SIGUSR1, lambda *_: (ran.append(True), handler()))
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    try:
        return function()
    finally:
        timer.join()
        until(lambda: ran)  # it may come late, and without a handler it would end this process
        signal.signal(signal.SIGUSR1, before)


def test_a_decode_may_call_the_plugin(proxy):
    """It runs in the thread that has called, and holds up nobody."""
    decoders[:] = [lambda held: proxy.hello()]
    assert proxy.box() == proxy.hello() == "hello"


@posix
def test_a_signal_handler_may_submit_and_is_told_not_to_call(proxy):
    said = []

    def handler():
        said.append(proxy.hello.submit())
        proxy.hello.notify()
        try:
            proxy.hello()
        except RuntimeError as error:
            said.append(str(error))

    interrupted(handler, lambda: proxy.sleep(0.4))
    assert said[0].result(10) == "hello" and "use submit or notify" in said[1]


@posix
def test_a_signal_handler_may_call_while_another_thread_reads(proxy):
    """And when that one leaves, this thread is woken for the handler's call, too, and not only for the one below."""
    said = []
    other = threading.Thread(target=proxy.sleep, args=(0.4,))
    other.start()
    until(lambda: proxy._target.here()[0]._reader.seat)
    interrupted(lambda: said.append(proxy.sleep(0.5)), lambda: said.append(proxy.sleep(0.2)))
    other.join()
    assert said == [None, None]


@posix
def test_a_signal_handler_may_close_the_plugin(path):
    plugin = miniplug.launch(path, stderr="discard")
    proxy = plugin.dispense()
    with pytest.raises(miniplug.PluginClosed):
        interrupted(lambda: plugin.close(0.2), lambda: proxy.sleep(30))
    assert not plugin.running


@posix
@pytest.mark.parametrize("size", [10, 100000])
def test_what_interrupts_a_write_is_sent_behind_it(pair, size):  # noqa: F811
    """A finalizer or signal handler runs while this very thread holds the lock that it needs."""
    both = pair({"echo": Echo()})
    echo = both.dispense("echo")
    transmit, found = both.here.channel._transmit, []

    def interrupt():
        both.here.channel._transmit = transmit
        echo.echo.notify("noted")
        found.append(echo.echo.submit("later"))
        with pytest.raises(RuntimeError, match="would wait for ever"):
            echo.echo("now")

    both.here.channel._transmit = lambda *args: (interrupt(), transmit(*args))[1]
    assert echo.echo("x" * size) == "x" * size
    assert found[0].result(10) == "later"
    until(lambda: "noted" in Echo.heard)


class Echo:
    heard = []  # noqa: RUF012 -- of all

    def echo(self, value):
        self.heard.append(value)
        return value


def test_finalizers_that_call_never_hang(proxy, monkeypatch):
    """They run wherever the collector strikes, also in the midst of reading or writing."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(str(what.exc_value)))

    class Wrapper:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            proxy.hello.notify()
            proxy.hello()

    def work():
        for _ in range(20):
            Wrapper()
            proxy.hello(["x"] * 10)
            proxy.call(lambda: None)

    before = gc.get_threshold()
    gc.set_threshold(7, 2, 2)
    try:
        in_threads(*[work] * 4)
    finally:
        gc.set_threshold(*before)
        gc.collect()  # while the plugin is there: what is collected later would call what is closed
    assert all("would wait for ever" in text for text in told)
    assert proxy.hello() == "hello"


@posix
def test_ctrl_c_in_a_callback_is_the_hosts(proxy):
    with pytest.raises(KeyboardInterrupt):
        proxy.call(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(miniplug.RemoteError):  # in another thread it is something that was raised, and no more
        def fail():
            raise KeyboardInterrupt

        in_threads(lambda: proxy.call(fail))
    assert proxy.hello() == "hello"


# -- full stacks


@pytest.mark.skipif(sys.version_info < (3, 10), reason="an older interpreter ends itself over what handles the error")
def test_a_full_stack_of_the_hosts_is_not_the_plugins_end(proxy):
    pid = proxy.pid()

    def calls(depth):
        proxy.hello()
        calls(depth + 1)

    def streams(depth):
        for _ in proxy.some():
            streams(depth + 1)

    def submits(depth):
        proxy.hello.submit().result(10)
        submits(depth + 1)

    def nests(depth):
        return proxy.call(nests, depth + 1)

    def ended(function):
        """By what it ended. pytest ends itself over a traceback as long as the stack."""
        try:
            return function(0)
        except Exception as error:
            return repr(error.with_traceback(None))

    limit = sys.getrecursionlimit()
    for function in (calls, streams, submits, nests):
        sys.setrecursionlimit(len(inspect.stack(0)) + 300)  # it is full sooner
        try:
            assert ended(function).startswith("RecursionError"), function
        finally:
            sys.setrecursionlimit(limit)
        assert proxy.pid() == pid
    assert in_threads(*[proxy.pid] * 4) == [pid] * 4


# -- forks


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_in_an_async_method_or_generator_does_not_answer_twice(proxy):
    pid = proxy.pid()
    for _ in range(2):
        child = proxy.fork_async()
        assert child and proxy.reap(child) == 0
        child, parent = proxy.fork_generator()
        assert child and parent == pid and proxy.reap(child) == 0
    assert {proxy.pid() for _ in range(20)} == {pid}


# -- no thread to be had


@posix
def test_a_reference_is_given_back_without_a_thread(pair, monkeypatch):  # noqa: F811
    left = []

    class Managed:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            left.append(1)

        def get(self):
            return 1

    both = pair({"managed": Managed, "echo": Echo()})
    managed, echo = both.dispense("managed"), both.dispense("echo")
    start = miniplug._start_thread

    def none(name, *args):
        if name == "miniplug-exit":
            raise RuntimeError("can't start new thread")
        return start(name, *args)

    monkeypatch.setattr(miniplug, "_start_thread", none)
    assert managed.get() == 1
    miniplug.release(managed)
    until(lambda: left)
    assert echo.echo(1) == 1


@posix
def test_the_end_waits_for_what_is_being_exited(pair, monkeypatch):  # noqa: F811
    done = []

    class Managed:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            done.append("exited")

    both = pair({"managed": Managed})
    managed = both.dispense("managed")
    put = miniplug._pool.put

    def close():
        both.references.close()
        done.append("closed")

    closing = threading.Thread(target=close)

    def late(task):
        if task[0] == both.references._exit_parting:
            closing.start()
            closing.join(0.2)
        put(task)

    monkeypatch.setattr(miniplug._pool, "put", late)
    miniplug.release(managed)
    until(lambda: "closed" in done)
    assert done == ["exited", "closed"]


# -- entering takes long


@posix
def test_one_that_is_entered_slowly_holds_up_no_other(pair):  # noqa: F811
    entering, enter = threading.Event(), threading.Event()

    class Slow:
        def __enter__(self):
            entering.set()
            assert enter.wait(20)
            return self

        def __exit__(self, *error):
            pass

        def get(self):
            return "slow"

    class Quick:
        async def get(self):
            return "quick"

    both = pair({"slow": Slow(), "quick": Quick()})

    def quick():
        try:
            assert entering.wait(10)
            return both.dispense("quick").get()
        finally:
            enter.set()

    assert in_threads(lambda: both.dispense("slow").get(), quick) == ["slow", "quick"]


# -- asyncio


def test_a_start_that_is_cancelled_leaves_nothing(path):
    async def main():
        stuck = miniplug.Plugin([sys.executable, "-c", "import time; time.sleep(60)"])
        start = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stuck.astart(), 0.2)
        assert time.monotonic() - start < 10 and stuck.pid is None

        async def use(plugin):
            async with plugin:
                raise AssertionError("it was cancelled before")

        plugin = miniplug.Plugin(path)
        task = asyncio.ensure_future(use(plugin))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert plugin.pid is None
        async with plugin:  # and it can be started again
            task = asyncio.ensure_future(plugin.astart())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert plugin.running  # it ran before: that was nothing to undo

    asyncio.run(main())


# -- odd commands, and odd places to be in


def test_commands_of_every_type(write, tmp_path):
    path = write("plugin.py", f"""
        import sys
        sys.path.append({os.path.dirname(HERE)!r})
        import miniplug
        class P:
            def hello(self): return "hello"
        if __name__ == "__main__":
            miniplug.serve({{"p": P()}})
    """)
    python = os.fsencode(sys.executable)
    for command in (pathlib.Path(path), os.fsencode(path), os.fsencode(path) + b":P", (python, pathlib.Path(path)),
                    [python, os.fsencode(path)]):
        with miniplug.launch(command, cwd=os.fsencode(str(tmp_path)), python=python) as plugin:
            assert plugin.dispense().hello() == "hello"
    for command, words in (("", "there is no such file"), ([], "the command is empty")):
        with pytest.raises(miniplug.LaunchError, match=words):
            miniplug.launch(command)


NAMES = ["ast", "asyncio", "calendar", "concurrent", "datetime", "decimal", "heapq", "hmac", "inspect", "json", "linecache",
         "logging", "numbers", "pathlib", "queue", "select", "string", "subprocess", "token", "traceback", "typing", "weakref"]


def test_plugins_called_like_the_standard_library_harm_nobody(tmp_path):
    """A new file in a folder of plugins is a new plugin, whatever it is called."""
    import datetime
    import decimal

    source = """
class P:
    def name(self): return __name__
    def fail(self): raise ValueError("x")
    async def wait(self): return 1
    def log(self):
        import logging
        logging.getLogger("x").warning("logged")
    def echo(self, value): return value
"""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(source)
    specs = [f"{name}={tmp_path / (name + '.py')}:P" for name in NAMES]
    lines = []
    bootstrap = f"import miniplug; miniplug._run_plugin('miniplug', 'serve', *{specs!r})"
    with miniplug.launch([sys.executable, "-c", bootstrap], env={"PYTHONPATH": os.path.dirname(HERE)},
                         stderr=lines.append) as plugin:
        for name in NAMES:
            proxy = plugin.dispense(name)
            assert proxy.name() == f"_plugin_{name}"
            with pytest.raises(ValueError, match=r"^x$") as caught:
                proxy.fail()
            assert "ValueError: x" in caught.value.remote_traceback
            assert proxy.wait() == 1
            for value in (datetime.datetime(2000, 1, 1), decimal.Decimal("1.5"), pathlib.Path("x")):
                assert proxy.echo(value) == value
            proxy.log()
        assert set(plugin.describe()) == set(NAMES)
    assert len([line for line in lines if "logged" in line]) == len(NAMES)


def test_in_a_zip_file(write, tmp_path):
    """A host that is packed with zipapp, miniplug vendored in it, hands that to its plugins."""
    import shutil

    plugin = write("plugin.py", """
        import miniplug
        class P:
            def hello(self): return "hello from " + miniplug.__name__
        if __name__ == "__main__":
            miniplug.serve({"p": P()})
    """)
    for folder, line in (("plain", "import miniplug"), ("vendored", "from app.vendor import miniplug")):
        place = tmp_path / folder / ("" if folder == "plain" else "app/vendor")
        place.mkdir(parents=True)
        for package in (place, place.parent) if folder == "vendored" else ():
            (package / "__init__.py").write_text("")
        shutil.copy(miniplug.__file__, str(place))
        (tmp_path / folder / "__main__.py").write_text(f"""{line}
for command in ({plugin!r}, {plugin + ":P"!r}):
    with miniplug.launch(command) as plugin:
        print(plugin.dispense().hello())
""")
        zipapp.create_archive(str(tmp_path / folder), str(tmp_path / f"{folder}.pyz"))
        done = subprocess.run([sys.executable, "-I", f"{folder}.pyz"], cwd=str(tmp_path), stdout=subprocess.PIPE, timeout=50,
                              check=True)
        assert done.stdout.decode().splitlines() == ["hello from miniplug"] * 2


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_host_without_streams(write, tmp_path, closed):
    path = write("host.py", f"""
        import sys, miniplug
        with open({str(tmp_path / "out")!r}, "w") as out:
            for word in ("discard", "inherit"):
                with miniplug.launch({WORKSHOP!r}, stdin=word, stdout=word, stderr=word) as plugin:
                    out.write(plugin.dispense().greet(word))
    """)
    subprocess.run(["/bin/sh", "-c", f'"$0" "$1" {closed}', sys.executable, path], timeout=50, check=True,
                   env={**os.environ, "PYTHONPATH": os.path.dirname(HERE)})
    assert (tmp_path / "out").read_text() == "Hello, discard!Hello, inherit!"


def test_a_host_that_has_closed_its_streams(write, tmp_path):
    path = write("host.py", f"""
        import sys, miniplug
        sys.__stdin__.close(), sys.__stdout__.close()
        sys.stdin = sys.stdout = None
        with miniplug.launch({WORKSHOP!r}, stdin="inherit", stdout="inherit") as plugin:
            sys.stderr.write(plugin.dispense().greet("x"))
    """)
    assert run_python(path)[::2] == (0, "Hello, x!")


def test_a_text_file_that_cannot_hold_every_letter(tmp_path):
    with open(str(tmp_path / "out"), "w", encoding="ascii") as out, miniplug.launch(WORKSHOP, stdout=out) as plugin:
        plugin.dispense().say("gr\u00fc\u00df dich")
    assert (tmp_path / "out").read_text(encoding="ascii") == "gr\\xfc\\xdf dich\n"


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-I", "-S"], ["-bb", "-W", "error"], ["-X", "utf8=0"], ["-X", "dev"]])
def test_hosts_and_plugins_with_any_flags(write, flags):
    path = write("host.py", f"""
        import sys
        sys.path.insert(0, {os.path.dirname(HERE)!r})
        import miniplug
        class P:
            def hello(self, name): return "hello " + name
            def fail(self): raise ValueError("x")
            async def later(self): return 1
            def some(self): yield from range(3)
        if __name__ == "__main__" and sys.argv[1:]:
            miniplug.serve({{"p": P()}})
        elif __name__ == "__main__":
            lines = []
            for command in (__file__ + ":P", [sys.executable, *{flags!r}, __file__, "serve"]):
                with miniplug.launch(command, stderr=lines.append) as plugin:
                    proxy = plugin.dispense()
                    assert proxy.hello("gr\\xfc\\xdf \\udc80") == "hello gr\\xfc\\xdf \\udc80" or sys.exit("hello")
                    try:
                        proxy.fail()
                    except ValueError as error:
                        said = str(error)
                    if (said, proxy.later(), list(proxy.some()), lines) != ("x", 1, [0, 1, 2], []):
                        sys.exit(f"{{said, lines}}")
    """)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env.update(LC_ALL="C", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, *flags, path], env=env, capture_output=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
