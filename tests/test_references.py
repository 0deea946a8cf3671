"""Callbacks and references: what is lent, comes home, is given back; and nesting by them."""

import asyncio
import collections
import functools
import gc
import threading

import pytest
from conftest import WINE, run_python, swallow, until
from test_session import LIMIT, in_threads, pair  # noqa: F401

import miniplug


class Thing:
    def __init__(self, name="thing"):
        self.name = name

    def get(self):
        return self.name

    def me(self):
        return miniplug.ref(self)

    def fail(self):
        raise KeyError(self.name)


class Callable(Thing):
    def __call__(self, *args, **kwargs):
        return ["called", *args, kwargs]


class Silent:
    def __call__(self, value):
        return value * 2


class Keeper:
    """What the other side sends, kept, called and sent back."""

    def __init__(self):
        self.kept = []
        self.threads = []

    def call(self, function, *args, **kwargs):
        return function(*args, **kwargs)

    async def a_call(self, function, *args):
        return await function.submit(*args)

    def call_method(self, thing, name, *args):
        return getattr(thing, name)(*args)

    def keep(self, *things):
        self.kept.extend(things)

    def drop(self):
        self.kept.clear()

    def back(self):
        return self.kept

    def echo(self, value):
        return value

    def register(self, function):
        if function not in self.kept:
            self.kept.append(function)

    def unregister(self, function):
        self.kept.remove(function)

    def count(self):
        return len(self.kept)

    def give(self, number=1):
        return [lambda value, n=n: [n, value] for n in range(number)]

    def give_things(self, number):
        return {str(n): [miniplug.ref(Thing(n))] for n in range(number)}

    def give_thing(self):
        return miniplug.ref(Thing("given"))

    def give_class(self):
        return Thing

    def give_ref_class(self):
        return miniplug.ref(Thing)

    def give_bad(self):
        return [lambda: 1, object()]

    def give_large(self):
        return [lambda: 1, b"x" * (2 * LIMIT)]

    def release(self):
        for thing in self.kept:
            miniplug.release(thing)

    def fire(self, *args):
        """Call what is kept from a thread of its own, on behalf of no call."""
        self.threads.append(threading.Thread(target=lambda: [each(*args) for each in self.kept]))
        self.threads[-1].start()

    def same(self, one, other):
        return one == other, hash(one) == hash(other), one != other

    def isolate(self, function):
        try:
            function()
        except Exception as error:
            return type(error).__mro__[-4].__name__, isinstance(error, miniplug.RemoteError), str(error)
        return None

    def nest(self, function, depth):
        return [depth, *function(depth - 1)] if depth else [0]


@pytest.fixture
def both(pair):  # noqa: F811
    made = pair({"k": Keeper()})
    made.keeper = made.served[0].plugins["k"]
    yield made
    made.keeper.drop()
    for thread in made.keeper.threads:
        thread.join(10)


@pytest.fixture
def keeper(both):
    return both.keeper


@pytest.fixture
def proxy(both):
    return both.dispense("k")


def loans(session):
    gc.collect()
    return len(session.references._loans) - 1


def given_back(both, here=0, there=1):
    """No more is lent than that: nothing here, and there the keeper itself."""
    until(lambda: (loans(both.here), loans(both.there)) == (here, there), 5)
    assert len(both.here.references._lent) == here and len(both.there.references._lent) == there


def double(value):
    return value * 2


# -- what goes by reference


def test_no_lock_is_left_held_by_what_a_handler_raises_as_it_is_taken(both, proxy):
    """As Python 3.14 lets one raise between the two steps of a `with`."""
    class Lock:
        def __init__(self, lock):
            self.acquire, self.release = lock.acquire, lock.release

        def __enter__(self):
            self.acquire()
            raise KeyboardInterrupt

        def __exit__(self, *_):
            self.release()

    references, lock = both.here.references, both.here.references._lock
    references._lock = Lock(lock)
    content = both.here.codec.dumps(double, "value")
    references.unlend(content[3])
    references._lock = lock
    assert proxy.call(double, 2) == 4
    given_back(both)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_what_a_handler_has_left_half_lent_is_lent_all_the_same(both, proxy, error):
    references = both.here.references

    class Struck(dict):
        def setdefault(self, *_):
            references._loans = dict(self)
            raise error("struck")

    references._loans = Struck(references._loans)
    with pytest.raises(error):
        proxy.call(double, 2)
    assert proxy.call(double, 2) == 4
    given_back(both)


