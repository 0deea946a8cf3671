"""Two sessions over one connection: overlap, nesting, deadlines, interruption, the end; and all of it at random."""

import collections
import contextlib
import gc
import os
import random
import signal
import socket
import struct
import sys
import threading
import time

import pytest
import storm
from conftest import WINDOWS, channel_and_end, channels, stream, until

import miniplug

LIMIT = 1 << 24


class Pair:
    """A serving session and one that only calls, each with its objects."""

    def __init__(self, served, others=None, max_workers=64, limit=LIMIT):
        ends = channels()
        terms = miniplug._Terms(1, limit, [])

        def lost(cause):
            return lambda calls: miniplug.PluginCrashed("gone", calls=calls)

        self.served = [miniplug._Served(served), miniplug._Served(others or {})]
        self.there = miniplug._open_session(ends[0], terms, limit, self.served[0], lost, True, miniplug._Slots(max_workers))
        self.here = miniplug._open_session(ends[1], terms, limit, self.served[1], lost, bool(others))
        self.references = self.there.references

    def dispense(self, name, session=None):
        return (session or self.here).call(0, "dispense", (name,), {}, 10)

    def close(self):
        self.here.channel.shutdown()
        for session in (self.here, self.there):
            session.end(EOFError())
            session.dispose()
        for served in self.served:
            served.close()


