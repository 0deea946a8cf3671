"""Streams: generators and iterators of both kinds, both ways; flow control, ends, and what is let go of."""

import asyncio
import gc
import os
import struct
import threading
import time

import pytest
from conftest import until
from test_session import LIMIT, frame, in_threads, pair, raw, settled  # noqa: F401

import miniplug

BOUND = 200  # items that an open stream may cost beyond what was read


class Iterator:
    def __init__(self, number):
        self.left = number

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left


class AsyncIterator(Iterator):
    __next__ = None

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


class Source:
    """Streams of all kinds, which tell how far they got and when they are over."""

    def __init__(self):
        self.made = 0
        self.over = threading.Event()
        self.go = threading.Event()
        self.errors = []

    def count(self, number):
        yield from range(number)

    async def a_count(self, number):
        for value in range(number):
            yield value

    async def a_slow_count(self, number):
        for value in range(number):
            await asyncio.sleep(0)
            yield value

    def iterator(self, number):
        return iter(list(range(number)))

    def mapped(self, number):
        return map(int, [str(value) for value in range(number)])

    def own(self, number):
        return Iterator(number)

    def a_own(self, number):
        return AsyncIterator(number)

    async def later(self, number):
        await asyncio.sleep(0)
        return self.count(number)

    async def a_later(self, number):
        return self.a_count(number)

    def endless(self, size=0):
        try:
            while True:
                self.made += 1
                yield b"%d" % self.made + b"x" * size
        except BaseException as error:
            self.errors.append(type(error))
            raise
        finally:
            self.over.set()

    async def a_endless(self, size=0):
        try:
            while True:
                self.made += 1
                await asyncio.sleep(0)
                yield b"%d" % self.made + b"x" * size
        finally:
            self.over.set()

    def slow(self):
        try:
            yield "first"
            assert self.go.wait(20)
            self.go.clear()
            yield "second"
            assert self.go.wait(20)
            yield "third"
        finally:
            self.over.set()

    async def a_slow(self):
        try:
            yield "first"
            while not self.go.is_set():
                await asyncio.sleep(0.001)
            self.go.clear()
            yield "second"
            while not self.go.is_set():
                await asyncio.sleep(0.001)
            yield "third"
        finally:
            self.over.set()

    def stuck(self, after=0):
        """Gives some, then nothing for long, unless it is given up."""
        try:
            yield from range(after)
            deadline = time.monotonic() + 20
            while not miniplug.cancelled():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield "late"
        finally:
            self.over.set()

    async def a_stuck(self, after=0):
        try:
            for value in range(after):
                yield value
            await asyncio.sleep(60)
        finally:
            self.over.set()

    def let_go(self):
        self.go.set()

    def echo(self, value):
        return value

    def fails(self, after):
        yield from range(after)
        raise KeyError("here", after)

    async def a_fails(self, after):
        for value in range(after):
            yield value
        raise KeyError("here", after)

    def bad(self, after):
        try:
            yield from range(after)
            yield {"deep": object()}
            yield "never"
        finally:
            self.over.set()

    def large(self, after, size):
        yield from range(after)
        yield b"x" * size
        yield "never"

    def lends(self, size):
        yield [self.many, "x" * size]

    def many(self, count, size):
        item = b"x" * size
        for _ in range(count):
            yield item

    def reused(self, count):
        row = {}
        for number in range(count):
            row["number"] = number
            yield row

    def reused_buffer(self, count):
        buffer = bytearray(10000)
        for number in range(count):
            buffer[:4] = struct.pack("!I", number)
            yield buffer

    def empty(self):
        return
        yield

    def raises_in_finally(self):
        try:
            yield 1
            yield 2
        finally:
            self.over.set()
            raise ValueError("in finally")

    def numbers(self):
        return [threading.get_ident()]

    def call(self, function, *args):
        return function(*args)

    def take(self, function, count):
        """The first items of a stream that a function of the other side's gives; all, if count is None."""
        stream = function()
        if count is None:
            return list(stream)
        found = [item for item, _ in zip(stream, range(count))]
        stream.close()
        return found

    async def a_take(self, function):
        return [item async for item in await function.submit()]

    def pass_on(self, function):
        return function()

    def ask_between(self, function, number):
        for value in range(number):
            yield function(value)


