"""Calls that overlap, that nobody waits for, that are given up: over a pair of sessions, and with real plugins."""

import asyncio
import concurrent.futures
import contextvars
import logging
import math
import os
import threading
import time

import pytest
from conftest import WINDOWS, WORKSHOP, until
from test_session import in_threads, pair, settled  # noqa: F401

import miniplug


class Worker:
    """What is called in this file. Its events are at hand for the tests, as it runs in their process."""

    def __init__(self):
        self.entered = threading.Event()
        self.go = threading.Event()
        self.seen = []
        self.cancelled = threading.Event()

    def echo(self, value):
        return value

    def wait(self, value=None):
        self.entered.set()
        assert self.go.wait(20)
        return value

    def let_go(self):
        self.go.set()
        return "gone"

    def fail(self, *args):
        raise KeyError(*args)

    def note(self, value):
        self.seen.append(value)

    def until_cancelled(self):
        self.entered.set()
        deadline = time.monotonic() + 20
        while not miniplug.cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.cancelled.set()
        return "late"

    def is_cancelled(self):
        return miniplug.cancelled()

    def count(self, number):
        yield from range(number)

    def call(self, function, *args):
        return function(*args)

    async def a_echo(self, value):
        await asyncio.sleep(0)
        return value

    async def a_wait(self):
        self.entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.seen.append(miniplug.cancelled())
            self.cancelled.set()
            raise

    async def a_fail(self):
        raise KeyError("async")


@pytest.fixture
def both(pair):  # noqa: F811
    made = pair({"w": Worker()}, {"here": Worker()})
    made.worker = made.served[0].plugins["w"]
    yield made
    made.worker.go.set()


@pytest.fixture
def worker(both):
    return both.worker


@pytest.fixture
def proxy(both):
    return both.dispense("w")


# -- a Call is a future


def test_a_call_is_a_real_future(proxy):
    call = proxy.echo.submit([1, (2,)])
    assert isinstance(call, concurrent.futures.Future) and isinstance(call, miniplug.Call)
    assert call.result(10) == [1, (2,)] and call.done() and not call.cancelled() and call.exception() is None
    failing = proxy.fail.submit("x")
    assert isinstance(failing.exception(10), KeyError) and isinstance(failing.exception(), miniplug.RemoteError)
    with pytest.raises(KeyError):
        failing.result()


def test_as_completed_and_wait_take_calls(both, proxy):
    calls = [proxy.echo.submit(number) for number in range(200)]
    assert sorted(call.result() for call in concurrent.futures.as_completed(calls, 10)) == list(range(200))
    slow = proxy.wait.submit("slow")
    done, waiting = concurrent.futures.wait([*calls, slow], 10, concurrent.futures.FIRST_COMPLETED)
    assert done == set(calls) and waiting == {slow}
    proxy.let_go()
    done, waiting = concurrent.futures.wait([slow], 10)
    assert done == {slow} and not waiting
    settled(both)


def test_the_result_may_not_come_in_time(both, proxy):
    call = proxy.wait.submit("value")
    for _ in range(2):
        with pytest.raises(concurrent.futures.TimeoutError):
            call.result(0.01)
    proxy.let_go()
    assert call.result(10) == "value"


def test_submit_does_not_wait_and_answers_come_out_of_order(proxy):
    slow = proxy.wait.submit("slow")
    assert [proxy.echo.submit(number).result(10) for number in range(50)] == list(range(50))
    assert not slow.done()
    proxy.let_go()
    assert slow.result(10) == "slow"


def test_what_cannot_be_sent_is_raised_by_submit(both, proxy):
    with pytest.raises(miniplug.NotSerializable, match=r"args\[0\]"):
        proxy.echo.submit(object())
    with pytest.raises(miniplug.MessageTooLarge):
        proxy.echo.submit("x" * (1 << 25))
    settled(both)


def test_answers_come_though_nobody_waits(both, proxy):
    arrived = threading.Event()
    call = proxy.echo.submit(1)
    call.add_done_callback(lambda call: arrived.set())
    assert arrived.wait(10)
    settled(both)


