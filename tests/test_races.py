"""Two looks at what threads share, between which another one acts. Each test has the other act at exactly that moment."""

import asyncio
import collections
import functools
import gc
import queue
import threading
import time
import weakref

import pytest
from conftest import until
from test_session import pair  # noqa: F401

import miniplug

pytestmark = pytest.mark.timeout(60)


class Looks(list):
    """An inbox at which something happens right after the look, or before the step, that is named."""

    def __init__(self, content, happens, *steps):
        super().__init__(content)
        self.happens, self.steps = happens, steps

    def _act(self, step):
        if step in self.steps:
            self.steps = ()
            self.happens()

    def __len__(self):
        found = super().__len__()
        self._act("len")
        return found

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self._act("getitem")
        return found

    def extend(self, what):
        self._act("extend")
        super().extend(what)

    def pop(self, place):
        found = super().pop(place)
        self._act("pop")
        return found


class Each(miniplug._Call):
    """A call of which an attribute is something else at each look."""

    def __init__(self, **looks):
        super().__init__(5, "echo", None)
        self._looks = {name: list(values) for name, values in looks.items()}

    def __getattribute__(self, name):
        looks = object.__getattribute__(self, "__dict__").get("_looks", {})
        if looks.get(name):
            return looks[name].pop(0)
        return object.__getattribute__(self, name)


class Echo:
    def echo(self, value=None):
        return value


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


# -- callbacks of a stream


def test_a_generator_calls_back_before_its_stream_is_read(pair):  # noqa: F811
    """That went to the thread that had opened the stream, as if it waited, and then counted as an item: the end."""
    class Calls:
        def count(self, back):
            go.wait(10)
            for number in range(3):
                yield back(number)

    def back(number):
        called.set()
        return number

    go, called = threading.Event(), threading.Event()
    stream = pair({"c": Calls()}).dispense("c").count(back)
    go.set()
    assert called.wait(10)
    assert list(stream) == [0, 1, 2]


def test_a_generator_calls_back_just_as_its_stream_is_opened(pair):  # noqa: F811
    class Calls:
        def count(self, back):
            yield back(1)

    both = pair({"c": Calls()})
    route, decode = both.here.reader._route_call, both.here.decode
    come = threading.Event()

    def late(*what):
        come.set()
        return route(*what)

    def wait(inbox, safely=False):
        opens = inbox[0][1] & 4
        value = decode(inbox, safely)
        if opens:  # the stream: another thread reads meanwhile
            both.here.keep_reading()
            assert come.wait(10)
            until(lambda: not both.here.channel.state[0], 10)
        return value

    both.here.reader._route_call, both.here.decode = late, wait
    assert list(both.dispense("c").count(lambda number: number)) == [1]


def test_a_callback_comes_as_the_one_who_waited_goes_with_an_item(pair):  # noqa: F811
    here = pair({"e": Echo()}).here
    call = miniplug._Call(5, "count", None)
    call.inbox = Looks((), lambda: setattr(call, "home", False), "len")
    here.calls[5], message = call, (1, 0, 77, 5, b'[0,"info",[],{}]', ())
    come = collections.deque((message,))
    assert here.reader._route_call(come, message, 77, 5, False) is None
    assert list(call.inbox) == [] and not come
    until(lambda: not here.requests, 10)  # the pool has run it


@pytest.mark.timeout(30)
def test_a_callback_reads_the_stream_for_which_it_runs(pair):  # noqa: F811
    """It waited for the lock that its own thread had."""
    class Calls:
        def count(self, back):
            go.wait(10)
            back()
            yield 1

    def back():
        try:
            next(streams[0])
        except BaseException as error:
            raised.append(error)

    go, streams, raised = threading.Event(), [], []
    both = pair({"c": Calls()})
    streams.append(both.dispense("c").count(back))
    wait = both.here.reader.wait
    both.here.reader.wait = lambda call: (go.set(), wait(call))[1]  # it is this thread that runs it
    assert list(streams[0]) == [1]
    assert [type(error) for error in raised] == [RuntimeError]


# -- a stream, closed by another thread


def test_a_stream_is_closed_as_an_item_is_taken(pair):  # noqa: F811
    """What was decoded was not the item, but that it had been closed: the connection was ended for it."""
    here = pair({"e": Echo()}).here
    call = miniplug._Call(5, "count", None)
    call.streams, call.inbox = True, Looks([(5, 0, 5, 0, b"[1]", ())], lambda: here.caller.give_up(call), "getitem")
    assert list(miniplug.Stream(here, call)) in ([], [1])
    assert here.ended is None