@pytest.fixture
def both(pair):  # noqa: F811
    made = pair({"s": Source()})
    made.source = made.served[0].plugins["s"]
    yield made
    made.source.go.clear = bool  # a stream that is still there may wait for it twice
    made.source.go.set()


@pytest.fixture
def source(both):
    return both.source


@pytest.fixture
def proxy(both):
    return both.dispense("s")


# -- what streams


@pytest.mark.parametrize("method", ["count", "a_count", "a_slow_count", "iterator", "mapped", "own", "a_own", "later", "a_later"])
@pytest.mark.parametrize("number", [0, 1, 31, 32, 33, 63, 64, 65, 1000])
def test_iterators_of_all_kinds_stream(both, proxy, method, number):
    wanted = list(range(number))
    if method in ("own", "a_own"):
        wanted.reverse()
    stream = getattr(proxy, method)(number)
    assert isinstance(stream, miniplug.Stream) and iter(stream) is stream
    assert list(stream) == wanted
    assert list(stream) == []
    with pytest.raises(StopIteration):
        next(stream)
    settled(both)


@pytest.mark.parametrize("method", ["count", "a_count"])
def test_thousands_of_items_come_in_order(both, proxy, method):
    assert list(getattr(proxy, method)(30000)) == list(range(30000))
    settled(both)


def test_submit_of_a_streaming_method_resolves_to_the_stream(both, proxy):
    for _ in range(50):
        assert list(proxy.count.submit(100).result(10)) == list(range(100))
    settled(both)


def test_a_stream_that_a_handler_has_cut_off_ends_at_once(both, proxy):
    """What had come when it struck is not read as if nothing had been."""
    stream = proxy.count(100)
    take = stream._take

    def struck(call):
        take(call)
        raise KeyboardInterrupt

    stream._take = struck
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert list(stream) == []
    settled(both)


@pytest.mark.parametrize("method", ["count", "a_count"])
def test_no_item_is_lost_when_the_stream_goes_to_a_callback(both, proxy, method):
    """The first items come before the callback has run."""
    for number in (1, 5, 64, 500) * 5:
        got = []
        over = threading.Event()

        def read(call, got=got, over=over):
            try:
                got.extend(call.result())
            finally:
                over.set()

        call = getattr(proxy, method).submit(number)
        call.add_done_callback(read)
        assert over.wait(10) and got == list(range(number))
    settled(both)


def test_a_mutated_item_arrives_as_it_was_when_it_was_yielded(both, proxy):
    assert [row["number"] for row in proxy.reused(100)] == list(range(100))


def test_a_reused_buffer_arrives_as_it_was_when_it_was_yielded(both, proxy):
    assert [struct.unpack("!I", item[:4])[0] for item in proxy.reused_buffer(100)] == list(range(100))


# -- flow control


@pytest.mark.parametrize("method", ["endless", "a_endless"])
def test_a_reader_that_stands_still_costs_few_items(both, proxy, source, method):
    stream = getattr(proxy, method)()
    assert next(stream) == b"1"
    for _ in range(200):
        proxy.echo(1)
    until(lambda: source.made >= 2)
    for read in (1, 100, 1000):
        while int(next(stream)) < read:
            pass
        for _ in range(50):
            proxy.echo(1)
        assert source.made <= read + BOUND
    stream.close()
    assert source.over.wait(10)
    settled(both)


def test_large_items_of_a_stream_that_nobody_reads_stay_few(pair):  # noqa: F811
    source = Source()
    both = pair({"s": source})
    proxy = both.dispense("s")
    stream = proxy.endless(1000000)
    assert next(stream)[:1] == b"1"
    for _ in range(100):
        proxy.echo(1)
    assert source.made <= BOUND
    for expected in range(2, 200):
        assert int(next(stream).rstrip(b"x")) == expected