@pytest.mark.parametrize("round", range(5))
def test_any_callable_is_a_callback(proxy, round):
    """Those of builtin types have a __module__ of None."""
    found = []
    call = proxy.wait.submit(1)
    call.add_done_callback(found.append)
    proxy.let_go()
    assert call.result(10) == 1
    until(lambda: found == [call])
    assert proxy.echo("still") == "still"


def test_a_callback_that_blocks_holds_up_nobody(proxy):
    go = threading.Event()
    entered = threading.Semaphore(0)

    def block(call):
        entered.release()
        assert go.wait(20)

    def submit(number):  # one that has its answer already calls back at once, here
        proxy.echo.submit(number).add_done_callback(block)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    calls = [proxy.wait.submit(number) for number in range(10)]
    for call in calls:
        call.add_done_callback(block)
    proxy.let_go()
    assert [call.result(10) for call in calls] == list(range(10))
    assert proxy.echo("others") == "others"
    go.set()
    for thread in threads:
        thread.join(20)


def asyncio_like(module, go):
    def callback(call):
        assert go.wait(20)

    callback.__module__ = module
    return callback


def test_a_callback_from_a_module_called_like_asyncio_holds_up_nobody(proxy):
    go = threading.Event()
    call = proxy.wait.submit()
    call.add_done_callback(asyncio_like("asyncio_helpers", go))
    other = proxy.echo.submit("warm")
    assert other.result(10) == "warm"
    proxy.let_go.notify()
    until(lambda: call.done())
    try:
        assert proxy.echo.timeout(5)("others") == "others"
    finally:
        go.set()


def test_a_callback_calls_the_plugin_again(proxy):
    found = []
    over = threading.Event()

    def again(call):
        found.append(call.result())
        if len(found) < 50:
            assert proxy.echo(0) == 0
            proxy.echo.submit(len(found)).add_done_callback(again)
        else:
            over.set()

    proxy.echo.submit(0).add_done_callback(again)
    assert over.wait(20) and found == list(range(50))


def test_a_callback_that_raises_ends_nothing(proxy, caplog):
    over = threading.Event()

    def fail(call):
        raise ValueError("in a callback")

    call = proxy.wait.submit(7)
    call.add_done_callback(fail)
    call.add_done_callback(lambda call: over.set())
    proxy.let_go()
    assert over.wait(10) and call.result() == 7
    assert proxy.echo(1) == 1
    assert "in a callback" in caplog.text


# -- giving up


def test_cancel_gives_the_call_up_at_the_plugin(both, proxy, worker):
    call = proxy.until_cancelled.submit()
    assert worker.entered.wait(10)
    assert call.cancel() and call.cancelled() and call.cancel() and call.done()
    assert worker.cancelled.wait(10)
    with pytest.raises(concurrent.futures.CancelledError):
        call.result(1)
    settled(both)
    assert concurrent.futures.wait([call], 5).done == {call}


def test_cancel_after_the_answer_changes_nothing(proxy):
    call = proxy.echo.submit(3)
    assert call.result(10) == 3
    assert not call.cancel() and not call.cancelled() and call.result() == 3


def test_cancelling_from_many_threads_at_once(both, proxy):
    for _ in range(30):
        call = proxy.wait.submit()
        told = []
        call.add_done_callback(told.append)
        assert in_threads(*[call.cancel] * 4) == [True] * 4
        assert told == [call]
    both.worker.go.set()
    settled(both)


def test_cancel_races_the_answer_and_one_of_them_wins(both, proxy):
    won = {True: 0, False: 0}
    for number in range(300):
        call = proxy.echo.submit(number)
        for _ in range(number % 20):
            call.done()
        cancelled = call.cancel()
        won[cancelled] += 1
        assert call.cancelled() == cancelled
        if not cancelled:
            assert call.result(0) == number
    assert proxy.echo("after") == "after"
    settled(both)


def test_callbacks_of_a_cancelled_call_may_call_the_plugin(both, proxy, worker):
    """The answer to what is cancelled comes while its callback runs: the reader must not wait for that."""
    call = proxy.wait.submit()
    assert worker.entered.wait(10)
    found = []

    def callback(call):
        proxy.let_go.timeout(5)()
        found.extend(proxy.echo.timeout(5)(number) for number in range(100))

    call.add_done_callback(callback)
    assert call.cancel()
    assert found == list(range(100))
    settled(both)


