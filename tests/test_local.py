"""local: the same plugins in this process, over the same session and codec."""

import asyncio
import os
import threading

import pytest

import miniplug


class Shop:
    def __init__(self):
        self.entered = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        exits.append(threading.current_thread().name)

    def greet(self, name):
        return f"Hello, {name}!"

    def count(self, end):
        yield from range(end)

    def apply(self, function, *args):
        return function(*args)

    def fail(self):
        raise LookupError("not here")

    def thread(self):
        return threading.get_ident()

    def until_cancelled(self):
        self.entered.set()
        while not miniplug.cancelled():
            threading.Event().wait(0.001)

    async def soon(self, value):
        await asyncio.sleep(0)
        return value


exits = []


def test_it_is_called_as_a_plugin_is():
    with miniplug.local({"shop": Shop}, info={"version": "1"}) as plugin:
        shop = plugin.dispense("shop")
        assert shop.greet("you") == "Hello, you!" and shop.soon((1, 2)) == (1, 2)
        assert list(shop.count(300)) == list(range(300))
        assert shop.apply(lambda a, b: [a, b], 1, b"2") == [1, b"2"]
        assert shop.greet.submit("a").result(5) == "Hello, a!"
        assert plugin.info == {"version": "1"} and plugin.describe()["shop"]["greet"].signature == "(name)"
        assert plugin.pid == os.getpid() and plugin.running and plugin.ping() > 0
        with pytest.raises(LookupError, match="not here") as caught:
            shop.fail()
        assert isinstance(caught.value, miniplug.RemoteError)
        with pytest.raises(miniplug.MethodNotFound, match="did you mean 'greet'"):
            shop.great("x")


def test_values_are_copies_and_what_cannot_travel_is_refused():
    value = [1, [2]]

    class Keeper:
        def same(self, given):
            return given is value

    with miniplug.local({"keeper": Keeper()}) as plugin:
        keeper = plugin.dispense()
        assert keeper.same(value) is False
        with pytest.raises(miniplug.NotSerializable):
            keeper.same(object())


def test_a_deadline_holds_and_the_call_is_given_up():
    shop = Shop()
    with miniplug.local({"shop": shop}, call_timeout=0.05) as plugin:
        with pytest.raises(miniplug.CallTimeout):
            plugin.dispense().until_cancelled()
        assert shop.entered.is_set()


def test_it_ends_and_starts_again():
    exits.clear()
    plugin = miniplug.local({"shop": Shop})
    shop = plugin.dispense()
    assert shop.greet("x")
    plugin.close()
    assert (plugin.running, plugin.exit_code, plugin.pid) == (False, 0, None) and len(exits) == 1
    with pytest.raises(miniplug.PluginClosed):
        shop.greet("x")
    plugin.start()
    assert shop.greet("again") == "Hello, again!"  # the same proxy, on a fresh instance
    plugin.kill()
    assert not plugin.running


def test_the_handshake_is_the_real_one():
    theirs = {1: {"shop": Shop}, 2: {"shop": Shop}}
    with miniplug.local(theirs, protocol_versions=[1, 2, 3]) as plugin:
        assert plugin.protocol_version == 2
    with pytest.raises(miniplug.HandshakeError, match="no common protocol version"):
        miniplug.local(theirs, protocol_versions=[3])


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match="python"):
        miniplug.local({"shop": Shop}, python="python3")
    with pytest.raises(TypeError, match="not empty"):
        miniplug.local({})
    with pytest.raises(ValueError, match="reserved"):
        miniplug.local({"system": Shop})
    with pytest.raises(ValueError, match="max_workers=0"):
        miniplug.local({"shop": Shop}, max_workers=0)
    with pytest.raises(TypeError, match="info=7: it is a dict"):
        miniplug.local({"shop": Shop}, info=7)


def test_in_asyncio():
    async def main():
        async with miniplug.local({"shop": Shop}) as plugin:
            shop = plugin.dispense()
            assert await asyncio.gather(*[shop.soon.submit(n) for n in range(50)]) == list(range(50))
            assert [n async for n in shop.count(100)] == list(range(100))

    asyncio.run(main())


def test_a_callback_whose_result_cannot_travel_is_told_as_that():
    told = pytest.raises(miniplug.RemoteError, match=r"^NotSerializable: the result is")
    with miniplug.local({"shop": Shop()}) as plugin, told:
        plugin.dispense().apply(lambda: object())