@pytest.mark.parametrize("how", ["close", "abandon"])
def test_a_producer_that_waits_to_send_is_freed_though_the_host_is_idle(pair, how):  # noqa: F811
    source = Source()
    proxy = pair({"s": source}).dispense("s")
    stream = proxy.endless(1000000)
    next(stream)
    if how == "close":
        stream.close()
    del stream
    assert source.over.wait(1)


@pytest.mark.parametrize("method", ["slow", "a_slow"])
def test_a_slow_producers_item_arrives_when_it_is_made(both, proxy, source, method):
    for _ in range(10):
        source.go.clear()
        stream = getattr(proxy, method)()
        for expected in ("first", "second"):
            assert next(stream) == expected
            proxy.let_go()
        assert next(stream) == "third" and list(stream) == []


def test_a_producer_that_waits_holds_up_no_call(proxy, source, monkeypatch):
    """However quick the opening of such streams was before."""
    monkeypatch.setattr(miniplug, "_LOOK", 600.0)  # nobody looks whether a call takes long after all
    for _ in range(6):
        source.go.clear()
        stream = proxy.slow()
        for expected in ("first", "second"):
            assert next(stream) == expected
            proxy.let_go.timeout(20)()
        assert list(stream) == ["third"]


def test_the_second_of_two_quick_items_arrives_too(both, proxy):
    """It has to wait for others, which do not come."""

    class Pairs:
        def __init__(self):
            self.go = threading.Event()

        def pairs(self, count):
            for number in range(count):
                yield number
                yield number
                assert self.go.wait(20)
                self.go.clear()

        def let_go(self):
            self.go.set()

    both.served[0].plugins["p"] = Pairs()
    pairs = both.dispense("p")
    stream = pairs.pairs(30)
    for number in range(30):
        assert (next(stream), next(stream)) == (number, number)
        pairs.let_go()
    assert list(stream) == []


def test_batches_that_are_too_large_together_go_one_by_one(pair):  # noqa: F811
    both = pair({"s": Source()}, limit=100000)
    proxy = both.dispense("s")
    assert [len(item) for item in proxy.many(200, 20000)] == [20000] * 200
    settled(both)


def test_credit_is_given_for_whatever_came_in_one_message():
    """A plugin that was not written with this file may send all that it has credit for at once."""
    session, theirs = raw()
    theirs.sendall(frame(3, b"", flags=4) + frame(5, b"[" + b",".join([b"1"] * 64) + b"]"))
    stream = session.call(0, "x", (), {}, 10)
    assert [next(stream) for _ in range(64)] == [1] * 64
    credited = 0

    def answer():
        nonlocal credited
        read = theirs.makefile("rb")
        while True:
            (size,) = struct.unpack("!i", read.read(4))
            message = read.read(size)
            if message[1] == 7:
                credited = int(message[24:])
                return theirs.sendall(frame(6))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    call = stream._call
    call.seconds = 5
    assert list(stream) == [] and credited == 64
    thread.join(10)
    session.end(EOFError())
    session.dispose()
    theirs.close()


def test_credit_for_a_whole_window_may_come_as_its_last_item_leaves(pair, monkeypatch):  # noqa: F811
    put, sent = miniplug._Producer._put, []

    def put_and_grant(self, item):
        put(self, item)
        sent.append(item)
        if len(sent) % 64 == 0:
            self.grant((7, 0, 1, 0, b"64", ()))

    monkeypatch.setattr(miniplug._Producer, "_put", put_and_grant)
    monkeypatch.setattr(miniplug._Session, "post", lambda self, *message: None)  # the caller gives none
    stream = pair({"s": Source()}).dispense("s").count(192)
    stream._call.granted = 192
    assert list(stream) == list(range(192))