@pytest.mark.parametrize("kind", [1, 3, 5])
def test_a_call_is_given_up_just_as_something_comes_about_it(pair, kind):  # noqa: F811
    """It was neither read nor dropped: a call that was never answered, references that were never given back."""
    here = pair({"e": Echo()}).here
    call, dropped = miniplug._Call(5, "echo", None), []
    call.inbox, here.drop = Looks((), lambda: here.caller.give_up(call), "extend"), dropped.append
    here.calls[5], message = call, (kind, 0, 77 if kind == 1 else 5, 5 if kind == 1 else 0, b"1", ())
    come = collections.deque((message,))
    if kind == 1:
        here.reader._route_call(come, message, 77, 5, False)
    else:
        here.reader._route_answer(come, message, False)
    assert dropped == [message] and not come
    assert [each[0] for each in call.inbox] == [6]  # that it is closed


def test_a_thread_takes_the_end_of_a_stream_that_a_task_reads_too(pair):  # noqa: F811
    """The task had been woken before, found nothing yet, and slept on for ever."""
    here = pair({"e": Echo()}).here
    ready, found, threads = threading.Event(), [], []

    def read():
        async def main():
            asyncio.get_running_loop().call_soon(ready.set)  # once this task sleeps
            found.append([item async for item in stream])

        asyncio.run(main())

    def begin():
        threads.append(in_thread(read))
        assert ready.wait(10)

    call = miniplug._Call(5, "count", None)
    call.streams = True
    stream = miniplug.Stream(here, call)
    call.inbox = Looks([(6, 0, 5, 0, b"", ())], begin, "pop")
    assert list(stream) == []
    threads[0].join(10)
    assert found == [[]]


def test_an_item_comes_just_as_its_deadline_passes_for_a_task(pair, monkeypatch):  # noqa: F811
    async def late(waits, seconds):
        waits.close()
        call.inbox.extend([(5, 0, 5, 0, b"[1]", ()), (6, 0, 5, 0, b"", ())])
        raise asyncio.TimeoutError

    async def main():
        return [item async for item in stream]

    monkeypatch.setattr(asyncio, "wait_for", late)
    here = pair({"e": Echo()}).here
    call = miniplug._Call(5, "count", 1.0)
    call.streams = True
    stream = miniplug.Stream(here, call)
    assert asyncio.run(main()) == [1]


def test_a_task_leaves_a_stream_as_that_of_another_loop_begins_to_wait(pair):  # noqa: F811
    """With it went the wish that somebody reads."""
    class Queue(Echo):
        def items(self):
            yield from iter(items.get, None)

    class Waiters(list):
        leaving = False

        def remove(self, waiter):
            super().remove(waiter)
            self.leaving = True

        def __len__(self):
            count = super().__len__()
            if self.leaving and not count:
                begin()
            return count

    async def first():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.1)

    def read():
        async def main():
            asyncio.get_running_loop().call_soon(ready.set)  # once this task sleeps
            found.append(await stream.__anext__())

        asyncio.run(main())

    def begin():
        if not threads:
            threads.append(in_thread(read))
            assert ready.wait(10)

    items, threads, found, ready = queue.Queue(), [], [], threading.Event()
    both = pair({"q": Queue()})
    proxy = both.dispense("q")
    stream = proxy.items()
    stream._waiters = Waiters()
    stream._call.watcher = functools.partial(miniplug._wake, stream._waiters)
    asyncio.run(first())
    begin()
    assert proxy.echo(1) == 1  # at which the attendant goes, unless somebody wants it
    until(lambda: both.here.reader.unattended or not both.here.reader.seat, 10)
    items.put(7)
    threads[0].join(10)
    items.put(None)
    assert found == [7] and list(stream) == []


def test_an_async_generator_that_is_woken_twice_can_be_closed(pair):  # noqa: F811
    """The task that was cancelled was the second one, which had nothing to do."""
    closed, begun = threading.Event(), threading.Event()

    class Waits:
        async def items(self):
            try:
                begun.set()
                await asyncio.Event().wait()
                yield 1
            finally:
                closed.set()

    both = pair({"w": Waits()})
    once = both.there.runner.run_as_task

    def twice(*what):
        once(*what)
        once(*what)

    both.there.runner.run_as_task = twice
    stream = both.dispense("w").items()
    assert begun.wait(10)
    passed = threading.Event()
    both.there.references.on_loop(lambda: asyncio.get_running_loop().call_soon(passed.set))
    assert passed.wait(10)
    stream.close()
    assert closed.wait(10)
    until(lambda: not both.there.requests, 10)


