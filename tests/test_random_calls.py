"""All kinds of calls at random, from many threads, each answer checked, and nothing left in either session.

MINIPLUG_RANDOM_SECONDS makes it run longer, MINIPLUG_RANDOM_SEED repeats a run."""

import asyncio
import faulthandler
import gc
import os
import random
import sys
import threading
import time

import pytest
from test_session import pair  # noqa: F401

import miniplug

SECONDS = float(os.environ.get("MINIPLUG_RANDOM_SECONDS", "2.5"))
STUCK = 20.0  # seconds after which a call counts as never to return


class Peer:
    """The served side. `other` is its proxy of the host's peer."""

    def __init__(self):
        self.other = None
        self.kept = {}
        self.noted = []

    def echo(self, value):
        return value

    def fail(self, value):
        raise KeyError(value)

    def slow(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not miniplug.cancelled():
            time.sleep(0.0005)
        return seconds

    async def a_slow(self, seconds):
        await asyncio.sleep(seconds)
        return seconds

    async def a_echo(self, value):
        await asyncio.sleep(0)
        return value

    async def a_call(self, function, value):
        return await function.submit(value)

    def note(self, value):
        self.noted.append(value)

    def count(self, number):
        yield from range(number)

    async def a_count(self, number):
        for value in range(number):
            if value % 7 == 0:
                await asyncio.sleep(0)
            yield value

    def failing_count(self, number):
        yield from range(number)
        raise KeyError(number)

    def call(self, function, value):
        return function(value)

    def take(self, function, number):
        return [item for item, _ in zip(function(), range(number))]

    def nest(self, function, depth):
        return [depth, *function(depth - 1)] if depth > 0 else [0]

    def keep(self, key, function):
        self.kept[key] = function

    def use(self, key, value):
        return self.kept[key](value)

    def drop(self, key):
        del self.kept[key]

    def give(self, number):
        return [lambda value, n=n: [n, value] for n in range(number)]


class Work:
    """One thread's share."""

    def __init__(self, proxy, seed, number):
        self.proxy = proxy
        self.number = number
        self.rng = random.Random(seed * 1000 + number)
        self.step = 0
        self.kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")]

    def once(self):
        self.step += 1
        self.rng.choice(self.kinds)()

    def value(self):
        return [self.number, self.step, "x" * self.rng.choice([0, 10, 1000, 70000]), (b"y" * self.rng.choice([0, 100, 5000]),)]

    def do_plain(self):
        for _ in range(10):
            value = self.value()
            assert self.proxy.echo(value) == value

    def do_fail(self):
        with pytest.raises(KeyError):
            self.proxy.fail(self.step)

    def do_submit(self):
        values = [self.value() for _ in range(self.rng.randrange(1, 20))]
        calls = [self.rng.choice([self.proxy.echo, self.proxy.a_echo]).submit(value) for value in values]
        assert [call.result(STUCK) for call in calls] == values

    def do_callbacks(self):
        over = threading.Event()
        value, found = self.value(), []

        def done(call):
            found.append(call.result())
            found.append(self.proxy.echo(self.step))
            over.set()

        self.proxy.echo.submit(value).add_done_callback(done)
        assert over.wait(STUCK) and found == [value, self.step]

    def do_notify(self):
        self.proxy.note.notify([self.number, self.step])

    def do_stream(self):
        number = self.rng.choice([0, 1, 63, 64, 65, 300])
        method = self.rng.choice([self.proxy.count, self.proxy.a_count])
        stream = method.submit(number).result(STUCK) if self.rng.random() < 0.5 else method(number)
        assert list(stream) == list(range(number))

    def do_failing_stream(self):
        number, found = self.rng.randrange(100), []
        with pytest.raises(KeyError):
            for item in self.proxy.failing_count(number):
                found.append(item)  # noqa: PERF402
        assert found == list(range(number))

    def do_leave_stream(self):
        stream = self.rng.choice([self.proxy.count, self.proxy.a_count])(10000)
        number = self.rng.randrange(150)
        assert [item for item, _ in zip(stream, range(number))] == list(range(number))
        if self.rng.random() < 0.5:
            stream.close()

    def do_callback(self):
        value = self.value()
        method = self.rng.choice([self.proxy.call, self.proxy.a_call])
        function = self.rng.choice([lambda got: [got], lambda got: [self.proxy.echo(got)]])
        assert method(function, value) == [value]

    def do_failing_callback(self):
        def fail(value):
            raise KeyError(value)

        with pytest.raises(KeyError):
            self.rng.choice([self.proxy.call, self.proxy.a_call])(fail, self.step)

    def do_stream_back(self):
        number = self.rng.randrange(1, 200)
        assert self.proxy.take(lambda: iter(range(1000)), number) == list(range(number))

    def do_nest(self):
        depth = self.rng.randrange(12)

        def back(depth):
            if depth <= 0:
                return [0]
            rest = self.proxy.nest(back, depth - 1) if depth % 2 else self.proxy.nest.submit(back, depth - 1).result(STUCK)
            return [depth, *rest]

        assert self.proxy.nest(back, depth) == list(range(depth, -1, -1))

    def do_timeout(self):
        method = self.rng.choice([self.proxy.slow, self.proxy.a_slow]).timeout(self.rng.choice([0.0, 0.001, 0.01]))
        with pytest.raises(miniplug.CallTimeout):
            method.submit(5).result(STUCK) if self.rng.random() < 0.5 else method(5)

    def do_tight_timeout(self):
        try:
            assert self.proxy.echo.timeout(self.rng.choice([0.0, 0.0003, 0.001]))(self.step) == self.step
        except miniplug.CallTimeout:
            pass

    def do_cancel(self):
        call = self.rng.choice([self.proxy.slow, self.proxy.a_slow]).submit(self.rng.choice([0, 0.001, 5]))
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0, 0.002))
        if not call.cancel():
            assert call.result(0) <= 0.001

    def do_keep(self):
        key, value = f"{self.number}.{self.step}", self.value()
        self.proxy.keep(key, lambda got: [key, got])
        assert self.proxy.use(key, value) == [key, value]
        self.proxy.drop(key)

    def do_borrow(self):
        functions = self.proxy.give(5)
        for number in self.rng.sample(range(5), 3):
            assert functions[number](self.step) == [number, self.step]
        assert self.proxy.call(functions[4], self.step) == [4, self.step]
        miniplug.release(functions[0])
        with pytest.raises(miniplug.DeadReference):
            functions[0](1)

    def do_asyncio(self):
        async def main():
            found = await asyncio.gather(*[self.proxy.a_echo.submit(n) for n in range(10)])
            return found, [item async for item in await self.proxy.a_count.submit(70)]

        assert asyncio.run(main()) == (list(range(10)), list(range(70)))