@pytest.mark.parametrize("function", [double, lambda value: value * 2, functools.partial(pow, 2), Thing("x").get, [].append, len,
                                      Callable(), Silent(), asyncio.sleep])
@pytest.mark.parametrize("nested", [False, True])
def test_callables_go_and_come_home_as_themselves(both, proxy, function, nested):
    sent = {"a": [function, (function,)]} if nested else function
    home = proxy.echo(sent)
    for found in (home["a"][0], home["a"][1][0]) if nested else (home,):
        assert found is function or found == function
    given_back(both)


def test_callables_are_called_from_the_other_side(both, proxy):
    assert proxy.call(double, 4) == 8
    assert proxy.call(lambda *args, **kwargs: [args, kwargs], 1, 2, a=3) == [(1, 2), {"a": 3}]
    assert proxy.call(functools.partial(pow, 2), 10) == 1024
    assert proxy.call(Thing("bound").get) == "bound"
    assert proxy.call(Silent(), 5) == 10
    assert proxy.call(Callable(), 1, a=2) == ["called", 1, {"a": 2}]
    assert proxy.call_method(Callable("named"), "get") == "named"
    found = []
    assert proxy.call(found.append, 7) is None and found == [7]
    given_back(both)


def test_the_other_sides_callables_are_called_here(both, proxy):
    functions = proxy.give(5)
    assert [function("x") for function in functions] == [[n, "x"] for n in range(5)]
    assert [call.result(10) for call in [function.submit("y") for function in functions]] == [[n, "y"] for n in range(5)]
    functions[0].notify("z")
    things = proxy.give_things(3)
    assert [things[str(n)][0].get() for n in range(3)] == [0, 1, 2]
    assert things["1"][0].me().get() == 1
    del functions, things
    given_back(both)


def test_objects_go_by_reference_when_they_are_told_to(both, proxy):
    thing = Thing("mine")
    assert proxy.call_method(miniplug.ref(thing), "get") == "mine"
    assert proxy.echo(miniplug.ref(thing)) is thing
    assert proxy.echo([{"a": (miniplug.ref(thing),)}])[0]["a"][0] is thing
    with pytest.raises(miniplug.NotSerializable, match=r"args\[0\]\[1\]"):
        proxy.echo([miniplug.ref(thing), thing])
    given_back(both)


def test_a_class_goes_as_a_callable(both, proxy):
    assert proxy.echo(Thing) is Thing
    assert callable(proxy.give_class())
    assert proxy.echo(miniplug.ref(Thing)) is Thing
    theirs = proxy.give_ref_class()
    with pytest.raises(miniplug.NotSerializable):
        theirs("made")
    del theirs
    given_back(both)


def test_the_other_sides_come_home_to_it_as_themselves(both, proxy, keeper):
    function, = proxy.give()
    thing = proxy.give_thing()
    proxy.keep(function, thing, proxy, thing.get)
    theirs, object_, self_, method = keeper.kept
    assert theirs.__name__ == "<lambda>" and type(object_) is Thing and self_ is keeper and method == object_.get
    del function, thing, theirs, object_, self_, method
    keeper.drop()
    given_back(both)


def test_equal_proxies_stand_for_the_same_object(both, proxy, keeper):
    thing = Thing()
    for one in (double, thing.get, Silent(), miniplug.ref(thing)):
        assert proxy.same(one, one) == (True, True, False)
        for _ in range(3):
            proxy.register(one)
        assert proxy.count() == 1
        proxy.unregister(one)
        assert proxy.count() == 0
    assert proxy.same(double, lambda: 1)[0] is False
    assert proxy.same(thing.get, thing.me)[0] is False
    assert proxy.same(thing.get, Thing().get)[0] is False
    given_back(both)


def test_bound_methods_of_builtin_types_are_equal_too(both, proxy):
    found = []
    proxy.register(found.append)
    proxy.unregister(found.append)


def test_thousands_of_callbacks_leak_nothing(both, proxy):
    for number in range(3000):
        assert proxy.call(lambda number=number: number) == number
    for _ in range(3):
        proxy.echo([lambda: 1 for _ in range(3000)])
        assert len(proxy.give(3000)) == 3000
    given_back(both)
    assert proxy.echo(1) == 1


def test_very_many_references_at_once_are_given_back(both, proxy):
    """All of them fall to the garbage collector in one moment."""
    count = 10000 if WINE else 40000  # there each takes a millisecond
    functions = proxy.give(count)
    assert loans(both.there) == count + 1
    del functions
    until(lambda: loans(both.there) == 1, 10)
    assert proxy.echo(1) == 1