def test_who_comes_second_to_an_iterator_does_not_ask_it_again(pair):  # noqa: F811
    class Once:
        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            raise KeyError

    class Turn:
        comes = True

        def __init__(self):
            self.lock = threading.Lock()
            self.release = self.lock.release

        def acquire(self, wait):
            if self.comes:
                self.comes = False
                producer.go_on()  # the first one, to the end
            return self.lock.acquire(wait)

    there = pair({"e": Echo()}).there
    request = miniplug._Request(there, (1, 0, 77, 0, b"", ()))
    producer = miniplug._Producer(request, Once())
    producer._turn = Turn()
    producer.go_on()
    assert producer._iterator.asked == 1


# -- submitted calls


def test_an_answer_comes_just_as_a_deadline_passes(pair):  # noqa: F811
    """Then none of the other calls met its own."""
    here = pair({"e": Echo()}).here
    calls = [miniplug._Call(number, "echo", 0.0) for number in (5, 6)]
    futures = [miniplug.Call() for _ in calls]
    for call, future in zip(calls, futures):
        call.future, here.calls[call.number] = future, call

    def give_up(call):
        call.future = None  # as it has been settled

    here.caller.give_up = give_up
    here.caller._expire()
    for future in futures:
        assert isinstance(future.exception(0), miniplug.CallTimeout)


def test_an_answer_comes_just_as_the_connection_ends(pair):  # noqa: F811
    """Then no other call was told."""
    both = pair({"e": Echo()})
    first, second = Each(future=[miniplug.Call(), None]), miniplug._Call(6, "echo", None)
    first.session = both.here
    both.here.calls.update({5: first, 6: second})
    both.here.end(EOFError())
    assert list(second.inbox) == [miniplug._ENDED]


def test_an_answer_and_the_end_are_settled_at_once(pair):  # noqa: F811
    """The answer was None."""
    here = pair({"e": Echo()}).here
    call, future = miniplug._Call(5, "echo", None), miniplug.Call()
    call.session, call.future = here, future
    call.inbox = Looks((), lambda: call.inbox.insert(0, miniplug._ENDED), "getitem")
    future._settle(call, (3, 0, 5, 0, b'"hello"', ()))
    assert future.result(0) == "hello"


def test_an_answer_is_settled_as_its_call_is_given_up(pair, monkeypatch):  # noqa: F811
    """References in it were never given back."""
    here = pair({"e": Echo()}).here
    call, future, decoded = miniplug._Call(5, "echo", None), miniplug.Call(), []
    decode = here.decode
    call.session, call.future = here, future

    class Inbox(list):
        def insert(self, place, message):
            here.caller.give_up(call)
            super().insert(place, message)

    call.inbox, answer = Inbox(), (3, 0, 5, 0, b'"hello"', ())
    monkeypatch.setattr(here, "decode", lambda inbox, *safely: (decoded.append(inbox[0]), decode(inbox, *safely))[1])
    future._settle(call, answer)
    assert answer in decoded


def test_a_deadline_passes_just_before_a_call_is_sent(pair):  # noqa: F811
    """It was cancelled at the plugin before it came there, and what it lent was gone."""
    done, found = threading.Event(), []

    class Waits:
        def wait(self, back):
            try:
                found.append(back(1))
                until(miniplug.cancelled, 10)
                found.append("cancelled")
            finally:
                done.set()

    both = pair({"w": Waits()})
    proxy, send = both.dispense("w"), both.here.channel.send

    def late(kind, flags, number, *others):
        if kind == 1:
            both.here.caller.give_up(both.here.calls[number])
        send(kind, flags, number, *others)

    both.here.channel.send = late
    proxy.wait.submit(lambda number: number)
    del both.here.channel.send
    assert done.wait(20) and found == [1, "cancelled"]


def test_a_handler_raises_as_a_deadline_is_set(pair, monkeypatch):  # noqa: F811
    """From then on no later one was."""
    here, alarms = pair({"e": Echo()}).here, []

    def alarm(when, function):
        alarms.append(when)
        if len(alarms) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(miniplug._pool, "alarm", alarm)
    soon = time.monotonic() + 100
    with pytest.raises(KeyboardInterrupt):
        here.caller._ring(soon)
    here.caller._ring(soon + 1)
    assert alarms == [soon, soon + 1]


