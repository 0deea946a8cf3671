"""Typed proxies: what an interface may ask, what is told of a plugin, and what a proxy refuses."""

import abc
import asyncio
import copy
import inspect
import os
import pickle
import sys
import threading
import typing

import pytest
from conftest import WORKSHOP
from test_session import frame, pair, raw  # noqa: F401

import miniplug

T = typing.TypeVar("T")

HERE = os.path.dirname(os.path.abspath(__file__))


class Shop:
    """All the kinds of methods there are."""

    def plain(self, a, b):
        """Two by position or by name."""

    def defaults(self, a, b=2, *, c=3):
        pass

    def only_names(self, *, a, b=1):
        pass

    def everything(self, *args, **kwargs):
        pass

    def many(self, *args):
        pass

    def named(self, **kwargs):
        pass

    @staticmethod
    def static(a: int, b: str = "x") -> "typing.List[int]":
        """A static one."""

    @classmethod
    def of_class(cls, a):
        pass

    async def later(self, a):
        pass

    def _private(self):
        pass

    value = 7


def adopt(both, interface):
    proxy = both.dispense("s")
    proxy._adopt(interface)
    return proxy


@pytest.fixture
def both(pair):  # noqa: F811
    return pair({"s": Shop()})


def interface(source, base=abc.ABC):
    """A class whose methods are declared like that."""
    scope = {"abc": abc, "Base": base, "typing": typing}
    exec(f"class Interface(Base):\n    {source}", scope)
    return scope["Interface"]


AGREES = [
    "def plain(self, a, b): ...",
    "def defaults(self, a, b=2, *, c=3): ...",
    "def defaults(self, a): ...",
    "def defaults(self, a, b): ...",
    "def defaults(self, a, *, c): ...",
    "def only_names(self, *, a): ...",
    "def only_names(self, *, b=1, a): ...",
    "def everything(self, a, b=1, *c, d, e=2, **f): ...",
    "def many(self): ...",
    "def many(self, *args): ...",
    "def named(self, *, a, b=3, **kwargs): ...",
    "@staticmethod\n    def static(a, b='y'): ...",
    "def static(self, a): ...",
    "@classmethod\n    def of_class(cls, a): ...",
    "def of_class(self, a): ...",
    "async def later(self, a): ...",
    "def later(self, a): ...",
    "_own = 1\n    def _helper(self): ...",
    "@property\n    def concrete(self): return 1",
]


@pytest.mark.parametrize("source", AGREES)
@pytest.mark.parametrize("base", [abc.ABC, object])
def test_what_agrees_passes(both, source, base):
    made = interface(source, base)
    assert isinstance(adopt(both, made), made)


DIFFERS = [
    ("def plain(self, a): ...", "plain"),
    ("def plain(self, a, b, c): ...", "plain"),
    ("def plain(self, a, b=1): ...", "plain"),
    ("def plain(self, a, c): ...", "plain"),
    ("def plain(self, b, a): ...", "plain"),
    ("def plain(self, *args): ...", "plain"),
    ("def plain(self, a, b, *args): ...", "plain"),
    ("def plain(self, a, b, **kwargs): ...", "plain"),
    ("def plain(self, *, a, c): ...", "plain"),
    ("def defaults(self, a, b, c): ...", "defaults"),
    ("def defaults(self): ...", "defaults"),
    ("def only_names(self, a): ...", "only_names"),
    ("def only_names(self): ...", "only_names"),
    ("def many(self, a): ...", "many"),
    ("def many(self, *, a): ...", "many"),
    ("def named(self, a): ...", "named"),
    ("@staticmethod\n    def static(): ...", "static"),
    ("@classmethod\n    def of_class(cls): ...", "of_class"),
    ("@classmethod\n    def of_class(cls, a, b): ...", "of_class"),
    ("def missing(self): ...", "'missing'"),
    ("def concrete(self): return 1", "'concrete'"),
    ("@property\n    @abc.abstractmethod\n    def prop(self): ...", "'prop' is a property"),
    ("@abc.abstractmethod\n    def _hidden(self): ...", "'_hidden' is private"),
]