def test_callbacks_of_a_cancelled_call_run_without_its_lock(proxy):
    call = proxy.wait.submit()
    asked = []

    def callback(call):
        thread = threading.Thread(target=lambda: asked.append(call.cancelled()), daemon=True)
        thread.start()
        thread.join(5)

    call.add_done_callback(callback)
    call.cancel()
    assert asked == [True]


def test_a_late_answer_is_dropped_quietly(both, proxy, worker, caplog):
    call = proxy.wait.timeout(0.02).submit("late")
    with pytest.raises(miniplug.CallTimeout) as caught:
        call.result(10)
    assert caught.value.method == "wait" and caught.value.seconds == 0.02
    assert "wait() took longer than 0.02 s" in str(caught.value)
    worker.go.set()
    settled(both)
    assert proxy.echo(1) == 1 and not caplog.records


@pytest.mark.parametrize("submitted", [False, True])
def test_a_timeout_is_everybodys_timeout_error(proxy, submitted):
    method = proxy.wait.timeout(0.01)
    for kind in (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError, miniplug.CallTimeout, miniplug.PluginError):
        with pytest.raises(kind):
            method.submit().result(10) if submitted else method()


def test_deadlines_of_submitted_calls_fire_though_nobody_waits(both, proxy):
    failed = []
    over = threading.Event()

    def done(call):
        failed.append(type(call.exception()))
        if len(failed) == 20:
            over.set()

    for number in range(20):
        proxy.wait.timeout(0.01 + (20 - number) * 0.002).submit().add_done_callback(done)
    assert over.wait(10) and set(failed) == {miniplug.CallTimeout}
    assert both.there.requests
    both.worker.go.set()
    settled(both)


def test_no_deadline_is_too_far_away(pair):  # noqa: F811
    """Two sessions whose calls have the same number and the same deadline: the end of time."""
    proxies = [pair({"w": Worker()}).dispense("w") for _ in range(3)]
    for _ in range(5):
        calls = [proxy.echo.timeout(math.inf).submit(1) for proxy in proxies]
        assert [call.result(10) for call in calls] == [1, 1, 1]


def test_deadlines_of_answered_calls_are_not_kept(both, proxy, monkeypatch):
    alarms = []
    monkeypatch.setattr(miniplug._pool, "alarm", lambda *alarm: alarms.append(alarm))
    for _ in range(50):
        for call in [proxy.echo.timeout(1000).submit(1) for _ in range(100)]:
            call.result(10)
    assert len([when for when, _ in alarms if when > time.monotonic() + 100]) == 1


@pytest.mark.parametrize("seconds", [-1, math.nan, "3", []])
def test_what_is_no_number_of_seconds_is_refused(proxy, seconds):
    with pytest.raises(ValueError, match="a number of seconds"):
        proxy.echo.timeout(seconds)


def test_the_latest_deadline_counts_and_none_is_the_default(both, proxy):
    both.here.call_timeout = 0.02
    proxy = both.dispense("w")
    for method in (proxy.wait, proxy.wait.timeout(None), proxy.wait.timeout(50).timeout(0.02)):
        with pytest.raises(miniplug.CallTimeout) as caught:
            method()
        assert caught.value.seconds == 0.02
    timer = threading.Timer(0.05, both.worker.go.set)
    timer.start()
    assert proxy.wait.timeout(20)("in time") == "in time"
    timer.join()


@pytest.mark.parametrize("method", ["until_cancelled", "a_wait"])
@pytest.mark.parametrize("how", ["timeout", "submitted timeout", "cancel"])
def test_what_is_given_up_is_told_so(both, worker, method, how):
    method = getattr(both.dispense("w"), method)
    if how == "timeout":
        with pytest.raises(miniplug.CallTimeout):
            method.timeout(0.05)()
    elif how == "cancel":
        call = method.submit()
        assert worker.entered.wait(10)
        call.cancel()
    else:
        with pytest.raises(miniplug.CallTimeout):
            method.timeout(0.05).submit().result(10)
    assert worker.cancelled.wait(10)
    assert worker.seen in ([], [True])
    settled(both)