@pytest.mark.parametrize("sent", [
    frame(5, b"[1]"),
    frame(6),
    frame(3, b"", flags=4) + frame(5, b"[" + b",".join([b"1"] * 65) + b"]"),
    frame(3, b"", flags=4) + frame(5, b"7"),
    frame(3, b"", flags=4) + frame(5),
    frame(3, b"", flags=4) + frame(3, b"1"),
    frame(3, b"", flags=4) + frame(3, b"", flags=4),
])
def test_malformed_streams_cost_the_connection_and_no_more(sent):
    session, theirs = raw()
    theirs.sendall(sent)
    with pytest.raises(miniplug.ProtocolError):
        list(session.call(0, "x", (), {}, 10))
    assert not session.calls
    session.dispose()
    theirs.close()


@pytest.mark.parametrize("body", [b"0", b"-1", b"65", b"1.5", b"true", b'"1"', b"[]", b""])
def test_malformed_credit_costs_the_connection(body):
    session, theirs = raw()
    theirs.sendall(frame(7, body))
    with pytest.raises(miniplug.ProtocolError):
        session.call(0, "x", (), {}, 10)
    session.dispose()
    theirs.close()


def test_hundreds_of_open_streams_hold_no_worker(pair):  # noqa: F811
    source = Source()
    both = pair({"s": source}, max_workers=2)
    proxy = both.dispense("s")
    streams = [proxy.count(1000) for _ in range(200)] + [proxy.a_count(1000) for _ in range(100)]
    assert proxy.echo("free") == "free"
    for _ in range(70):
        assert len({next(stream) for stream in streams}) == 1
    assert proxy.echo("free") == "free"
    for stream in streams[::2]:
        stream.close()
    assert all(list(stream) == list(range(70, 1000)) for stream in streams[1::2])
    settled(both)


def test_one_worker_has_an_open_stream_and_other_calls(pair):  # noqa: F811
    source = Source()
    both = pair({"s": source}, max_workers=1)
    proxy = both.dispense("s")
    stream = proxy.endless()
    for number in range(1, 500):
        assert next(stream) == b"%d" % number
        assert proxy.echo(number) == number
    stream.close()
    assert source.over.wait(10)
    settled(both)


# -- how it ends


@pytest.mark.parametrize("method", ["fails", "a_fails"])
@pytest.mark.parametrize("after", [0, 1, 40, 64, 200])
def test_an_exception_ends_the_stream_where_it_happened(both, proxy, method, after):
    found = []
    with pytest.raises(KeyError) as caught:
        found.extend(proxy.echo(item) for item in getattr(proxy, method)(after))
    assert found == list(range(after)) and caught.value.args == ("here", after)
    assert isinstance(caught.value, miniplug.RemoteError) and method in caught.value.remote_traceback
    settled(both)


@pytest.mark.parametrize("after", [0, 1, 40, 100])
def test_an_item_that_cannot_travel_ends_the_stream_by_name(both, proxy, source, after):
    found = []
    stream = proxy.bad(after)
    with pytest.raises(miniplug.NotSerializable, match="object"):
        for item in stream:
            found.append(item)  # noqa: PERF402
    assert found == list(range(after)) and list(stream) == []
    assert source.over.wait(10)
    settled(both)


@pytest.mark.parametrize("after", [0, 1, 40, 100])
def test_an_item_that_is_too_large_ends_the_stream_by_name(both, proxy, after):
    found = []
    with pytest.raises(miniplug.MessageTooLarge):
        for item in proxy.large(after, 2 * LIMIT):
            found.append(item)  # noqa: PERF402
    assert found == list(range(after))
    assert proxy.echo(1) == 1
    settled(both)


def test_an_item_that_is_just_too_large_lends_nothing(both, proxy):
    """The brackets around an item count too."""
    fits = []
    for size in range(LIMIT - 80, LIMIT):
        try:
            fits += [size for _ in proxy.lends(size)]
        except miniplug.MessageTooLarge:
            continue
    assert fits and fits[-1] < LIMIT - 20
    settled(both)
    until(lambda: not any(loan.sent for number, loan in both.there.references._loans.items() if number > 1), 10)


