"""What a signal handler of the host's raises, `Exception` or not, at any moment: it arrives at the caller as itself, and loses,
doubles and breaks nothing. One by one, at known moments; and then some hundreds of times at any (MINIPLUG_STORM: how many)."""

import dis
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
import storm
from conftest import WINDOWS, freeze, run_python, until
from peer import Peer
from test_random_calls import steady
from test_session import pair  # noqa: F401

import miniplug

STRIKES = int(os.environ.get("MINIPLUG_STORM", "150"))
posix = pytest.mark.skipif(WINDOWS, reason="Windows has no signals that interrupt")
ME = os.getpid(), int(getattr(signal, "SIGUSR1", 0))
MUCH = b"m" * 20_000_000


@pytest.fixture
def plugin():
    with miniplug.launch(storm.PROGRAM, stderr="inherit", max_restarts=0) as plugin:
        yield plugin


@pytest.fixture
def service(plugin):
    return plugin.dispense("service")


@pytest.fixture(params=storm.EXCEPTIONS)
def error(request):
    """What the handler of SIGUSR1 raises, whenever that comes."""
    error = storm.EXCEPTIONS[request.param]("struck")

    def handler(number, frame):
        raise error

    before = signal.signal(signal.SIGUSR1, handler)
    yield error
    signal.signal(signal.SIGUSR1, before)


def struck(error, function, pid):
    """Call it with a plugin that has been stopped; strike once the main thread waits in there; and let the plugin go on."""
    def run():
        function()

    def strike():
        until(lambda: storm.waits_in(run))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    freeze(pid)
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        with pytest.raises(type(error)) as caught:
            run()
    finally:
        striker.join()
        freeze(pid, False)
    assert caught.value is error
    forget(error)


def forget(error):
    """An exception holds its frames, and what those do."""
    while error is not None:
        error, context = None, error.with_traceback(None).__context__
        error = context


def settled(left):
    end = time.monotonic() + 10
    while any(left().values()):
        assert time.monotonic() < end, left()
        time.sleep(0.01)


def check_good(plugin, service, pid):
    """The same process, over the same connection, with nothing left of what was given up."""
    assert plugin.running and plugin.pid == pid
    assert service.echo("whole") == "whole"
    assert service.sum(MUCH) == storm.zlib.crc32(MUCH)
    assert list(service.count(200)) == list(range(200))
    assert service.each([1, 2], lambda value: value + 1) == [2, 3]
    settled(service.left)
    storm.gc.collect()
    session, = storm.sessions()
    settled(lambda: storm.still_open(session))
    for call in [service.meet.submit() for _ in range(storm.WORKERS)]:
        assert call.result(20)


def next_after(service, count, timeout=None):
    """What goes on with a stream that never ends, after so many items."""
    stream = service.count.timeout(timeout)(1 << 40)
    assert [next(stream) for _ in range(count)] == list(range(count))
    return lambda: list(stream)


OPERATIONS = {
    "call": lambda plugin, service: lambda: service.echo(1),
    "call with a deadline": lambda plugin, service: lambda: service.echo.timeout(20)(1),
    "call with a tuple": lambda plugin, service: lambda: service.echo((1, b"2")),
    "call that lends": lambda plugin, service: lambda: service.each([1], lambda value: value),
    "result": lambda plugin, service: lambda: service.echo.submit(1).result(20),
    "stream that opens": lambda plugin, service: lambda: service.count(5),
    "stream": lambda plugin, service: next_after(service, 3),
    "stream with a deadline": lambda plugin, service: next_after(service, 3, 20),
    "ping": lambda plugin, service: lambda: plugin.ping(20),
    "describe": lambda plugin, service: plugin.describe,
    "dispense": lambda plugin, service: lambda: plugin.dispense("instance"),
    "much": lambda plugin, service: lambda: service.sum(MUCH),
    "much with a deadline": lambda plugin, service: lambda: service.sum.timeout(20)(MUCH),
    "much that is nested": lambda plugin, service: lambda: service.echo([[{"deep": (MUCH,)}]]),
    "much to notify": lambda plugin, service: lambda: service.sum.notify(MUCH),
    "much text": lambda plugin, service: lambda: service.echo("t" * len(MUCH)),
}


@posix
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_handler_raises(plugin, service, error, operation):
    pid = plugin.pid
    function = OPERATIONS[operation](plugin, service)
    struck(error, function, pid)
    del function
    check_good(plugin, service, pid)


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 70_000, 400_000, 3_000_000])
def test_a_long_answer_that_is_whole_is_not_waited_for(service, size):
    assert all(service.echo.timeout(20)([b"b" * size]) == [b"b" * size] for _ in range(5))