def run(both, seconds, threads):
    seed = int(os.environ.get("MINIPLUG_RANDOM_SEED", random.randrange(1 << 30)))
    print("MINIPLUG_RANDOM_SEED =", seed)
    proxy = both.dispense("p")
    end = time.monotonic() + seconds
    works = [Work(proxy, seed, number) for number in range(threads)]
    errors = []

    def loop(work):
        try:
            while time.monotonic() < end and not errors:
                work.once()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=loop, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(max(0, end - time.monotonic()) + STUCK)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
            both.here.channel.shutdown()  # let the others go
            pytest.fail("a call never returned")
    if errors:
        print("ended:", repr(both.here.cause), repr(both.there.cause))
        raise errors[0]
    assert sum(work.step for work in works) > threads
    proxy.echo(0)
    del works
    nothing_open(both)


def nothing_open(both):
    here, there = both.here, both.there

    def left():
        gc.collect()
        return [here.calls, there.calls, here.requests, there.requests, here.reader.unattended, there.reader.unattended,
                here.reader.sleepers, there.reader.sleepers, here.runner.slots.queue, there.runner.slots.queue, dict(list(here.references._loans.items())[1:]),
                dict(list(there.references._loans.items())[2:])]

    end = time.monotonic() + 10
    while any(left()):
        assert time.monotonic() < end, [list(each) for each in left()]
        time.sleep(0.01)
    assert len(here.runner.slots.free) == 64 and len(there.runner.slots.free) == both.workers


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.timeout(SECONDS + 60)
def test_calls_of_all_kinds_at_random(pair, workers):  # noqa: F811
    both = pair({"p": Peer()}, max_workers=workers)
    both.workers = workers
    run(both, SECONDS, 10)


@pytest.mark.timeout(SECONDS + 60)
def test_the_same_with_threads_switched_all_the_time(pair):  # noqa: F811
    before = sys.getswitchinterval()
    both = pair({"p": Peer()}, max_workers=4)
    both.workers = 4
    sys.setswitchinterval(1e-6)
    try:
        run(both, SECONDS, 6)
    finally:
        sys.setswitchinterval(before)