@pytest.fixture
def pair(request):
    made = []

    def make(*args, **kwargs):
        made.append(Pair(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def in_threads(*functions):
    """Run functions in threads of their own; returns their results, or raises the first exception."""
    results = [None] * len(functions)
    errors = []

    def run(index, function):
        try:
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
        assert not thread.is_alive(), "a call was left waiting"
    if errors:
        raise errors[0]
    return results


def settled(both):
    """Both sessions have forgotten every call."""
    gc.collect()
    until(lambda: not (both.here.calls or both.there.calls or both.here.requests or both.there.requests), 5)
    until(lambda: both.here.reader.unattended | both.there.reader.unattended <= {-1}, 5)
    assert not (both.here.reader.sleepers or both.there.reader.sleepers)


class Meeting:
    """Calls that can only end when so many of them run at once."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count)
        self.lock = threading.Lock()
        self.running = self.most = 0

    def meet(self):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.barrier.wait(20)
        with self.lock:
            self.running -= 1
        return True


def test_calls_overlap(pair):
    """Sixteen calls that wait for each other, twice: also the first time, when nobody knows yet that they are slow."""
    proxy = pair({"m": Meeting(16)}).dispense("m")
    for _ in range(2):
        assert in_threads(*[proxy.meet] * 16) == [True] * 16


@pytest.mark.parametrize("workers", [1, 3])
def test_at_most_max_workers_run_at_once(pair, workers):
    meeting = Meeting(workers)
    proxy = pair({"m": meeting}, max_workers=workers).dispense("m")
    assert in_threads(*[proxy.meet] * (workers * 6)) == [True] * (workers * 6)
    assert meeting.most == workers


def test_more_calls_than_workers_cost_no_thread_each(pair):
    meeting = Meeting(4)
    both = pair({"m": meeting}, max_workers=4)
    proxy = both.dispense("m")
    most = []

    def meet():
        proxy.meet()
        most.append(sum(thread.name == "miniplug-worker" for thread in threading.enumerate()))

    in_threads(*[meet] * 40)
    assert max(most) <= 4 + 2


def test_a_slow_call_holds_up_nobody(pair):
    class Slow:
        def __init__(self):
            self.go = threading.Event()

        def wait(self):
            return self.go.wait(20)

        def quick(self):
            return "quick"

        def release(self):
            self.go.set()

    proxy = pair({"s": Slow()}).dispense("s")
    waiting = threading.Thread(target=proxy.wait)
    waiting.start()
    for _ in range(100):
        assert proxy.quick() == "quick"
    proxy.release()
    waiting.join(10)
    assert not waiting.is_alive()


class Echo:
    def __init__(self):
        self.other = None

    def echo(self, value):
        return value

    def down(self, depth):
        """Call the other side, which calls this one, and so on, to the bottom."""
        return [depth] if not depth else [depth, *self.other.down(depth - 1)]

    def fail(self, depth):
        if not depth:
            raise KeyError("at the bottom")
        self.other.fail(depth - 1)


@pytest.fixture
def both_ways(pair):
    here, there = Echo(), Echo()
    both = pair({"there": there}, {"here": here})
    here.other = both.dispense("there")
    there.other = both.dispense("here", both.there)
    yield here.other
    here.other = there.other = None


def test_calls_nest_both_ways(both_ways):
    assert both_ways.down(60) == list(range(60, -1, -1))
    with pytest.raises(KeyError):
        both_ways.fail(20)


def test_calls_nest_from_many_threads(both_ways):
    for results in in_threads(*[lambda: [both_ways.down(10) for _ in range(20)]] * 8):
        assert results == [list(range(10, -1, -1))] * 20


def test_nesting_needs_no_worker_for_each_level(pair):
    here, there = Echo(), Echo()
    both = pair({"there": there}, {"here": here}, max_workers=1)
    here.other, there.other = both.dispense("there"), both.dispense("here", both.there)
    assert here.other.down(30) == list(range(30, -1, -1))
    here.other = there.other = None


def test_a_late_answer_is_dropped(pair):
    class Late:
        def __init__(self):
            self.go = threading.Event()

        def wait(self):
            self.go.wait(20)
            return "late"

        def release(self):
            self.go.set()

    both = pair({"l": Late()})
    proxy = both.dispense("l")
    with pytest.raises(miniplug.CallTimeout):
        proxy.wait.timeout(0.05)()
    until(lambda: not both.here.calls)
    proxy.release()
    assert both.here.ping(5) > 0
    until(lambda: not both.here.calls and not both.there.requests)


def test_a_deadline_covers_waiting_to_send(pair):
    """The other side does not read: the call still ends in time, and the connection is whole once it reads again."""
    both = pair({"e": Echo()})
    proxy = both.dispense("e")
    go_on, check = threading.Event(), both.there.channel._check_size
    both.there.channel._check_size = lambda *args: check(*args) if go_on.wait(20) else None  # its beginning has come
    start = time.monotonic()
    for size in (3000000, 10, 5000000):
        with pytest.raises(miniplug.CallTimeout):
            proxy.echo.timeout(0.1)("x" * size)
    assert time.monotonic() - start < 5
    go_on.set()
    assert proxy.echo("after") == "after"


def test_a_deadline_that_passes_leaves_nothing_to_the_collector(pair):
    """A frame that is kept would keep the right to read with it, should a signal handler have struck there."""
    go_on = threading.Event()
    proxy = pair({"event": go_on}).dispense("event")
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with contextlib.suppress(miniplug.CallTimeout):
                proxy.wait.timeout(0.01)()
        assert not [each for each in gc.get_objects() if type(each) is miniplug._Late]
    finally:
        gc.enable()
        go_on.set()


@pytest.mark.parametrize("ticks", [True, False])
def test_a_deadline_that_is_more_than_a_second_away_passes_in_time(pair, ticks):
    """Also where a read cannot be made to end by itself, and while it is this one that reads."""
    class Slow:
        def wait(self):
            return go_on.wait(20)

    go_on = threading.Event()
    both = pair({"s": Slow()})
    assert not both.here.channel._ticks and not both.there.channel._ticks  # for the handshake no idle plugin wakes each second
    if not ticks:
        both.here.channel._tick = lambda: os.rmdir("")  # an OSError
    start = time.monotonic()
    try:
        with pytest.raises(miniplug.CallTimeout):
            both.dispense("s").wait.timeout(1.3)()
        assert 1.3 <= time.monotonic() - start < 2.3
    finally:
        go_on.set()


@pytest.mark.skipif(WINDOWS, reason="a message of a pipe goes whole")
def test_a_small_call_of_which_only_a_part_goes_at_once_is_finished_behind_its_caller(pair):
    both = pair({"e": Echo()})
    proxy, send = both.dispense("e"), both.here.channel._send

    def send_a_part(data, *flags):
        both.here.channel._send = send
        return send(data[:10], *flags)

    both.here.channel._send = send_a_part
    call = threading.Thread(target=proxy.echo, args=("hello",), daemon=True)
    call.start()
    call.join(20)
    assert not call.is_alive()


@pytest.mark.skipif(WINDOWS, reason="there a handle that is closed ends what is under way with it")
@pytest.mark.parametrize("instead", ["nothing", "a file", "a socket"])
def test_a_number_that_is_closed_beneath_who_reads(pair, instead):
    """The connection ends all the same; and what has the number then is neither shut down nor closed."""
    class Closer:
        def close_beneath(self):
            until(lambda: storm.waits_in(miniplug._Channel.receive, both.there.reader.seat.holder()))
            if instead == "nothing":
                os.close(number)
            else:
                os.dup2((file if instead == "a file" else other).fileno(), number)

    both = pair({"e": Closer()})
    proxy, channel = both.dispense("e"), both.there.channel
    number = channel.sock.fileno()
    other, end = socket.socketpair()
    with other, end, open(os.devnull, "rb") as file:
        if instead == "a socket":  # to it the answer goes
            proxy.close_beneath.notify()
            until(lambda: os.path.sameopenfile(other.fileno(), number))
        else:
            with pytest.raises(miniplug.PluginCrashed):
                proxy.close_beneath.timeout(10)()
        both.close()
        until(lambda: channel.sock.fileno() == -1)
        if instead == "a socket":
            assert end.send(b"x") == 1 and os.read(number, 1) == b"x"
        if instead != "nothing":
            os.close(number)


def test_large_values_both_ways_at_once(pair):
    """Neither side reads while it writes, unless somebody else does."""
    proxy = pair({"e": Echo()}).dispense("e")
    big = bytes(range(256)) * 20000
    text = "ä" * 3000000

    def echo(value):
        for _ in range(3):
            assert proxy.echo(value) == value
        return True

    assert in_threads(*[lambda: echo(big), lambda: echo(text), lambda: echo([big, text, 5])] * 2) == [True] * 6


def test_the_end_fails_what_waits_and_what_comes_later(pair):
    class Forever:
        def __init__(self):
            self.entered = threading.Event()

        def wait(self):
            self.entered.set()
            deadline = time.monotonic() + 20
            while not miniplug.cancelled() and time.monotonic() < deadline:
                time.sleep(0.001)
            return miniplug.cancelled()

    forever = Forever()
    both = pair({"f": forever})
    proxy = both.dispense("f")
    caught = []

    def wait():
        with pytest.raises(miniplug.PluginCrashed) as error:
            proxy.wait()
        caught.append(error.value)

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert forever.entered.wait(10)
    both.there.channel.shutdown()
    for thread in threads:
        thread.join(10)
    assert len(set(map(id, caught))) == 5 and all(error.calls for error in caught)
    with pytest.raises(miniplug.DeadReference):
        proxy.wait()
    assert both.there.finished.acquire(True, 5)


def test_after_stop_nothing_new_is_taken(pair):
    both = pair({"e": Echo()})
    proxy = both.dispense("e")
    both.here.post(miniplug._SHUTDOWN, 0, 0.5)
    assert both.there.finished.acquire(True, 5) and both.there.closing == 0.5
    with pytest.raises(miniplug.PluginClosed, match="shutting down"):
        proxy.echo(1)


def test_a_thread_that_cannot_start_fails_its_call(pair, monkeypatch):
    class Slow:
        def __init__(self):
            self.go = threading.Event()

        def wait(self):
            return self.go.wait(20)

        def release(self):
            self.go.set()

    slow = Slow()
    both = pair({"s": slow}, {"s": slow})
    message = (miniplug._CALL, 0, 7, 0, b'[0,"listMethods",[],{}]', ())
    sent = []
    monkeypatch.setattr(both.here.channel, "send", lambda *args, **kwargs: sent.append(args))
    monkeypatch.setattr(miniplug, "_pool", miniplug._Pool())

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    slots, come = len(both.here.runner.slots.free), collections.deque([message])
    both.here.reader._route_call(come, message, message[2], message[3], False)
    assert sent[0][0] == miniplug._ERROR and b"can't start new thread" in sent[0][3][0]
    assert len(both.here.runner.slots.free) == slots and not come and not both.here.requests


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
def test_ctrl_c_at_any_moment_leaves_the_connection_whole(pair):
    """A signal handler that raises strikes the calling thread at random moments; no answer is lost or mixed up."""

    class Interrupt(BaseException):
        pass

    def handler(number, frame):
        if armed[0]:
            armed[0] = False
            raise Interrupt

    armed = [False]
    proxy = pair({"e": Echo()}).dispense("e")
    rng = random.Random(1)
    big = "y" * 200000
    others = threading.Thread(target=lambda: [proxy.echo(-number) for number in range(3000)])
    over = threading.Event()

    def strike():
        while not over.wait(rng.uniform(0.00001, 0.002)):
            signal.raise_signal(signal.SIGINT) if WINDOWS else signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    striker = threading.Thread(target=strike)
    signal.set_wakeup_fd(-1)  # on Windows asyncio may have left one
    before = signal.signal(signal.SIGINT if WINDOWS else signal.SIGUSR1, handler)
    others.start()
    striker.start()
    struck = 0
    try:
        for number in range(400):
            try:
                armed[0] = True
                while armed[0]:
                    assert proxy.echo(number) == number
                    if number % 10 == 0:
                        assert proxy.echo([big, number, b"z" * 5000]) == [big, number, b"z" * 5000]
            except Interrupt:
                struck += 1
    finally:
        armed[0] = False
        over.set()
        striker.join()
        signal.signal(signal.SIGINT if WINDOWS else signal.SIGUSR1, before)
    others.join(30)
    assert not others.is_alive()
    assert struck > 300
    assert proxy.echo("whole") == "whole"


def test_at_random(pair):
    """Calls of every size, nesting, deadlines and failures from many threads at once, each answer checked."""
    here, there = Echo(), Echo()
    both = pair({"there": there}, {"here": here}, max_workers=5)
    here.other, there.other = both.dispense("there"), both.dispense("here", both.there)
    proxy = here.other
    seed = random.randrange(1 << 30)
    print("seed", seed)

    def work(number):
        rng = random.Random(seed + number)
        for step in range(60):
            kind = rng.randrange(6)
            if kind == 0:
                depth = rng.randrange(6)
                assert proxy.down(depth) == list(range(depth, -1, -1))
            elif kind == 1:
                value = [number, step, "x" * rng.choice([0, 10, 70000, 300000])]
                assert proxy.echo(value) == value
            elif kind == 2:
                value = bytes([step]) * rng.choice([0, 100, 3000, 100000])
                assert proxy.echo({"a": [value, (value,)]}) == {"a": [value, (value,)]}
            elif kind == 3:
                with pytest.raises(KeyError):
                    proxy.fail(rng.randrange(4))
            elif kind == 4:
                try:
                    assert proxy.echo.timeout(rng.choice([0.0, 0.0005, 5]))(step) == step
                except miniplug.CallTimeout:
                    pass
            else:
                assert both.here.ping(20) >= 0
        return True

    assert in_threads(*[lambda number=number: work(number) for number in range(12)]) == [True] * 12
    until(lambda: not both.here.calls and not both.there.calls, 5)
    here.other = there.other = None


def test_deep_recursion_of_threads_is_bounded(both_ways):
    both_ways.down(40)
    workers = [thread for thread in threading.enumerate() if thread.name == "miniplug-worker"]
    assert len(workers) < 12


# -- frames that no session sends


def raw(session_side_limit=LIMIT):
    """A calling session, and the other side's end of the connection, to be fed by hand."""
    channel, theirs = channel_and_end()
    session = miniplug._open_session(channel, miniplug._Terms(1, LIMIT, []), session_side_limit,
                                miniplug._Served({}), lambda cause: lambda calls: miniplug.ProtocolError(str(cause)))
    return session, theirs


def frame(kind, body=b"", *, version=1, flags=0, count=0, number=1, parent=0):
    data = struct.pack("!BBHIQQ", version, kind, flags, count, number, parent) + body
    return struct.pack("!i", len(data)) + data


@pytest.mark.parametrize("sent", [
    *[pytest.param(sent, marks=stream) for sent in (
        b"\xff\xff\xff\xf9", struct.pack("!i", 0x7FFFFFFF), struct.pack("!iQ", -1, 1 << 40), frame(3, b"1")[:-1])],
    struct.pack("!i", 3) + b"abc",
    struct.pack("!i", 0),
    frame(3, version=9),
    frame(99),
    frame(3, b"{"),
    frame(3, b"NaN"),
    frame(3, b"\xff\xfe"),
    frame(3, b"1 2"),
    frame(3, b"[" * 100000 + b"]" * 100000),
    frame(3, b'{"$nothing":1}', flags=1),
    frame(3, b'{"$bytes":7}', flags=1),
    frame(3, b'{"$bytes":-1}', flags=1),
    frame(3, b'{"$uuid":7}', flags=1),
    frame(3, b'{"$ref":["x",[]]}', flags=1),
    frame(3, b"1", count=1 << 20),
    frame(1, b"{}", number=5),
    frame(1, b'[0,7,[],{}]', number=5),
])
def test_malformed_frames_cost_the_connection_and_no_more(sent):
    session, theirs = raw()
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(miniplug.ProtocolError):
        session.call(0, "x", (), {}, 10)
    assert not session.calls
    session.dispose()
    theirs.close()


def test_what_may_be_ignored_is():
    session, theirs = raw()
    theirs.sendall(frame(99, b"1", flags=2) + frame(3, b'"nobody asked"', number=12345) + frame(8, number=9)
                   + frame(9, number=77) + frame(3, b' \t["answer"]\n ', number=1))
    assert session.call(0, "x", (), {}, 10) == ["answer"]
    session.end(EOFError())
    session.dispose()
    theirs.close()


def test_a_callback_of_a_cancelled_call_finds_its_worker_free(pair):
    class Patient:
        def wait(self):
            while not miniplug.cancelled():
                time.sleep(0.001)

        def get(self):
            return 1

    proxy, found = pair({"p": Patient()}, max_workers=1).dispense("p"), []
    call = proxy.wait.submit()
    call.add_done_callback(lambda call: found.append(proxy.get.timeout(10)()))
    assert call.cancel() and found == [1]


def test_a_submit_while_another_thread_imports_asyncio(pair, monkeypatch):
    proxy = pair({"e": Echo()}).dispense("e")
    monkeypatch.setitem(sys.modules, "asyncio", type(sys)("asyncio"))  # as it is when that has just begun
    call = proxy.echo.submit(5)
    monkeypatch.undo()
    assert call.result(10) == 5


def test_an_answer_to_no_call_is_ignored_by_who_attends():
    session, theirs = raw()
    session.keep_reading()
    with theirs.makefile("rb") as read:
        theirs.sendall(frame(3, b"1", number=0) + frame(10, number=5))
        assert read.read(28)[5] == 11  # a pong
        assert session.ended is None
    session.end(EOFError())
    session.dispose()
    theirs.close()


@pytest.mark.parametrize("body", [b"", b"7", b"{}", b'{"message":3,"type":[],"kind":{},"args":5,"state":7}',
                                  b'{"own":true,"type":"PluginError","state":{"args":1,"__class__":2,"with_traceback":3}}',
                                  b'{"own":true,"type":"serve"}', b'{"own":true,"type":"RemoteError"}',
                                  b'{"kind":"ValueError","args":[1],"state":{"__class__":"x","__dict__":1,"__traceback__":3}}',
                                  b'{"kind":"OSError","args":[1,"x"],"state":{"errno":"x"}}',
                                  b'{"kind":"UnicodeDecodeError","args":[1,"x"],"state":{}}'])
def test_malformed_errors_are_errors_all_the_same(body):
    session, theirs = raw()
    theirs.sendall(frame(4, body))
    with pytest.raises(miniplug.PluginError):
        session.call(0, "x", (), {}, 10)
    session.end(EOFError())
    session.dispose()
    theirs.close()


@stream
def test_a_byte_at_a_time():
    session, theirs = raw()
    message = frame(3, b'{"$bytes":0}', flags=1, count=1) + struct.pack("!i", 5000) + b"b" * 5000

    def feed():
        for index in range(0, len(message), 1 if len(message) - 5000 > 0 else 100):
            theirs.sendall(message[index : index + 1])

    thread = threading.Thread(target=feed)
    thread.start()
    assert session.call(0, "x", (), {}, 20) == b"b" * 5000
    thread.join()
    session.end(EOFError())
    session.dispose()
    theirs.close()


@stream
def test_long_lengths_are_understood():
    session, theirs = raw()
    data = struct.pack("!BBHIQQ", 1, 3, 0, 0, 1, 0) + b'"long"'
    theirs.sendall(struct.pack("!iQ", -1, len(data)) + data)
    assert session.call(0, "x", (), {}, 10) == "long"
    session.end(EOFError())
    session.dispose()
    theirs.close()


@stream
def test_a_deadline_in_the_middle_of_a_message_keeps_its_place():
    session, theirs = raw()
    first = frame(3, b'{"$bytes":0}', flags=1, count=1, number=1)
    theirs.sendall(first + struct.pack("!i", 300000) + b"q" * 1000)
    with pytest.raises(miniplug.CallTimeout):
        session.call(0, "x", (), {}, 0.05)
    thread = threading.Thread(target=lambda: theirs.sendall(b"q" * 299000 + frame(3, b"2", number=2)))
    thread.start()
    assert session.call(0, "x", (), {}, 10) == 2
    thread.join()
    session.end(EOFError())
    session.dispose()
    theirs.close()


def test_gil_switching_finds_no_race(pair):
    """The same again with the interpreter switching threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        test_at_random(pair)
    finally:
        sys.setswitchinterval(before)


def test_an_end_between_a_frame_that_is_no_answer_and_the_waiting_for_one(pair, monkeypatch):
    """The call is counted among the open ones only after the session has ended, and failed all of those."""
    class Caller:
        def greet(self):
            both.there.post(miniplug._PING, 0)  # comes before the answer
            over.wait(20)

    over = threading.Event()
    both = pair({"caller": Caller()})
    proxy = both.dispense("caller")

    class Late(miniplug._Call):
        def __init__(self, *args):
            both.here.end(EOFError())
            super().__init__(*args)

    monkeypatch.setattr(miniplug, "_Call", Late)

    def greet():
        with pytest.raises((miniplug.PluginCrashed, miniplug.DeadReference)):  # the latter where a pipe sends no call this way
            proxy.greet()

    try:
        in_threads(greet)
    finally:
        over.set()


# -- what is left of a call, and of a thread


def test_a_call_that_is_given_up_does_not_sleep(pair):
    """A second interrupt has struck before it was taken out."""
    here = pair({"e": Echo()}).here
    call = miniplug._Call(77, "echo", None)
    here.reader.sleepers[77] = call
    here.caller.give_up(call)
    assert not here.reader.sleepers


@pytest.mark.parametrize("when", ["before it looks", "after it has looked"])
def test_an_end_while_a_call_is_submitted(pair, monkeypatch, when):
    """What was not sent goes elsewhere, and is not failed as one that was lost; what would be sent is failed."""
    class Calls(dict):
        def __setitem__(self, number, call):
            super().__setitem__(number, call)
            if when == "before it looks":
                here.end(EOFError())

    class Looks:
        def __bool__(self):
            here.sealed = False
            here.end(EOFError())
            return False

    here = pair({"e": Echo()}).here
    here.caller._calls = here.calls = Calls()
    if when == "after it has looked":
        here.sealed = Looks()
    call, tasks = miniplug.Call(), []
    monkeypatch.setattr(miniplug._pool, "put", tasks.append)
    if when == "before it looks":
        with pytest.raises(miniplug._Sealed):
            here.caller.submit(call, 0, "listMethods", (), {}, None)
    else:
        here.caller.submit(call, 0, "listMethods", (), {}, None)
    assert (call._settle in [task[0] for task in tasks]) == (when != "before it looks")
    monkeypatch.undo()


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="only CPython raises in other threads")
def test_what_is_raised_into_a_thread_of_the_pool_does_not_end_it(pair, capfd):
    import ctypes

    proxy = pair({"e": Echo()}).dispense("e")
    for _ in range(3):
        for thread in threading.enumerate():
            frame = sys._current_frames().get(thread.ident)
            if thread.name == "miniplug-worker" and frame is not None and frame.f_code.co_name in ("_waits", "_next"):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(ValueError))
        done = [miniplug._in_pool(lambda number=number: number) for number in range(5)]
        assert done == list(range(5))
    assert proxy.echo.submit("still").result(10) == "still"


def test_to_mend_a_seat_takes_it_from_nobody():
    """Whoever has just given it back may look lost, while another takes it."""
    seat, over, inside = miniplug._Seat(), threading.Event(), []

    def take():
        for _ in range(20000):
            mine = [threading.get_ident()]
            if seat.setdefault(0, mine) is mine:
                inside.append(mine)
                assert inside == [mine] and seat.get(0) is mine
                inside.pop()
                del seat[0]
            del mine
        return True

    def mend():
        while not over.is_set():
            seat.mend()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    mender = threading.Thread(target=mend)
    try:
        mender.start()
        assert in_threads(take, take, take) == [True] * 3
    finally:
        over.set()
        mender.join()
        sys.setswitchinterval(before)
    seat.setdefault(0, [1])  # nothing else refers to that
    assert seat.holder() == 0
    seat.mend()
    assert not seat


@pytest.mark.timeout(30)
def test_an_answer_is_not_lost_that_comes_as_who_waits_looks(pair):
    """It was taken for the call that had been there, run and dropped: threads switched all the time, once in minutes."""
    class Inbox(list):
        def __len__(self):  # what bool() asks
            found = super().__len__()
            self.extend([late.pop()] if late else [])
            return found

    here = pair({"e": Echo()}).here
    call, answer = miniplug._Call(5, "echo", 1.0), (3, 0, 5, 0, b"1", ())
    late, call.inbox = [answer], Inbox()
    here.reader.wait(call)
    assert list(call.inbox) == [answer]


@pytest.mark.timeout(30)
def test_a_stream_may_be_closed_as_who_waits_for_it_looks(pair):
    class Inbox(list):
        def __getitem__(self, place):
            here.caller.give_up(call)  # as stream.close() in another thread
            return super().__getitem__(place)

        def __len__(self):
            found = super().__len__()
            self.extend([late.pop()] if late else [])
            return found

    here = pair({"e": Echo()}).here
    call = miniplug._Call(5, "echo", 1.0)
    late, call.streams, call.inbox = [(1, 0, 7, 5, b"", ())], True, Inbox()  # a call on its behalf
    assert list(miniplug.Stream(here, call)) == []


def test_an_answer_is_not_lost_if_who_waits_is_quicker_than_who_reads(pair):
    """The one who waits takes the call out as soon as the answer is there, the reader does it right behind that."""
    class Calls(dict):
        def pop(self, number, *default):
            dict.pop(self, number)  # who waits was quicker
            return dict.pop(self, number, *default)

    here = pair({"e": Echo()}).here
    call, answer = miniplug._Call(5, "echo", None), (3, 0, 5, 0, b"1", ())
    here.reader._calls, come = Calls({5: call}), collections.deque((answer,))
    here.reader._route_answer(come, answer, False)
    assert list(call.inbox) == [answer] and not come and not here.reader._calls
    here.reader._calls, come = Calls({5: call}), collections.deque((answer,))
    here.caller.give_up(call)
    here.reader._route_answer(come, answer, False)
    assert answer not in call.inbox