@posix
@pytest.mark.parametrize("timeout", [None, 20])
def test_the_method_itself_signals(plugin, service, error, timeout):
    """It is told that it was given up."""
    pid = plugin.pid
    with pytest.raises(type(error)) as caught:
        service.signal_and_wait.timeout(timeout)(*ME)
    assert caught.value is error
    assert service.noted_numbers() == ([], [])  # it did not wait in vain
    forget(error)
    check_good(plugin, service, pid)


@posix
def test_a_method_signals_before_it_yields(plugin, service, error):
    """What the stream has before is not lost, and another stream is not touched."""
    pid = plugin.pid
    other = service.count(1 << 40)
    assert next(other) == 0
    stream = service.signal_after(70, *ME)
    found = []
    with pytest.raises(type(error)) as caught:
        for item in stream:
            found.append(item)  # noqa: PERF402
    assert caught.value is error and found == list(range(len(found)))
    assert [next(other) for _ in range(300)] == list(range(1, 301))
    stream.close()
    other.close()
    forget(error)
    check_good(plugin, service, pid)


@posix
def test_a_handler_raises_in_a_callback(plugin, service, error):
    """It passes through the plugin's method, and comes home as the one that was raised."""
    def back(value):
        signal.raise_signal(signal.SIGUSR1)

    pid = plugin.pid
    with pytest.raises(type(error)) as caught:
        service.each([1], back)
    assert caught.value is error
    forget(error)
    check_good(plugin, service, pid)


@posix
def test_a_handler_raises_in_a_call_that_a_callback_makes(plugin, service, error):
    def back(value):
        return service.signal_and_wait(*ME)

    pid = plugin.pid
    with pytest.raises(type(error)) as caught:
        service.each([1], back)
    assert caught.value is error
    forget(error)
    check_good(plugin, service, pid)


@posix
@pytest.mark.parametrize("reads", ["main", "other"])
def test_a_handler_raises_while_another_thread_calls(plugin, service, error, reads):
    """The other's call is not touched: neither where the thread that was struck has read for both, nor where that one does."""
    def call():
        until(lambda: reads == "other" or service.inside())
        found.append(service.wait_to_go())

    pid, found = plugin.pid, []
    other = threading.Thread(target=call)
    other.start()
    until(lambda: reads == "main" or service.inside())
    try:
        with pytest.raises(type(error)) as caught:
            service.signal_beside(1, *ME)
    finally:
        service.let_go()
        other.join()
    assert caught.value is error and found == [True]
    forget(error)
    check_good(plugin, service, pid)


# -- a plugin that is gone


@posix
@pytest.mark.parametrize("way", ["call", "deadline", "notify", "submit", "thread", "small", "close", "guardian"])
def test_sigpipe_does_not_end_the_host(write, way):
    """Many programs for the command line have it at its default."""
    path = write("host.py", """
        import os, signal, sys, threading, time
        import miniplug, storm
        from conftest import alive, freeze, until

        MUCH = b"m" * 20_000_000


        def children():
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                return {int(pid) for pid in file.read().split()}


        def told(function):
            try:
                function()
            except miniplug.PluginCrashed as error:
                assert error.signal_name == "SIGKILL", error
                print("told")


        def kill_while(function):
            def run():
                function()

            def kill():
                until(lambda: storm.waits_in(run, caller))
                os.kill(plugin.pid, signal.SIGKILL)

            caller = threading.get_ident()
            freeze(plugin.pid)
            killer = threading.Thread(target=kill)
            killer.start()
            told(run)
            killer.join()


        def small():  # more than is sent at once
            calls = []
            kill_while(lambda: calls.extend(service.echo.submit("x" * 1000) for _ in range(10_000)) or calls[0].result(20))


        def thread():
            running = threading.Thread(target=kill_while, args=(lambda: service.sum(MUCH),))
            running.start()
            running.join()


        def notify():
            kill_while(lambda: (service.sum.notify(MUCH), service.echo(1)))


        def close():
            freeze(plugin.pid)
            os.kill(plugin.pid, signal.SIGKILL)
            plugin.close()
            print("told")


        def guardian():
            others = children() - {plugin.pid}
            assert others or not os.path.exists("/proc/self/task")
            for pid in others:
                os.kill(pid, signal.SIGKILL)
            until(lambda: not any(map(alive, others)))
            with miniplug.launch(storm.PROGRAM) as another:
                assert another.dispense("service").echo(1) == 1
            plugin.restart()
            assert service.echo(2) == 2
            print("told")


        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with miniplug.launch(storm.PROGRAM) as plugin:
            service = plugin.dispense("service")
            {"call": lambda: kill_while(lambda: service.sum(MUCH)),
             "deadline": lambda: kill_while(lambda: service.sum.timeout(20)(MUCH)),
             "submit": lambda: kill_while(lambda: service.sum.submit(MUCH).result(20)),
             "notify": notify, "thread": thread, "small": small, "close": close, "guardian": guardian}[sys.argv[1]]()
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
    """)
    status, out, err = run_python(path, way)
    assert (status, out) == (0, "told\n"), err