def test_an_async_call_that_is_cancelled_at_once_is_forgotten(both, proxy):
    """Whether it has begun or not: it must not count as one that runs."""
    proxy.a_echo(0)
    for _ in range(300):
        proxy.a_wait.submit().cancel()
    for _ in range(300):
        proxy.a_echo.submit(1).cancel()
    assert proxy.a_echo(1) == 1
    settled(both)


def test_outside_a_call_nothing_is_cancelled(proxy):
    assert miniplug.cancelled() is False
    assert proxy.is_cancelled() is False


# -- notify


def test_notify_wants_no_answer(both, proxy, worker):
    assert proxy.note.notify("a") is None
    until(lambda: worker.seen == ["a"])
    proxy.count.notify(1000)
    proxy.a_echo.notify(1)
    with pytest.raises(miniplug.NotSerializable):
        proxy.note.notify(object())
    with pytest.raises(miniplug.MethodNotFound):
        proxy.nothing.notify()
    proxy.let_go()
    settled(both)


def test_what_a_notified_method_raises_is_one_record(caplog):
    with caplog.at_level(logging.INFO), miniplug.launch(WORKSHOP, name="notified") as plugin:
        shop = plugin.dispense()
        shop.fail.notify("ValueError", "nobody hears")
        shop.greet("after")
    (record,) = [record for record in caplog.records if record.name.startswith("miniplug.notified")]
    assert record.levelno == logging.ERROR
    assert "Traceback" in record.getMessage() and record.getMessage().endswith("ValueError: nobody hears")


# -- asyncio in the host


def test_a_call_can_be_awaited_and_gathered(proxy):
    async def main():
        assert await proxy.echo.submit(1) == 1
        assert await asyncio.gather(*[proxy.echo.submit(n) for n in range(100)]) == list(range(100))
        with pytest.raises(KeyError):
            await proxy.fail.submit()

    asyncio.run(main())