def test_a_far_deadline_keeps_no_session_that_is_gone():
    with miniplug.local({"e": Echo()}):  # another one
        plugin = miniplug.local({"e": Echo()}).start()
        session = weakref.ref(plugin._supervisor.open)
        assert plugin.dispense("e").echo.timeout(3600).submit(1).result(10) == 1
        plugin.close()
        del plugin
        until(lambda: (gc.collect(), session())[1] is None, 10)


# -- event loops that are closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")  # a coroutine not awaited
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_loop_is_closed_before_it_has_run_a_callback(pair, kind, ran):  # noqa: F811
    """Then nobody did, and the method in the plugin waited for ever."""
    class Calls:
        def call(self, function):
            go.wait(10)
            return function(7)

    async def later(value):
        return value

    async def submit():
        return proxy.call.submit(later if kind == "async def" else lambda value: value)

    both = pair({"c": Calls()})
    proxy, loop = both.dispense("c"), asyncio.new_event_loop()
    go, come, run = threading.Event(), threading.Event(), both.here.runner.run_on_loop
    both.here.runner.run_on_loop = lambda *what: (run(*what), come.set())[0]
    call = loop.run_until_complete(submit())
    go.set()
    assert come.wait(10)
    if ran:  # but not what that has begun
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()
    if ran and kind == "async def":  # its task has not begun
        with pytest.raises(miniplug.RemoteError, match="shutting down"):
            call.result(10)
    else:
        assert call.result(10) == 7


def test_a_loop_is_closed_just_as_it_takes_a_callback(pair):  # noqa: F811
    """It kept that, and called nothing."""
    class Closed:
        def call_soon_threadsafe(self, function, context=None):
            self.kept = function

        def is_closed(self):
            return True

    here = pair({"e": Echo()}).here
    call = here.calls[5] = miniplug._Call(5, "echo", None)
    call.home, call.loop = False, Closed()
    message = (1, 0, 77, 5, b'[0,"info",[],{}]', ())
    here.reader._route_call(collections.deque((message,)), message, 77, 5, False)
    until(lambda: not here.requests, 10)  # the pool has run it
    assert call.loop.kept


# -- who reads


def test_a_sleeper_wakes_by_itself_as_it_is_woken():
    """The thread that woke it had an AttributeError; if it was the attendant, the connection was ended."""
    gate = miniplug._gate()
    Each(gate=[gate, None]).wake()
    assert gate.acquire(False)


def test_a_handler_raises_a_runtime_error_as_a_call_goes_to_the_pool(pair, monkeypatch):  # noqa: F811
    """It was taken for want of a thread, and the next message went with it."""
    def strike(*what):
        move(*what)
        raise RuntimeError("by a handler")

    here, move = pair({"e": Echo()}).here, miniplug._move
    monkeypatch.setattr(miniplug, "_move", strike)
    message, other = (1, 0, 77, 5, b'[0,"info",[],{}]', ()), (3, 0, 6, 0, b"1", ())
    come = collections.deque((message, other))
    with pytest.raises(RuntimeError, match="by a handler"):
        here.reader._route_call(come, message, 77, 5, False)
    assert list(come) == [other]


def test_the_right_to_attend_is_taken_away_just_as_it_is_given_back(pair):  # noqa: F811
    class Right(miniplug._Seat):
        looks = 0

        def get(self, key):
            found = super().get(key)
            self.looks += 1
            if self.looks == 2:
                self.pop(key, None)  # by who looks after it
            return found

    here = pair({"e": Echo()}).here
    mine, seat = [-1], [-1]
    here.attendant._right = Right({0: mine})
    here.reader.seat[0] = seat
    here.attendant._attend(mine)
    assert here.attendant._right.looks == 2
    del here.reader.seat[0]


def test_callbacks_fail_at_the_same_time(pair):  # noqa: F811
    """Only one of their exceptions came home as itself."""
    class Raised(collections.deque):
        def __iter__(self):
            if requests:
                here.runner.fail(requests.pop(), KeyError(2), wait=False)
            return super().__iter__()

    here = pair({"e": Echo()}).here
    call = here.calls[5] = miniplug._Call(5, "echo", None)
    requests = [miniplug._Request(here, (1, 0, number, 5, b"", ())) for number in (7, 8)]
    here.requests.update((each.number, each) for each in requests)
    call.raised = Raised()
    here.runner.fail(requests.pop(0), KeyError(1), wait=False)
    if requests:
        here.runner.fail(requests.pop(), KeyError(2), wait=False)
    assert sorted(number for number, _ in call.raised) == [7, 8]