# -- at any moment


@pytest.mark.timeout(STRIKES * 0.5 + 60)
@pytest.mark.parametrize("threads", [[], pytest.param(["--threads"], marks=pytest.mark.skipif(
    sys.version_info < (3, 10), reason="there a strike may fall before the first step of a finally"))], ids=["alone", "threads"])
@pytest.mark.parametrize(("how", "what"), [
    pytest.param("timer", "KeyboardInterrupt", marks=posix), pytest.param("timer", "Late", marks=posix),
    ("async", "KeyboardInterrupt"), ("async", "Struck")])
def test_a_storm(how, what, threads):
    done = subprocess.run([sys.executable, storm.__file__, how, what, str(STRIKES), *threads], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout
    assert f"{STRIKES} of" in done.stdout


# -- behind each step


def handler_of(code, offset):
    """Where an exception goes that is raised there."""
    return next((entry.target for entry in dis._parse_exception_table(code) if entry.start <= offset < entry.end), None)


class Striker:
    """A trace function: the `left`-th time that a handler could run in code of miniplug's, it raises. From Python 3.11 on that is
    where a function begins, where a loop goes round, and behind each call."""

    def __init__(self, left):
        self.left = left
        self.where = ""
        self.former = {}

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != miniplug.__file__:
            return None
        if "__del__" in [each.f_code.co_name for each, _ in traceback.walk_stack(frame)]:
            return None  # what is raised there Python prints, and drops
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.step

    def step(self, frame, event, arg):
        if event == "opcode":
            code, offset = frame.f_code, frame.f_lasti
            name = dis.opname[code.co_code[offset]]
            former, last = self.former.get(id(frame), ("", offset))
            self.former[id(frame)] = name, offset
            # this comes one step late: behind the call, where another handler may be
            behind = former.startswith("CALL") and handler_of(code, last) == handler_of(code, offset)
            if behind or name in ("RESUME", "JUMP_BACKWARD"):
                self.left -= 1
                if self.left == 0:
                    self.where = f"{code.co_name}:{frame.f_lineno}"
                    raise KeyboardInterrupt
        elif event == "return":
            self.former.pop(id(frame), None)
        return self.step


def failing(proxy):
    with pytest.raises(KeyError):
        proxy.fail(5)


WAYS = {"plain": lambda proxy: proxy.echo(5), "tagged": lambda proxy: proxy.echo((5, b"5")),
        "deadline": lambda proxy: proxy.echo.timeout(20)(5), "submit": lambda proxy: proxy.echo.submit(5).result(20),
        "callback": lambda proxy: proxy.call(lambda value: value, 5), "lent again": lambda proxy: proxy.call(str, 5),
        "borrowed": lambda proxy: proxy.give(1)[0](5), "notify": lambda proxy: proxy.note.notify(5),
        "stream": lambda proxy: list(proxy.count(40)), "failing": failing}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="before, more steps; later, not each is traced")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", WAYS)
def test_a_strike_behind_each_step_of_a_call(pair, way, monkeypatch):  # noqa: F811
    both, call = pair({"p": Peer()}), WAYS[way]
    proxy = both.dispense("p")
    monkeypatch.setattr(sys, "unraisablehook", lambda what: None)  # some strike in a finalizer

    def left():
        gc.collect()
        return [(storm.still_open(session), storm.holdings(session)) for session in (both.here, both.there)]

    before, expected, number, strikes = steady(left), call(proxy), 0, 1
    while strikes:
        number += 1
        striker = Striker(number)
        sys.settrace(striker)
        try:
            assert call(proxy) == expected
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        strikes = striker.left <= 0
        assert proxy.echo(number) == number, striker.where
        end = time.monotonic() + 10
        while left() != before:
            assert time.monotonic() < end, f"struck in {striker.where}: {left()} of {before}"
            assert proxy.echo(number) == number  # what a finalizer gives back goes with what is sent next
    assert number > 30