def test_a_call_can_be_awaited_twice_and_at_once(proxy, worker):
    async def main():
        call = proxy.wait.submit("same")

        async def wait():
            return await call

        tasks = [asyncio.ensure_future(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        worker.go.set()
        assert await asyncio.gather(*tasks) == ["same"] * 3
        assert await call == "same" and await call == "same"

    asyncio.run(main())


def test_wait_for_gives_the_call_up(both, proxy, worker):
    async def main():
        call = proxy.until_cancelled.submit()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.05)
        assert call.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert worker.cancelled.wait(10)
    settled(both)


def test_a_cancelled_task_gives_its_call_up(both, proxy, worker):
    async def main():
        async def wait():
            await proxy.until_cancelled.submit()

        task = asyncio.ensure_future(wait())
        while not worker.entered.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert worker.cancelled.wait(10)
    settled(both)


def test_a_timeout_of_the_calls_own_is_awaited(proxy):
    async def main():
        with pytest.raises(asyncio.TimeoutError) as caught:
            await proxy.wait.timeout(0.01).submit()
        assert isinstance(caught.value, miniplug.CallTimeout)

    asyncio.run(main())


def test_a_loop_that_is_closed_before_the_answer_harms_nobody(both, proxy, worker):
    kept = []

    async def main():
        kept.append(proxy.wait.submit("late"))
        asyncio.wrap_future(kept[0])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    worker.go.set()
    assert kept[0].result(10) == "late"
    assert proxy.echo(1) == 1


# -- async methods


def test_async_methods_share_one_loop_hundreds_at_a_time(pair):  # noqa: F811
    class Meeting:
        def __init__(self):
            self.count = 0
            self.all = None
            self.loops = set()

        async def meet(self, number):
            self.loops.add((id(asyncio.get_running_loop()), threading.get_ident()))
            if self.all is None:
                self.all = asyncio.Event()
            self.count += 1
            if self.count == 500:
                self.all.set()
            await asyncio.wait_for(self.all.wait(), 15)
            return number

    meeting = Meeting()
    both = pair({"m": meeting}, max_workers=2)
    proxy = both.dispense("m")
    calls = [proxy.meet.submit(number) for number in range(500)]
    assert [call.result(15) for call in calls] == list(range(500))
    assert len(meeting.loops) == 1
    settled(both)


def test_async_methods_fail_like_any(both, proxy):
    with pytest.raises(KeyError, match="async"):
        proxy.a_fail()
    with pytest.raises(KeyError):
        proxy.a_fail.submit().result(10)
    settled(both)


class Asynchronous:
    """Needs a proxy of the other side."""

    other = None
    variable = contextvars.ContextVar("variable", default=0)

    async def block(self):
        return self.other.echo(1)

    async def ask(self, value):
        return await self.other.echo.submit(value)

    async def ask_async(self, value):
        return await self.other.a_echo.submit(value)

    async def ask_many(self, count):
        return await asyncio.gather(*[self.other.echo.submit(number) for number in range(count)])

    async def tell(self, value):
        self.other.note.notify(value)

    async def nest(self, function, depth):
        return [depth, *(await function.submit(depth - 1))] if depth else [0]

    async def variables(self, value):
        before = self.variable.get()
        self.variable.set(value)
        for _ in range(5):
            await asyncio.sleep(0)
        return before, self.variable.get(), miniplug.cancelled()


@pytest.fixture
def asynchronous(pair):  # noqa: F811
    there, here = Asynchronous(), Worker()
    both = pair({"a": there}, {"here": here}, max_workers=2)
    there.other = both.dispense("here", both.there)
    both.worker = here
    yield both.dispense("a"), both
    there.other = None


def test_a_blocking_call_in_an_async_method_says_what_to_do(asynchronous):
    proxy, both = asynchronous
    with pytest.raises(RuntimeError, match=r"await echo\.submit\("):
        proxy.block()
    assert proxy.ask(5) == 5
    settled(both)


def test_async_methods_call_the_other_side(asynchronous):
    proxy, both = asynchronous
    assert proxy.ask(1) == 1 and proxy.ask_async(2) == 2
    assert proxy.ask_many(200) == list(range(200))
    assert [call.result(10) for call in [proxy.ask_async.submit(n) for n in range(100)]] == list(range(100))
    proxy.tell("told")
    until(lambda: both.worker.seen == ["told"])
    settled(both)


def test_async_methods_have_a_context_each(asynchronous):
    proxy, _ = asynchronous
    calls = [proxy.variables.submit(n) for n in range(50)]
    assert [call.result(10) for call in calls] == [(0, n, False) for n in range(50)]


def test_async_methods_nest_with_blocking_callbacks(asynchronous):
    proxy, both = asynchronous

    def back(depth):
        return [depth, *proxy.nest(back, depth - 1)] if depth > 0 else [0]

    assert proxy.nest(back, 30) == list(range(30, -1, -1))
    assert in_threads(*[lambda: proxy.nest(back, 10)] * 6) == [list(range(10, -1, -1))] * 6
    settled(both)


def test_async_callbacks_of_the_host_run_too(both, proxy):
    async def double(value):
        await asyncio.sleep(0)
        return value * 2

    assert proxy.call(double, 21) == 42
    assert [call.result(10) for call in [proxy.call.submit(double, n) for n in range(50)]] == [n * 2 for n in range(50)]
    settled(both)


@pytest.mark.parametrize("kind", ["function", "async", "method"])
def test_callbacks_of_what_is_submitted_on_a_loop_run_there_in_its_context(both, proxy, kind):
    variable, seen = contextvars.ContextVar("variable", default="none"), []

    def note(value):
        seen.append((threading.get_ident(), asyncio.get_running_loop(), variable.get(), value))
        return value + 1

    async def note_async(value):
        await asyncio.sleep(0)
        return note(value)

    class Holder:
        def note(self, value):
            return note(value)

    callback = {"function": note, "async": note_async, "method": Holder().note}[kind]

    async def request(name):
        variable.set(name)
        return await proxy.call.submit(callback, 1)

    async def main():
        assert await asyncio.gather(*map(request, "ab")) == [2, 2]
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert sorted(seen, key=lambda each: each[2]) == [(threading.get_ident(), loop, name, 1) for name in "ab"]
    settled(both)


def test_callbacks_of_what_is_submitted_elsewhere_run_in_a_thread_of_the_pool(both, proxy):
    seen = []
    assert proxy.call.submit(lambda: seen.append(threading.current_thread())).result(20) is None
    assert seen[0] is not threading.current_thread() and seen[0].name.startswith("miniplug")
    assert proxy.call(lambda: seen.append(threading.current_thread())) is None
    assert seen[1] is threading.current_thread()


# -- overlap


def test_one_worker_runs_one_call_after_another(pair):  # noqa: F811
    class Serial:
        def __init__(self):
            self.inside = threading.Lock()
            self.order = []

        def step(self, number):
            assert self.inside.acquire(False), "two at once"
            self.order.append(number)
            time.sleep(0.001)
            self.inside.release()
            return number

    serial = Serial()
    both = pair({"s": serial}, max_workers=1)
    proxy = both.dispense("s")
    calls = [proxy.step.submit(number) for number in range(50)]
    assert [call.result(10) for call in calls] == list(range(50))
    assert serial.order == list(range(50))
    in_threads(*[lambda: [proxy.step(1) for _ in range(10)]] * 6)
    settled(both)


def test_every_thread_gets_its_own_answer(both, proxy):
    def work(number):
        for step in range(200):
            assert proxy.echo([number, step]) == [number, step]
        return number

    assert in_threads(*[lambda n=n: work(n) for n in range(16)]) == list(range(16))
    settled(both)


def test_an_idle_host_stands_still(pair):  # noqa: F811
    """After the last callback has been called and given back, the clock has nothing to look on at."""
    worker = Worker()
    both = pair({"w": worker})
    proxy = both.dispense("w")
    got = threading.Event()
    proxy.note(got.set)
    (kept,) = worker.seen
    thread = threading.Thread(target=kept)  # on behalf of no call
    thread.start()
    thread.join(10)
    assert got.wait(10)
    worker.seen.clear()
    del kept, thread
    until(lambda: not both.here.references.lends)
    until(lambda: not both.here.attendant._watched and not both.there.attendant._watched, 5)


# -- with a plugin of its own process


ASYNC_PLUGIN = """
    import asyncio, os, threading, time, miniplug

    class P:
        def __init__(self):
            self.log = []
        async def sleep(self, seconds):
            await asyncio.sleep(seconds)
            return seconds
        async def forever(self):
            self.log.append("begun")
            try:
                await asyncio.sleep(1000)
            finally:
                self.log.append("finally")
        def begun(self):
            while not self.log:
                time.sleep(0.001)
        def get_log(self):
            return self.log
        def die(self):
            os._exit(7)
        def ask(self, function, value):
            return function(value)
        async def a_ask(self, function, value):
            return await function.submit(value)
        def wait(self):
            deadline = time.monotonic() + 30
            while not miniplug.cancelled() and time.monotonic() < deadline:
                time.sleep(0.001)
"""


def test_a_crash_fails_every_pending_call(write):
    with miniplug.launch(write("p.py", ASYNC_PLUGIN) + ":P") as plugin:
        proxy = plugin.dispense()
        states = []
        over = threading.Event()

        def done(call):
            states.append((type(call.exception()), plugin.running, plugin.exit_code))
            if len(states) == 21:
                over.set()

        calls = [proxy.forever.submit() for _ in range(10)] + [proxy.wait.submit() for _ in range(10)]
        calls.append(proxy.die.submit())
        for call in calls:
            call.add_done_callback(done)
        assert over.wait(10)
        assert set(states) == {(miniplug.PluginCrashed, False, 7)}
        for call in calls:
            with pytest.raises(miniplug.PluginCrashed) as caught:
                call.result(0)
            assert caught.value.exit_code == 7 and "die" in caught.value.calls
        assert len({id(call.exception()) for call in calls}) == 21
        with pytest.raises(miniplug.PluginCrashed):
            proxy.sleep.submit(1)


def test_a_callback_after_the_crash_may_start_the_plugin_again():
    with miniplug.launch(WORKSHOP) as plugin:
        proxy = plugin.dispense()
        found = []
        over = threading.Event()

        def again(call):
            try:
                assert isinstance(call.exception(), miniplug.PluginCrashed)
                plugin.start()
                found.append(proxy.greet("again"))
            finally:
                over.set()

        proxy.hard_exit.submit(3).add_done_callback(again)
        assert over.wait(15) and found == ["Hello, again!"]


def test_submit_after_close_raises():
    plugin = miniplug.launch(WORKSHOP)
    proxy = plugin.dispense()
    pending = proxy.sleep.submit(30)
    plugin.close(grace=0.2)
    assert isinstance(pending.exception(10), miniplug.PluginClosed)
    with pytest.raises(miniplug.PluginClosed):
        proxy.greet.submit("you")
    with pytest.raises(miniplug.PluginClosed):
        proxy.greet.notify("you")


def test_async_methods_are_cancelled_by_close(write, tmp_path):
    path = write("p.py", f"""
        import asyncio
        class P:
            async def forever(self):
                open({str(tmp_path / 'begun')!r}, "w").close()
                try:
                    await asyncio.sleep(1000)
                finally:
                    open({str(tmp_path / 'over')!r}, "w").close()
    """)
    plugin = miniplug.launch(path + ":P")
    call = plugin.dispense().forever.submit()
    until(lambda: os.path.exists(tmp_path / "begun"))
    plugin.close()
    assert plugin.exit_code == 0 and os.path.exists(tmp_path / "over")
    assert isinstance(call.exception(5), miniplug.PluginClosed)


def test_an_async_method_of_a_plugin_is_given_up(write):
    with miniplug.launch(write("p.py", ASYNC_PLUGIN) + ":P", call_timeout=20) as plugin:
        proxy = plugin.dispense()
        call = proxy.forever.submit()
        proxy.begun()
        call.cancel()
        until(lambda: proxy.get_log() == ["begun", "finally"])
        with pytest.raises(miniplug.CallTimeout):
            proxy.forever.timeout(0.05)()
        until(lambda: proxy.get_log()[2:] in ([], ["begun", "finally"]))
        start = time.monotonic()
        assert [call.result(20) for call in [proxy.sleep.submit(0.3) for _ in range(200)]] == [0.3] * 200
        assert time.monotonic() - start < 10
        assert proxy.ask(lambda value: value + 1, 1) == proxy.a_ask(lambda value: value + 1, 1) == 2


def test_call_timeout_is_the_default_deadline_of_submitted_calls_too(write):
    with miniplug.launch(write("p.py", ASYNC_PLUGIN) + ":P", call_timeout=0.3) as plugin:
        proxy = plugin.dispense()
        with pytest.raises(miniplug.CallTimeout) as caught:
            proxy.sleep.submit(30).result(10)
        assert caught.value.seconds == 0.3
        slow = plugin.dispense(timeout=20)
        assert slow.sleep.submit(0.5).result(10) == 0.5


def test_a_stopped_plugin_does_not_hold_up_deadlines():
    """A plugin that neither reads nor answers: submitted calls still end in time."""
    if WINDOWS:
        pytest.skip("signals are POSIX")
    import signal

    with miniplug.launch(WORKSHOP) as plugin:
        proxy = plugin.dispense()
        os.kill(plugin.pid, signal.SIGSTOP)
        try:
            big = b"x" * 3000000
            start = time.monotonic()
            calls = [proxy.echo.timeout(0.2).submit(big) for _ in range(4)]
            for call in calls:
                assert isinstance(call.exception(5), miniplug.CallTimeout)
            assert time.monotonic() - start < 5
        finally:
            os.kill(plugin.pid, signal.SIGCONT)
        assert proxy.greet.timeout(15)("again") == "Hello, again!"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_deadlines_fire_in_a_forked_child_too():
    """The child has a plugin of its own; the thread that looks on is not forked with it."""
    with miniplug.launch(WORKSHOP) as plugin:
        plugin.dispense().greet("x")
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            answer = b"failed"
            try:
                with miniplug.launch(WORKSHOP) as own:
                    try:
                        own.dispense().sleep.timeout(0.1).submit(20).result(5)
                    except miniplug.CallTimeout:
                        answer = b"in time"
                    except concurrent.futures.TimeoutError:
                        answer = b"never"
            finally:
                os.write(write, answer)
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read() == b"in time"
        os.waitpid(pid, 0)