@pytest.mark.parametrize("method", ["endless", "a_endless", "a_slow", "stuck", "a_stuck"])
def test_a_closed_stream_frees_the_generator(both, proxy, source, method):
    stream = getattr(proxy, method)(*([1] if "stuck" in method else []))
    next(stream)
    stream.close()
    stream.close()
    assert source.over.wait(10)
    assert list(stream) == []
    settled(both)


@pytest.mark.parametrize("method", ["endless", "a_endless"])
@pytest.mark.parametrize("how", ["sync", "submit", "unread", "never looked at"])
def test_an_abandoned_stream_frees_the_generator_with_no_further_call(both, proxy, source, method, how):
    method = getattr(proxy, method)
    if how == "never looked at":
        call = method.submit()
        until(lambda: call.done() and source.made)
        del call
    elif how == "submit":
        next(method.submit().result(10))
    elif how == "unread":
        stream = method()
        until(lambda: source.made)  # one that has not begun has nothing to clean up
        del stream
    else:
        for _ in zip(range(100), method()):
            pass
    gc.collect()
    assert source.over.wait(10)
    settled(both)


def test_an_abandoned_stream_in_a_cycle_is_freed_too(both, proxy, source):
    class Holder:
        pass

    holder = Holder()
    holder.me, holder.stream = holder, proxy.endless()
    next(holder.stream)
    assert not source.over.is_set()
    del holder
    gc.collect()
    assert source.over.wait(10)
    settled(both)


def test_with_closes_the_stream(both, proxy, source):
    with proxy.endless() as stream:
        next(stream)
    assert source.over.wait(10) and source.errors == [GeneratorExit]
    settled(both)


def test_what_closing_raises_harms_nobody(both, proxy, source):
    stream = proxy.raises_in_finally()
    next(stream)
    stream.close()
    assert source.over.wait(10)
    with pytest.raises(ValueError, match="in finally"):
        list(proxy.raises_in_finally())
    assert proxy.echo(1) == 1
    settled(both)


def test_closing_wakes_a_thread_that_reads(both, proxy, source):
    stream = proxy.stuck(1)
    next(stream)
    found = []
    thread = threading.Thread(target=lambda: found.append(list(stream)))
    thread.start()
    until(lambda: both.here.reader.seat)
    stream.close()
    thread.join(10)
    assert found == [[]] and source.over.wait(10)
    settled(both)


@pytest.mark.parametrize("method", ["count", "a_count"])
def test_threads_that_read_one_stream_get_each_item_once(both, proxy, method):
    stream = getattr(proxy, method)(5000)
    parts = in_threads(*[lambda: list(stream)] * 5)
    assert sorted(item for part in parts for item in part) == list(range(5000))
    assert all(part == sorted(part) for part in parts)
    settled(both)


@pytest.mark.parametrize("end", ["close", "crash"])
def test_the_end_of_the_session_ends_every_stream(both, proxy, source, end):
    streams = [proxy.endless(), proxy.a_endless(), proxy.stuck(1), proxy.count(10000)]
    for stream in streams:
        next(stream)
    both.there.channel.shutdown()
    for stream in streams:
        with pytest.raises(miniplug.PluginCrashed):
            for _ in range(20000):
                next(stream)
        assert list(stream) == []
    assert source.over.wait(10)
    until(lambda: not both.there.requests)


# -- deadlines


@pytest.mark.parametrize("method", ["stuck", "a_stuck"])
@pytest.mark.parametrize("submitted", [False, True])
def test_the_deadline_of_a_stream_is_that_of_each_item(both, proxy, source, method, submitted):
    method = getattr(proxy, method).timeout(0.1)
    stream = method.submit(5).result(10) if submitted else method(5)
    assert [next(stream) for _ in range(5)] == list(range(5))
    with pytest.raises(miniplug.CallTimeout) as caught:
        next(stream)
    assert caught.value.seconds == 0.1 and list(stream) == []
    assert source.over.wait(10)
    settled(both)


@pytest.mark.parametrize("submitted", [False, True])
def test_a_stream_may_last_longer_than_its_deadline(both, proxy, submitted):
    method = proxy.ask_between.timeout(0.3)
    args = (lambda value: time.sleep(0.02) or value, 25)
    stream = method.submit(*args).result(10) if submitted else method(*args)
    assert list(stream) == list(range(25))
    settled(both)


