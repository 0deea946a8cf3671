"""What test_random_calls.py calls. Run as a script it serves that: python3 peer.py MAX_WORKERS"""

import asyncio
import gc
import sys
import time

import storm

import miniplug


class Peer:
    """The served side. `other` is its proxy of the host's peer."""

    def __init__(self):
        self.other = None
        self.kept = {}
        self.noted = []

    def open_here(self):
        """What this side's session has open, but for the call that asks."""
        gc.collect()
        session, = storm.sessions()
        found = storm.still_open(session)
        found[storm.REQUESTS[0]] -= 1
        return found, storm.holdings(session)

    def echo(self, value):
        return value

    def size(self, data):
        return len(data)

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

    def back_count(self, function, number):
        for value in range(number):
            yield function(value)

    async def a_back_count(self, function, number):
        for value in range(number):
            yield await function.submit(value)

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

    def until_cancelled(self, function):
        found = function(3)
        while not miniplug.cancelled():
            time.sleep(0.0005)
        return found

    def give(self, number):
        return [lambda value, n=n: [n, value] for n in range(number)]


if __name__ == "__main__":
    miniplug.serve({"p": Peer()}, max_workers=int(sys.argv[1]))