@pytest.mark.parametrize("bad", [object(), b"x" * (2 * LIMIT), float("nan"), "\ud800", [[float("inf"), object()]]])
def test_what_fails_to_be_sent_lends_nothing(both, proxy, bad):
    for _ in range(20):
        swallow(proxy.echo, [double, miniplug.ref(Thing()), (lambda: 1,), bad])
        swallow(proxy.echo.submit, [double, bad])
        swallow(proxy.echo.notify, [double, bad])
    given_back(both)


def test_results_that_fail_to_be_sent_lend_nothing(both, proxy):
    for _ in range(20):
        with pytest.raises(miniplug.NotSerializable):
            proxy.give_bad()
        with pytest.raises(miniplug.MessageTooLarge):
            proxy.give_large()
    given_back(both)


def test_recursive_values_lend_nothing(both, proxy):
    endless = [double]
    endless.append(endless)
    with pytest.raises(miniplug.NotSerializable):
        proxy.echo(endless)
    given_back(both)


def test_answers_that_come_too_late_are_given_back(both, proxy):
    for _ in range(50):
        swallow(proxy.give.timeout(0.0003), 20)
        proxy.give.submit(20).cancel()
    until(lambda: (proxy.echo(1), loans(both.there) == 1)[1], 10)  # an idle host reads them with its next call
    given_back(both)


def test_a_released_reference_is_dead_here_and_there(both, proxy, keeper):
    function, = proxy.give()
    other = proxy.echo([function])[0]
    assert function(1) == other(1) == [0, 1]
    miniplug.release(function)
    for use in (function, function.submit, function.notify):
        with pytest.raises(miniplug.DeadReference, match="released"):
            use(1)
    miniplug.release(function)
    assert other(2) == [0, 2]  # another reference to the same
    del other, function
    with pytest.raises(TypeError, match="proxy"):
        miniplug.release(double)
    proxy.keep(double)
    proxy.release()
    until(lambda: loans(both.here) == 0)
    with pytest.raises(miniplug.DeadReference):
        keeper.kept[0](1)
    keeper.drop()
    given_back(both)


def test_a_released_reference_that_is_sent_fails_that_call_only(both, proxy):
    function, = proxy.give()
    miniplug.release(function)
    with pytest.raises(miniplug.PluginError, match="released"):
        proxy.call(function, 1)
    assert proxy.echo("well") == "well"
    del function
    given_back(both)


def test_what_was_released_on_its_way_home_fails_that_call_only(both, proxy):
    function, = proxy.give()
    session = both.here
    miniplug.release(function)
    until(lambda: loans(both.there) == 1)
    function._target.released = False  # as for a thread that has packed it just before
    with pytest.raises(miniplug.PluginError) as caught:
        proxy.echo(function)
    assert not isinstance(caught.value, miniplug.PluginCrashed) and session.ended is None
    assert proxy.echo("well") == "well"
    function._target.released = True


def test_a_reference_outlives_its_plugin_as_a_dead_one(both, proxy):
    function, = proxy.give()
    thing = proxy.give_thing()
    both.there.channel.shutdown()
    for use in (function, function.submit, thing.get, thing.get.submit, function.notify):
        with pytest.raises((miniplug.DeadReference, miniplug.PluginCrashed)):
            use()
    until(lambda: both.here.ended is not None)
    for use in (function, function.submit, thing.get, thing.get.submit, function.notify):
        with pytest.raises(miniplug.DeadReference, match="gone"):
            use()
    miniplug.release(function)


def test_references_are_given_back_while_other_threads_call(both, proxy):
    def work():
        for number in range(150):
            assert proxy.call(lambda number=number: number) == number
            assert proxy.give(3)[1](number) == [1, number]
        return True

    assert in_threads(*[work] * 6) == [True] * 6
    given_back(both)


# -- callbacks at any time, from anywhere


def test_a_kept_callback_is_called_while_the_host_is_idle(both, proxy):
    got = []
    over = threading.Event()

    def callback(value):
        got.append((value, threading.current_thread().name.startswith("miniplug")))
        over.set()

    proxy.keep(callback)
    for number in range(5):
        over.clear()
        both.keeper.fire(number)
        assert over.wait(10)
        for thread in both.keeper.threads:
            thread.join(10)
    assert got == [(number, True) for number in range(5)]
    proxy.drop()
    given_back(both)


