"""All kinds of calls at random, from many threads, each answer checked, and nothing left in either session.

MINIPLUG_RANDOM_SECONDS makes it run longer (600 of them are ten minutes, all tests together), MINIPLUG_RANDOM_SEED repeats a
run."""

import asyncio
import faulthandler
import gc
import os
import random
import sys
import threading
import time
from collections import Counter

import peer
import pytest
import storm
from peer import Peer
from test_session import pair  # noqa: F401

import miniplug

SECONDS = float(os.environ.get("MINIPLUG_RANDOM_SECONDS", "10")) / 6  # for each test
STUCK = 20.0  # seconds after which a call counts as never to return


class Work:
    """One thread's share."""

    def __init__(self, proxy, seed, number):
        self.proxy = proxy
        self.number = number
        self.rng = random.Random(seed * 1000 + number)
        self.step = 0
        self.made = []  # the kinds that were
        self.kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")]

    def once(self):
        self.step += 1
        kind = self.rng.choice(self.kinds)
        kind()
        self.made.append(kind.__name__)

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

    def do_cancel_some(self):
        calls = [self.proxy.echo.submit(number) for number in range(self.rng.randrange(40))]
        cancelled = {number for number, call in enumerate(calls) if self.rng.random() < 0.2 and call.cancel()}
        for number, call in enumerate(calls):
            assert number in cancelled or call.result(STUCK) == number

    def do_numbers(self):
        count = self.rng.choice([1, 100, 3000])
        for values in ([self.rng.randrange(-1 << 62, 1 << 62) for _ in range(count)], [self.rng.random() for _ in range(count)]):
            assert self.proxy.echo(values) == values

    def do_large(self):
        """Also with a deadline that may pass while it is sent."""
        data = b"z" * self.rng.choice([10, 200_000, 3_000_000])
        try:
            assert self.proxy.size.timeout(self.rng.choice([0.0001, 0.001, 0.01, None]))(data) == len(data)
        except miniplug.CallTimeout:
            pass

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

    def aside(self, *functions):
        """Call each in a thread of its own, and wait for them."""
        errors = []

        def run(function):
            try:
                function()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(STUCK)
            assert not thread.is_alive()
        if errors:
            raise errors[0]

    def do_close_from_elsewhere(self):
        stream, found = self.rng.choice([self.proxy.count, self.proxy.a_count])(self.rng.choice([1, 64, 1000])), []
        pause = self.rng.choice([0, self.rng.uniform(0, 0.003)])
        self.aside(lambda: found.extend(stream), lambda: (time.sleep(pause), stream.close()))
        assert found == list(range(len(found)))

    def do_generator_calls_back(self):
        number = self.rng.choice([1, 3, 70])
        method = self.rng.choice([self.proxy.back_count, self.proxy.a_back_count])
        function = self.rng.choice([lambda value: value, lambda value: self.proxy.echo(value)])
        stream = method.submit(function, number).result(STUCK) if self.rng.random() < 0.4 else method(function, number)
        if self.rng.random() < 0.5:
            assert self.proxy.echo(self.step) == self.step
        found, closes = [], self.rng.random() < 0.4
        self.aside(lambda: found.extend(stream), *[stream.close] * closes)
        assert found == list(range(len(found) if closes else number))

    def do_share_a_stream(self):
        number, found = self.rng.choice([1, 64, 200]), []
        stream = self.rng.choice([self.proxy.count, self.proxy.a_count])(number)

        async def take():
            async for item in stream:
                found.append(item)
                await asyncio.sleep(0)

        async def main():
            await asyncio.gather(take(), take())

        self.aside(*self.rng.choices([lambda: asyncio.run(main()), lambda: found.extend(stream)], k=self.rng.randrange(1, 4)))
        assert sorted(found) == list(range(number))

    def do_leave_a_loop(self):
        """It is closed while callbacks come to it."""
        async def main():
            calls = [self.rng.choice([self.proxy.call, self.proxy.a_call]).submit(lambda value: value, n) for n in range(6)]
            await asyncio.wait([asyncio.wrap_future(calls[0])], timeout=self.rng.uniform(0, 0.002))
            return calls

        for call in asyncio.run(main()):
            call.cancel()

    def do_submit_with_deadlines(self):
        function = [].append
        for call in [self.rng.choice([
            lambda seconds: self.proxy.echo.timeout(seconds).submit(None),
            lambda seconds: self.proxy.call.timeout(seconds).submit(function, 1),
            lambda seconds: self.proxy.until_cancelled.timeout(seconds).submit(lambda value: None),
        ])(self.rng.choice([0.0, 0.0005, 0.002, 0.005])) for _ in range(10)]:
            assert isinstance(call.exception(STUCK), (miniplug.CallTimeout, type(None)))

    def do_release_from_elsewhere(self):
        function = self.proxy.give(1)[0]

        def call():
            try:
                assert function(self.step) == [0, self.step]
            except miniplug.DeadReference:
                pass

        self.aside(call, lambda: miniplug.release(function), lambda: miniplug.release(function))

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


def run(proxy, threads, left, give_up):
    """`left` tells what is open: nothing must be, in the end. `give_up` lets threads go that wait for ever."""
    seed = int(os.environ.get("MINIPLUG_RANDOM_SEED", random.randrange(1 << 30)))
    print("MINIPLUG_RANDOM_SEED =", seed)
    before = steady(left)
    end = time.monotonic() + SECONDS
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
            give_up()
            pytest.fail("a call never returned")
    if errors:
        raise errors[0]
    assert sum(work.step for work in works) > threads
    print(Counter(kind for work in works for kind in work.made))
    proxy.echo(0)
    del works, running
    end = time.monotonic() + 10
    while left() != before:
        assert time.monotonic() < end, (left(), before)
        time.sleep(0.01)


def steady(left):
    looks = [None]
    while looks[-5:] != [looks[-1]] * 5:
        time.sleep(0.01)
        looks.append(left())
    return looks[-1]


def run_pair(both, threads):
    """Both sessions in this process."""
    def left():
        gc.collect()
        return [(storm.still_open(session), storm.holdings(session)) for session in (both.here, both.there)]

    try:
        run(both.dispense("p"), threads, left, both.here.channel.shutdown)
    except BaseException:
        print("ended:", repr(both.here.cause), repr(both.there.cause))
        raise


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.timeout(SECONDS + 60)
def test_calls_of_all_kinds_at_random(pair, workers):  # noqa: F811
    run_pair(pair({"p": Peer()}, max_workers=workers), 8)


@pytest.mark.timeout(SECONDS + 60)
def test_the_same_with_threads_switched_all_the_time(pair):  # noqa: F811
    before = sys.getswitchinterval()
    both = pair({"p": Peer()}, max_workers=4)
    sys.setswitchinterval(1e-6)
    try:
        run_pair(both, 6)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("threads", [8, 24])
@pytest.mark.timeout(SECONDS + 60)
def test_the_same_of_a_plugin(threads):
    def left():
        gc.collect()
        here, = storm.sessions()
        return storm.still_open(here), storm.holdings(here), *proxy.open_here()

    with miniplug.launch([sys.executable, peer.__file__, "16"], stderr="inherit") as plugin:
        proxy = plugin.dispense()
        run(proxy, threads, left, plugin.kill)