@pytest.mark.parametrize("source, named", DIFFERS)
def test_what_differs_is_told(both, source, named):
    with pytest.raises(miniplug.InterfaceMismatch) as caught:
        adopt(both, interface(source))
    assert len(caught.value.differences) == 1 and named in caught.value.differences[0]
    assert caught.value.differences[0] in str(caught.value) and isinstance(caught.value, TypeError)


def test_every_difference_is_in_one_error(both):
    sources = "\n    ".join(source for source, named in DIFFERS if "missing" not in source and "plain(" not in source)
    with pytest.raises(miniplug.InterfaceMismatch) as caught:
        adopt(both, interface(sources))
    told = "\n".join(caught.value.differences)
    for name in ("defaults", "only_names", "many", "named", "static", "of_class", "'concrete'", "'prop'", "'_hidden'"):
        assert told.count(f"{name}(") + told.count(f"{name} is") + told.count(f"method {name}") >= 1, name
    assert len(caught.value.differences) == 9


def test_protocols(both):
    class Plain(typing.Protocol):
        def plain(self, a, b): ...

    class Missing(Plain, typing.Protocol):
        def nothing(self): ...

        @property
        def value(self): ...

    assert adopt(both, Plain) is not None
    with pytest.raises(miniplug.InterfaceMismatch) as caught:
        adopt(both, Missing)
    assert len(caught.value.differences) == 2


def test_positional_only_arguments(both):
    assert adopt(both, interface("def plain(self, x, y, /): ..."))
    with pytest.raises(miniplug.InterfaceMismatch):
        adopt(both, interface("def plain(self, x, /, c): ..."))


def test_dispense_checks_at_once_and_gives_an_instance():
    class Greeter(abc.ABC):
        @abc.abstractmethod
        def greet(self, name): ...

        def twice(self, name):
            return "not run here"

    class Only(abc.ABC):
        @abc.abstractmethod
        def greet(self, name): ...

    with miniplug.launch(WORKSHOP) as plugin:
        greeter = plugin.dispense("workshop", Only, timeout=20)
        assert isinstance(greeter, Only) and greeter.greet(name="you") == "Hello, you!"
        with pytest.raises(miniplug.InterfaceMismatch, match="'twice'"):
            plugin.dispense("workshop", Greeter)
        assert plugin.running


# -- what an interface declares async


class Shelf:
    """Its methods are not async themselves."""

    def __init__(self):
        self.gate = threading.Event()

    def fetch(self, name):
        assert self.gate.wait(20)
        return name.upper()

    def items(self, count):
        yield 0
        assert self.gate.wait(20)
        yield from range(1, count)

    def open(self):
        self.gate.set()


class Fetcher(abc.ABC):
    @abc.abstractmethod
    async def fetch(self, name: str) -> str: ...

    @abc.abstractmethod
    async def items(self, count: int):
        yield count

    @abc.abstractmethod
    def open(self) -> None: ...