def test_an_exception_passes_through_as_itself_both_ways(both, proxy):
    def fail():
        raise KeyError("deep", 7)

    with pytest.raises(KeyError) as caught:
        proxy.call(fail)
    assert type(caught.value) is KeyError and caught.value.args == ("deep", 7)  # it began here: this is the original
    assert proxy.isolate(fail)[1:] == (True, "('deep', 7)")

    def missing():
        open("/no/such/file")  # noqa: SIM115

    with pytest.raises(FileNotFoundError) as caught:
        proxy.call(lambda: proxy.call(missing))
    assert caught.value.filename == "/no/such/file"
    given_back(both)


@pytest.mark.parametrize("workers", [1, 3])
def test_callbacks_nest_to_any_depth(pair, workers):  # noqa: F811
    proxy = pair({"k": Keeper()}, max_workers=workers).dispense("k")

    def back(depth):
        return [depth, *proxy.nest(back, depth - 1)] if depth > 0 else [0]

    def back_by_submit(depth):
        return [depth, *proxy.nest.submit(back_by_submit, depth - 1).result(20)] if depth > 0 else [0]

    assert proxy.nest(back, 60) == list(range(60, -1, -1))
    assert proxy.nest(back_by_submit, 60) == list(range(60, -1, -1))
    assert in_threads(*[lambda: proxy.nest(back, 20), lambda: proxy.nest(back_by_submit, 20)] * 5) == [list(range(20, -1, -1))] * 10


def test_an_exception_passes_through_many_levels(both, proxy):
    def fail(depth):
        if not depth:
            raise KeyError("bottom")
        return proxy.call(fail, depth - 1)

    with pytest.raises(KeyError, match="bottom"):
        fail(25)
    given_back(both)


def test_async_methods_call_callbacks_back(both, proxy):
    assert proxy.a_call(double, 4) == 8

    async def main():
        return await asyncio.gather(*[proxy.a_call.submit(double, n) for n in range(100)])

    assert asyncio.run(main()) == [n * 2 for n in range(100)]
    given_back(both)


def test_a_callback_of_a_cancelled_call_is_told_so(both, proxy):
    told = threading.Event()
    entered = threading.Event()

    def callback():
        entered.set()
        until(miniplug.cancelled)
        told.set()

    class Asker:
        def ask(self, function):
            swallow(function.timeout(0.05))

    both.served[0].plugins["a"] = Asker()
    both.dispense("a").ask(callback)
    assert entered.wait(10) and told.wait(10)


# -- more than one plugin


def test_a_proxy_passes_on_to_another_plugin(pair):  # noqa: F811
    one, two = pair({"k": Keeper()}), pair({"k": Keeper()})
    first, second = one.dispense("k"), two.dispense("k")
    (function,) = first.give()
    thing = first.give_thing()
    assert second.call(function, 5) == [0, 5]
    assert second.call_method(thing, "get") == "given"
    assert second.call(thing.get) == "given"
    assert second.call_method(first, "echo", [1, (2,)]) == [1, (2,)]
    assert second.echo(function) is function and second.echo(thing) is thing
    assert second.same(function, function) == (True, True, False)
    with pytest.raises(KeyError, match="given"):
        second.call(thing.fail)
    second.keep(function, thing)
    one.there.channel.shutdown()
    for call in (lambda: second.call(function, 1), lambda: second.call_method(thing, "get")) * 2:
        with pytest.raises((miniplug.PluginCrashed, miniplug.DeadReference), match="gone"):  # the host's own, come home
            call()
    second.drop()
    assert second.echo(1) == 1


def test_nesting_through_two_plugins_needs_no_worker_for_each_level(pair):  # noqa: F811
    first = pair({"k": Keeper()}, max_workers=1).dispense("k")
    second = pair({"k": Keeper()}, max_workers=1).dispense("k")
    bottom = first.echo.timeout(1.5)
    assert first.call(lambda: second.call(lambda: bottom("at the bottom"))) == "at the bottom"


PLUGIN = """
    import os, threading, time, miniplug
    class P:
        def __init__(self): self.kept = []
        def keep(self, function): self.kept.append(function)
        def later(self, *args):
            threading.Thread(target=lambda: [function(*args) for function in self.kept]).start()
        def function(self): return lambda value: [os.getpid(), value]
        def call(self, function, *args): return function(*args)
        def die(self): os._exit(4)
        def die_later(self, function):
            try: function()
            finally: os._exit(4)
        def loans(self):
            import gc; gc.collect()
            return 0
"""