def test_a_reader_may_take_longer_than_the_deadline(both, proxy):
    stream = proxy.count.timeout(0.3)(200)
    assert next(stream) == 0
    time.sleep(0.4)
    assert list(stream) == list(range(1, 200))


# -- asyncio


@pytest.mark.parametrize("method", ["count", "a_count", "a_slow_count"])
def test_async_for(both, proxy, method):
    async def main():
        assert [item async for item in getattr(proxy, method)(1000)] == list(range(1000))
        assert [item async for item in await getattr(proxy, method).submit(300)] == list(range(300))
        with await proxy.endless.submit() as stream:
            async for _ in stream:
                break
        with pytest.raises(KeyError):
            async for _ in proxy.fails(10):
                pass

    asyncio.run(main())
    assert both.source.over.wait(10)
    settled(both)


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
@pytest.mark.parametrize("method", ["endless", "a_endless"])
def test_leaving_async_for_frees_the_generator(both, proxy, source, how, method):
    async def read(stream):
        async for item in stream:
            if how == "break" and item == b"100":
                break
            if how == "aclose" and item == b"100":
                await stream.aclose()
                return
            await asyncio.sleep(0)

    async def main():
        task = asyncio.ensure_future(read(getattr(proxy, method)()))
        if how == "cancel":
            while source.made < 100:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task

    asyncio.run(main())
    gc.collect()
    assert source.over.wait(10)
    settled(both)


def test_the_deadline_of_async_for(both, proxy, source):
    async def main():
        found = []
        with pytest.raises(asyncio.TimeoutError):
            async for item in proxy.stuck.timeout(0.1)(3):
                found.append(item)  # noqa: PERF401
        assert found == [0, 1, 2]

    asyncio.run(main())
    assert source.over.wait(10)
    settled(both)


def test_many_tasks_read_streams_of_their_own(both, proxy):
    async def read(number):
        return [item async for item in await proxy.a_slow_count.submit(number)]

    async def main():
        return await asyncio.wait_for(asyncio.gather(*[read(number) for number in range(0, 400, 10)]), 15)

    assert asyncio.run(main()) == [list(range(number)) for number in range(0, 400, 10)]
    settled(both)


def test_tasks_that_read_one_stream_get_each_item_once(both, proxy):
    async def read(stream):
        return [item async for item in stream]

    async def main():
        stream = await proxy.a_slow_count.submit(500)
        return await asyncio.wait_for(asyncio.gather(*[read(stream) for _ in range(3)]), 2)

    parts = asyncio.run(main())
    assert sorted(item for part in parts for item in part) == list(range(500))
    settled(both)


def test_a_task_that_is_cancelled_as_an_item_comes_harms_nobody(both, proxy):
    """The reader tells of the item while the loop gives the wait up."""

    async def main():
        stream = await proxy.slow.submit()
        assert await stream.__anext__() == "first"
        task = asyncio.ensure_future(stream.__anext__())
        while not stream._waiters:
            await asyncio.sleep(0)
        stream._call.watcher()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert proxy.echo(1) == 1


# -- the other way, and both ways


def test_a_callback_may_give_a_stream(both, proxy):
    over = threading.Event()

    def numbers(limit=None):
        try:
            number = 0
            while limit is None or number < limit:
                yield number
                number += 1
        finally:
            over.set()

    async def a_numbers():
        for number in range(300):
            yield number

    assert proxy.take(lambda: numbers(300), None) == list(range(300))
    over.clear()
    assert proxy.take(numbers, 70) == list(range(70))
    assert over.wait(10)
    assert proxy.take(a_numbers, None) == list(range(300))
    assert proxy.a_take(lambda: numbers(300)) == list(range(300))
    assert proxy.a_take(a_numbers) == list(range(300))
    settled(both)