@pytest.mark.parametrize("served", [Shelf, "async"])
def test_what_an_interface_declares_async_is_awaited_and_does_not_block_the_loop(served):
    """Each waits at the plugin until the loop has made another call: one that blocked the loop would wait for ever."""
    class AsyncShelf(Shelf):
        async def fetch(self, name):
            return await asyncio.get_running_loop().run_in_executor(None, Shelf.fetch, self, name)

        async def items(self, count):
            for item in range(count):
                yield item

    async def main(shelf):
        call = shelf.fetch("a")
        assert inspect.iscoroutine(call)
        task = asyncio.ensure_future(call)
        items = shelf.items(5)
        found = [await items.__anext__()]
        with pytest.raises(miniplug.CallTimeout):
            await shelf.fetch.timeout(0.01)("c")
        assert not task.done()
        await shelf.open.submit()
        found.extend([item async for item in items])
        assert (await task, found) == ("A", [0, 1, 2, 3, 4])
        assert await shelf.fetch.timeout(20)("b") == "B" == await shelf.fetch.submit("b")
        early = shelf.items(1000)
        async for item in early:
            if item == 3:
                break
        await early.aclose()

    with miniplug.local({"shelf": Shelf if served is Shelf else AsyncShelf}) as plugin:
        asyncio.run(main(plugin.dispense("shelf", Fetcher)))
        plain = plugin.dispense("shelf")  # without the interface it is as any
        plain.open()
        assert plain.fetch("d") == "D" and list(plain.items(3)) == [0, 1, 2]


# -- what is told


def test_describe_tells_signatures_and_docs():
    with miniplug.launch(WORKSHOP) as plugin:
        found = plugin.describe()
        assert list(found) == ["workshop"]
        greet = found["workshop"]["greet"]
        assert greet == miniplug.MethodInfo("greet", "(name)", "Say hello.")
        assert found["workshop"]["echo"].signature == "(*args, **kwargs)" and found["workshop"]["echo"].doc is None
        assert "__init__" not in found["workshop"] and "lock" not in found["workshop"]


def test_dir_and_hasattr(both):
    proxy = both.dispense("s")
    assert {"plain", "static", "of_class", "later"} <= set(dir(proxy))
    assert hasattr(proxy, "plain") and not hasattr(proxy, "value") and not hasattr(proxy, "_private")
    assert getattr(proxy, "nothing", "default") == "default"
    with pytest.raises(miniplug.MethodNotFound, match="did you mean 'plain'") as caught:
        proxy.plane()
    assert "plain" in caught.value.matches


# -- what is refused


def test_attributes_cannot_be_set(both):
    proxy = both.dispense("s")
    for name in ("new", "plain", "_private", "value"):
        with pytest.raises(AttributeError, match="has methods only"):
            setattr(proxy, name, 1)
    assert callable(proxy.plain)