def test_callbacks_with_a_real_plugin(write):
    with miniplug.launch(write("p.py", PLUGIN) + ":P") as plugin:
        proxy = plugin.dispense()
        got = []
        over = threading.Event()
        proxy.keep(lambda value: (got.append(value), over.set()))
        proxy.later("later")
        assert over.wait(10) and got == ["later"]
        function = proxy.function()
        assert function("x") == [plugin.pid, "x"]
        assert proxy.call(function, "home") == [plugin.pid, "home"]
        pending = function.submit("y")
        assert pending.result(10) == [plugin.pid, "y"]
        with pytest.raises(miniplug.PluginCrashed):
            proxy.die()
        for use in (function, function.submit, function.notify):
            with pytest.raises(miniplug.DeadReference):
                use("z")
        plugin.start()
        with pytest.raises(miniplug.DeadReference):
            function("z")
        assert proxy.function()("again") == [plugin.pid, "again"]


def test_a_crash_while_its_callback_runs(write):
    with miniplug.launch(write("p.py", PLUGIN) + ":P") as plugin:
        proxy = plugin.dispense()
        with pytest.raises(miniplug.PluginCrashed):
            proxy.call(lambda: proxy.die())
        plugin.start()
        with pytest.raises(miniplug.PluginCrashed) as caught:
            proxy.die_later(lambda: 1)
        assert caught.value.exit_code == 4 and not plugin.running


def test_a_callback_may_close_the_plugin(write):
    plugin = miniplug.launch(write("p.py", PLUGIN) + ":P")
    proxy = plugin.dispense()
    with pytest.raises(miniplug.PluginClosed):
        proxy.call(lambda: plugin.close(0.5))
    assert not plugin.running


def test_one_plugins_callback_into_another(write):
    path = write("p.py", PLUGIN) + ":P"
    with miniplug.launch(path) as first, miniplug.launch(path) as second:
        one, two = first.dispense(), second.dispense()
        function = one.function()
        assert two.call(function, 1) == [first.pid, 1]
        two.keep(function)
        first.kill()
        with pytest.raises(miniplug.DeadReference, match="gone"):  # the host's own, which comes home
            two.call(function, 1)
        assert two.call(lambda: "alive") == "alive"


@pytest.mark.parametrize("managed", [True, False])
def test_what_is_alive_when_the_interpreter_ends_says_nothing(managed, write):
    """Some Pythons collect it only when the names of its module are gone."""
    path = write("host.py", f"""
        import sys
        import miniplug

        class Shop:
            def count(self):
                yield from range(1000)
            def lend(self):
                return miniplug.ref([1])

        class Kept:
            pass

        if __name__ == "__main__":
            shop = miniplug.launch(__file__ + ":Shop", managed={managed}).dispense()
            lent, stream, method, call = shop.lend(), shop.count(), shop.lend, shop.lend.submit()
            next(stream)
            Kept.shop = sys.kept = shop
            cycle = Kept()
            cycle.own, cycle.kept = cycle, shop.lend()
    """)
    assert run_python(path) == (0, "", "")


class Struck(dict):
    """As if a signal handler raised just after one of its changes: the `left`-th from now."""

    left = 0

    def _strike(self, result):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return result

    def __setitem__(self, key, value):
        self._strike(super().__setitem__(key, value))

    def __delitem__(self, key):
        self._strike(super().__delitem__(key))

    def setdefault(self, key, default=None):
        return self._strike(super().setdefault(key, default))

    def pop(self, *key):
        return self._strike(super().pop(*key))


@pytest.mark.parametrize("table", ["_loans", "_lent"])
@pytest.mark.parametrize("when", ["lending", "releasing"])
def test_a_handler_that_strikes_while_something_is_lent_or_released_leaves_nothing_half_done(table, when):
    references, lent = miniplug._References(miniplug._Served({})), []
    struck = Struck(getattr(references, table))
    setattr(references, table, struck)

    def lend():
        return references.lend(None, print, lent)[1][0]

    def release():
        return references.release(collections.deque(["what says so"]), lent.pop())

    if when == "releasing":
        lend()
    struck.left = 1
    with pytest.raises(KeyboardInterrupt):
        lend() if when == "lending" else release()
    number = lend()
    assert references.own(number, None) is print and lent == [number]
    release()
    references.unlend([])  # whoever was struck gives up what was lent
    assert [*references._loans] == [0] and not references._lent and not references.lends