def test_a_stream_that_came_may_be_sent_on(both, proxy):
    """The host's stream goes through the plugin back to the host."""
    over = threading.Event()

    def numbers():
        try:
            yield from range(100000)
        finally:
            over.set()

    stream = proxy.pass_on(numbers)
    assert [next(stream) for _ in range(500)] == list(range(500))
    stream.close()
    assert over.wait(10)
    settled(both)


def test_a_generator_may_call_back_between_items(both, proxy):
    stream = proxy.ask_between(lambda value: [value, proxy.echo(value)], 200)
    for number in range(200):
        assert next(stream) == [number, number]
        proxy.echo(number)
    assert list(stream) == []
    settled(both)


def test_a_stream_of_references_leaks_none_when_it_is_abandoned(both, proxy):
    class Giver:
        def functions(self):
            while True:
                yield lambda: 1

    both.served[0].plugins["g"] = Giver()
    giver = both.dispense("g")
    stream = giver.functions()
    kept = [next(stream) for _ in range(150)]
    assert kept[77]() == 1
    stream.close()
    del kept, stream
    gc.collect()
    until(lambda: (proxy.echo(1), gc.collect(), len(both.there.references._loans) <= 3)[2], 5)  # what is on its way is read
    settled(both)


# -- with plugins of their own processes


PLUGIN = """
    import os, time
    class P:
        def __init__(self): self.over = 0
        def endless(self, size=0):
            try:
                number = 0
                while True:
                    yield [number, b"x" * size]
                    number += 1
            finally:
                self.over += 1
        def overs(self): return self.over
        def dies(self, after):
            for number in range(after):
                yield number
            os._exit(5)
        def memory(self):
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096
        def relay(self, function, *args):
            return function(*args)
        def marks(self, path):
            try:
                while True:
                    yield 1
            finally:
                with open(path, "w") as file:
                    file.write("over")
"""


def test_a_crash_comes_after_the_items(write):
    with miniplug.launch(write("p.py", PLUGIN) + ":P") as plugin:
        found = []
        with pytest.raises(miniplug.PluginCrashed) as caught:
            for item in plugin.dispense().dies(20):
                found.append(item)  # noqa: PERF402
        assert found == list(range(len(found))) and caught.value.exit_code == 5 and not plugin.running


@pytest.mark.parametrize("how", ["close", "kill"])
def test_an_open_stream_ends_with_the_plugin(write, how, tmp_path):
    plugin = miniplug.launch(write("p.py", PLUGIN) + ":P")
    proxy = plugin.dispense()
    streams = [proxy.marks(str(tmp_path / str(number))) for number in range(5)]
    assert [next(stream) for stream in streams] == [1] * 5
    getattr(plugin, how)()
    for stream in streams:
        with pytest.raises(miniplug.PluginClosed):
            for _ in range(1000):
                next(stream)
    if how == "close":
        assert plugin.exit_code == 0 and len(os.listdir(tmp_path)) >= 5  # each generator's finally has run


def test_a_stream_of_one_plugin_goes_through_another(write):
    path = write("p.py", PLUGIN) + ":P"
    with miniplug.launch(path) as first, miniplug.launch(path) as second:
        one, two = first.dispense(), second.dispense()
        stream = two.relay(one.endless)
        assert [next(stream)[0] for _ in range(300)] == list(range(300))
        stream.close()
        until(lambda: one.overs() == 1)
        stream = two.relay(one.endless)
        next(stream)
        first.kill()
        with pytest.raises((miniplug.PluginError, miniplug.RemoteError)):
            for _ in range(1000):
                next(stream)
        assert two.overs() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_stream_that_nobody_reads_takes_bounded_memory(write):
    with miniplug.launch(write("p.py", PLUGIN) + ":P") as plugin:
        proxy = plugin.dispense()
        before = proxy.memory()
        stream = proxy.endless(1 << 20)
        assert next(stream)[0] == 0
        for _ in range(50):
            assert proxy.memory() < before + 200 * (1 << 20)
        assert [next(stream)[0] for _ in range(200)] == list(range(1, 201))
        assert proxy.memory() < before + 200 * (1 << 20)