def test_a_session_ends_as_it_is_asked_whether_it_is_busy(pair):  # noqa: F811
    """It took calls again, of which a submitted one never ended."""
    here = pair({"e": Echo()}).here
    here.busy = lambda: here.end(EOFError()) is None
    assert here.seal() and here.sealed


def test_a_thread_ends_while_only_it_is_there_for_a_task(monkeypatch):
    pool = miniplug._Pool()
    monkeypatch.setattr(miniplug, "_sessions", set())
    monkeypatch.setattr(miniplug, "_IDLE_SECONDS", 0.0)
    with pool._lead:  # whose holder has just left with another task
        assert not pool._waits([])
        pool.put((print,))
        assert pool._waits([])


def test_who_waits_for_a_slot_has_it_before_who_comes(pair, monkeypatch):  # noqa: F811
    """With one worker calls were to run in the order in which they had come."""
    class Free(list):
        def append(self, slot):
            super().append(slot)
            late.append(slots.take(third))

    there, late, tasks = pair({"e": Echo()}).there, [], []
    monkeypatch.setattr(miniplug._pool, "put", tasks.append)
    slots = miniplug._Slots(1)
    first, second, third = (miniplug._Request(there, (1, 0, number, 0, b"", ())) for number in (7, 8, 9))
    assert slots.take(first) and not slots.take(second)
    slots.free = Free()
    slots.give_back()
    assert [task[1] for task in tasks] == [second]
    slots.give_back()
    assert late == [True] and slots.free == []


def test_a_call_begins_to_wait_as_a_slot_becomes_free(pair, monkeypatch):  # noqa: F811
    class Queue(collections.deque):
        def append(self, request):
            slots.give_back()  # of another thread
            super().append(request)

    there, tasks = pair({"e": Echo()}).there, []
    monkeypatch.setattr(miniplug._pool, "put", tasks.append)
    slots = miniplug._Slots(1)
    first, second = (miniplug._Request(there, (1, 0, number, 0, b"", ())) for number in (7, 8))
    slots._queue = Queue()
    assert slots.take(first) and not slots.take(second)
    assert [task[1] for task in tasks] == [second] and slots.free == []


# -- what is given back


def test_two_threads_release_at_once(pair):  # noqa: F811
    both = pair({"e": Echo()})
    proxy, posted = both.dispense("e"), []

    def discard(notices):
        both.here.discard = lambda notices: posted.extend(notices)
        miniplug.release(proxy)  # the other one
        both.here.discard(notices)

    both.here.discard = discard
    miniplug.release(proxy)
    assert len(posted) == 1


def test_a_finalizer_takes_back_what_its_own_thread_has_half_lent(pair):  # noqa: F811
    """That had a KeyError."""
    class Loans(dict):
        def setdefault(self, number, loan):
            found = super().setdefault(number, loan)
            references._loans = dict(self)
            references.unlend([])  # as a call that cannot be encoded does
            return found

    both = pair({"e": Echo()})
    proxy, references = both.dispense("e"), both.here.references
    references._loans = Loans(references._loans)
    function = lambda: 7  # noqa: E731
    assert proxy.echo(function) is function
    until(lambda: (gc.collect(), references.lends)[1] is False, 10)
    assert list(references._loans) == [0] and not references._lent


@pytest.mark.parametrize("step", ["find", "number_at"])
def test_what_was_dispensed_is_released_as_it_is_looked_up(step):
    class At(dict):
        def __contains__(self, session):
            return self.get(session) is not None

        def get(self, session):
            found = super().get(session)
            target.release()
            return found

    with miniplug.local({"e": Echo()}) as plugin:
        proxy = plugin.dispense("e")
        target, session = proxy._target, plugin._supervisor.open
        number = target.at[session].number
        target.at = At(target.at)
        try:
            if step == "find":
                assert target.find(miniplug._Call(0, "echo", None)) == (session, number)
            else:
                assert target.number_at(session) in (number, None)
        except miniplug.DeadReference:
            pass


def test_two_threads_exit_what_is_served():
    class Shared(dict):
        def popitem(self):
            self.clear()  # the other one was quicker
            return super().popitem()

    class Manager:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            exited.append(self)

    exited, served = [], miniplug._Served({"a": Manager(), "b": Manager()})
    a, b = served.shared("a"), served.shared("b")
    served._shared = Shared(served._shared)
    served.close()
    assert exited in ([b, a], [])