@pytest.mark.parametrize("use", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(both, use):
    proxy = both.dispense("s")
    for each in (proxy, proxy.plain, [proxy]):
        if each == [proxy] and use is copy.copy:
            continue
        with pytest.raises(miniplug.NotSerializable, match="proxy"):
            use(each)


# -- what a foreign plugin may answer


def test_a_plugin_that_does_not_describe_itself_is_dispensed():
    class Greeter(abc.ABC):
        @abc.abstractmethod
        def greet(self, name): ...

    with miniplug.launch([sys.executable, os.path.join(HERE, "plugins", "raw_plugin.py")], env={"PYTHONPATH": ""}) as plugin:
        greeter = plugin.dispense("greeter", Greeter)
        assert greeter.greet("you") == "Hello, you!" and isinstance(greeter, Greeter)


RUBBISH = [
    b"null", b"7", b"[]", b'"x"', b"{}", b'{"plain":7}', b'{"plain":[]}', b'{"plain":[1,2,3]}', b'{"plain":[null,null,null]}',
           b'{"plain":["(","doc",[[]]]}', b'{"plain":["(","doc",[["a",9,null,null],["return",0,null,null]]]}',
           b'{"plain":["(","doc",[[7,1,null,null],["return",0,null,null]]]}',
           b'{"plain":["(","doc",[["a b",1,null,null],["return",0,null,null]]]}',
           b'{"plain":["(","doc",[["a",[],null,null],["return",0,null,null]]]}',
           b'{"plain":["(","doc",[["a",1,null,null],["a",1,null,null],["return",0,null,null]]]}',
           b'{"plain":["(","doc",[["a",2,"1",null],["b",1,[],{}],["return",0,null,null]]]}']


@pytest.mark.parametrize("body", RUBBISH)
def test_rubbish_about_itself_does_no_harm(body):
    class Plain(abc.ABC):
        @abc.abstractmethod
        def plain(self, a): ...

    session, theirs = raw()

    def answer():  # each call once it is made: before, there is none that it could be about
        for number, flags, value in ((1, 1, b'{"$ref":[5,["plain"],false]}'), (2, 0, body), (3, 0, body)):
            if theirs.recv(1 << 16):
                theirs.sendall(frame(3, value, flags=flags, number=number))

    answering = threading.Thread(target=answer)
    answering.start()
    proxy = session.call(0, "dispense", ("s",), {}, 10)
    proxy._adopt(Plain)
    assert isinstance(proxy, Plain)
    getattr(proxy.plain, "__signature__", None)
    assert session.ended is None
    session.end(EOFError())
    session.dispose()
    answering.join()
    theirs.close()


# -- what is dispensed

def double(number, by=2):
    """Twice as much, or more."""
    return number * by


class Callback(typing.Generic[T]):
    def get(self, key: T) -> T: ...


def test_a_function_is_dispensed_and_called():
    with miniplug.local({"double": double}) as plugin:
        proxy = plugin.dispense()
        assert proxy(4) == 8 and proxy(4, by=3) == 12 and proxy.submit(5).result(5) == 10
        with pytest.raises(miniplug.InterfaceMismatch, match="is no Shop: it has no method 'defaults'"):
            plugin.dispense("double", Shop)
        plugin.close()
        plugin.start()
        assert proxy(1) == 2


def test_a_function_of_a_spec_is_dispensed_and_called(write):
    with miniplug.launch(write("tools.py", "def double(x):\n    return 2 * x\n") + ":double") as plugin:
        proxy = plugin.dispense()
        assert proxy(3) == 6
        plugin.restart()
        assert proxy(4) == 8


def test_an_interface_that_is_generic_may_be_given_its_types():
    class Served:
        def get(self, key):
            return key

    with miniplug.local({"s": Served}) as plugin:
        assert plugin.dispense("s", Callback[int]).get(3) == 3


def test_what_is_no_name_and_no_interface_is_refused():
    with miniplug.local({"s": Shop()}) as plugin:
        with pytest.raises(TypeError, match=r"name=<class .*Shop'>: it is a str"):
            plugin.dispense(Shop)
        with pytest.raises(TypeError, match="interface='Shop': it is a class"):
            plugin.dispense("s", "Shop")
        with pytest.raises(miniplug.PluginNotFound, match=r"name='x': what is served is s$"):
            plugin.dispense("x")


def test_what_is_dispensed_is_the_plugins():
    kept = []

    class Keeper:
        def keep(self, obj):
            kept.append(obj)

    with miniplug.local({"s": Shop()}, name="first") as one, miniplug.local({"k": Keeper(), "s": lambda: kept[0]}) as two:
        proxy = one.dispense("s")
        two.dispense("k").keep(proxy)
        with pytest.raises(miniplug.ProtocolError):
            two.dispense("s")
        assert repr(proxy) == "<proxy of the plugin 's'>" and proxy._target._supervisor is one._supervisor


@pytest.mark.skipif(sys.version_info < (3, 14), reason="before that such a module does not load")
def test_a_name_in_an_annotation_that_is_not_there(write):
    shop = write("shop.py", """
        class Shop:
            def buy(self, item: Missing, count: int = 1):
                return [item, count]
        """)

    class Interface:
        def buy(self, item, count=2): ...

    with miniplug.launch(shop + ":Shop") as plugin:
        assert "item" in plugin.describe()["shop"]["buy"].signature
        assert plugin.dispense(interface=Interface).buy("a") == ["a", 1]


def test_names_that_are_no_text_are_left_out_of_a_description():
    row = [None, None, []]
    assert miniplug._checked_description({"go": row, 5: row, None: row, "bad": [None]}) == {"go": row}
