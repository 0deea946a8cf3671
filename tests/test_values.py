"""Registered types, and what is refused: what arrives is exactly what was sent, or somebody says why not."""

import abc
import array
import collections
import copy
import dataclasses
import datetime
import enum
import fractions
import importlib
import io
import pathlib
import pickle
import sys
import threading
import types
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codec import atoms, hashable, keys, picture

import miniplug

quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def lend(value, lent):
    if isinstance(value, types.FunctionType):
        loans.append(value)
        lent.append(len(loans))
        return "$ref", [len(loans), None, True]
    return None


def unlend(lent):
    for number in lent:
        loans[number - 1] = None
    lent.clear()


def borrow(tag, state):
    return loans[state[0] - 1]


loans = []


def codec(arrays=True):
    made = miniplug._Codec(lend, unlend, borrow)
    made.arrays = arrays
    return made


def trip(value, arrays=True):
    data, buffers, tagged, _ = codec(arrays).dumps(value, "value")
    return codec(arrays).loads(data, [bytes(buffer) for buffer in buffers], tagged)


@pytest.fixture(autouse=True)
def registry():
    """Whatever a test registers is forgotten after it."""
    saved = dict(miniplug._registered), dict(miniplug._WAYS)
    yield
    for table, before in zip((miniplug._registered, miniplug._WAYS), saved):
        table.clear()
        table.update(before)


@miniplug.register
@dataclasses.dataclass
class Point:
    x: object
    y: object = 0


@miniplug.register(name="point3")
@dataclasses.dataclass(frozen=True)
class Point3:
    x: object
    z: object = dataclasses.field(default=None, init=False)


@miniplug.register
class Pair(typing.NamedTuple):
    left: object
    right: object = "default"


@miniplug.register
class Color(enum.Enum):
    RED = "red"
    ODD = (1, [2])


@miniplug.register
class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@miniplug.register
class Word(str, enum.Enum):
    A = "a"


@miniplug.register
class Perm(enum.Flag):
    R = 1
    W = 2
    X = 4


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


miniplug.register(Slotted, encode=lambda slotted: [slotted.value], decode=lambda state: Slotted(*state))


@miniplug.register
class AppError(Exception):
    def __init__(self, code, detail=None):
        super().__init__(f"failed with {code}")
        self.code = code
        self._detail = detail


class SubError(AppError):
    pass


@miniplug.register
class BadFile(OSError):
    pass


REGISTERED = (Point, Point3, Slotted)
inner_values = st.recursive(
    atoms | st.sampled_from([*Color, *Level, *Word, Perm(0), Perm.R, Perm.R | Perm.X]),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    | st.sets(hashable, max_size=3) | st.builds(Point, inner, inner) | st.builds(Point3, inner) | st.builds(Pair, inner, inner)
    | st.builds(Slotted, inner) | st.lists(st.integers(-9, 9)).map(lambda items: array.array("i", items))
    | st.binary(max_size=5000).map(bytearray),
    max_leaves=15)


def shown(value):
    """As test_codec.picture, with what is here."""
    if isinstance(value, REGISTERED):
        held = value.value if isinstance(value, Slotted) else [getattr(value, f.name) for f in dataclasses.fields(value)]
        return f"{type(value).__name__}<{shown(held)}>"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}!{value.value!r}"
    if isinstance(value, array.array):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(shown, value))})"
    if isinstance(value, dict):
        return f"{type(value).__name__}({','.join(shown(key) + ':' + shown(item) for key, item in value.items())})"
    return picture(value)


@quick
@given(st.lists(atoms | st.lists(atoms, max_size=2), max_size=6), st.dictionaries(st.text(max_size=3), atoms, max_size=2),
       st.text(max_size=5), st.integers(0, 2**53 - 1))
def test_a_call_is_an_array_of_four(args, kwargs, method, target):
    data, buffers, tagged, _ = codec().dumps((target, method, args, kwargs), None)
    assert data == codec().dumps([target, method, args, kwargs], "call")[0]
    assert picture(codec().loads(data, list(map(bytes, buffers)), tagged)) == picture([target, method, args, kwargs])


@quick
@given(inner_values)
def test_what_arrives_is_what_was_sent(value):
    assert shown(trip(value)) == shown(value)


@quick
@given(inner_values, st.lists(st.sampled_from(["list", "tuple", "dict", "point", "pair", "error"]), max_size=5))
def test_what_cannot_travel_is_named_wherever_it_sits(beside, around):
    value, path = object(), ""
    for kind in around:
        if kind == "list":
            value, path = [beside, value], f"[1]{path}"
        elif kind == "tuple":
            value, path = (value,), f"[0]{path}"
        elif kind == "dict":
            value, path = {"k": beside, "{0}": value}, f"['{{0}}']{path}"
        elif kind == "point":
            value, path = Point(beside, value), f".y{path}"
        elif kind == "pair":
            value, path = Pair(value), f".left{path}"
        else:
            value, path = AppError(value), f".code{path}"
    with pytest.raises(miniplug.NotSerializable, match="is of type object: ") as caught:
        codec().dumps((1, "method", [value], {}), None)
    assert caught.value.path == f"args[0]{path}" and caught.value.type_name == "object"


@pytest.mark.parametrize(("args", "kwargs", "path"), [
    ((1, object()), {}, "args[1]"), ([(), [object()]], {"a": 1}, "args[1][0]"), ((), {"a": object()}, "kwargs['a']"),
    ((float("nan"),), {"a": {"b": [(object(),)]}}, "kwargs['a']['b'][0][0]"), ((), {"$a": object()}, "kwargs['$a']"),
    ((), {"0": Point(0, {1: object()})}, "kwargs['0'].y[1]"), ((), {"a": Slotted(object())}, "kwargs['a'][0]"),
    ((0,) * 40 + ({object()},), {}, "args[40][0]"), ((Point3([Pair(1, {"k": object()})]),), {}, "args[0].x[0].right['k']"),
    (({"k": {object(): 1}},), {}, "args[0]['k'][")])
def test_the_place_in_a_call_is_named(args, kwargs, path):
    with pytest.raises(miniplug.NotSerializable, match="is of type object: register it with ") as caught:
        codec().dumps((1, "method", args, kwargs), None)
    assert caught.value.path.startswith(path) and (caught.value.path == path or path.endswith("["))
    assert caught.value.type_name == "object" and str(caught.value).startswith(f"{caught.value.path} is of type")


def test_a_call_of_many_arguments_arrives_as_it_was():
    for args in (tuple(range(40)), (1.5,) * 40, ((1, "a"),) * 40, ("a",) * 40, (b"x", 2**70) * 20):
        data, buffers, tagged, _ = codec().dumps((1, "method", args, {"$a": args}), None)
        back = codec().loads(data, buffers, tagged)
        assert shown(back) == shown([1, "method", [*args], {"$a": args}])


@quick
@given(data=st.binary(max_size=60), at=st.integers(0, 200), cut=st.integers(0, 60))
def test_garbage_is_refused(data, at, cut):
    whole, _, tagged, _ = codec().dumps([Point(1, b"x"), {"a": (1, 2)}, Perm.R | Perm.W, datetime.timezone.utc], "value")
    try:
        codec().loads(whole[:at] + data + whole[at + cut :], [], tagged)
    except (miniplug.ProtocolError, miniplug._Undecodable):
        pass


# -- the shapes that know their own state


def test_dataclasses_of_every_kind():
    @miniplug.register(name="base")
    @dataclasses.dataclass
    class Base:
        a: int
        total: int = dataclasses.field(init=False, default=0)
        start: dataclasses.InitVar[int] = 5
        shared: typing.ClassVar[list] = []

        def __post_init__(self, start):
            self.total += start  # a second run would add it again

    @miniplug.register(name="child")
    @dataclasses.dataclass
    class Child(Base):
        b: list = dataclasses.field(default_factory=list)

    base = Base(1)
    back = trip([base, Child(2, 3, [(4,)])])
    assert back == [base, Child(2, 3, [(4,)])] and list(map(type, back)) == [Base, Child] and back[0].total == 5
    base.extra = 1
    with pytest.raises(miniplug.NotSerializable, match="'extra' is no field"):
        trip(base)
    if sys.version_info >= (3, 10):
        slotted = dataclasses.make_dataclass("Slots", ["a", "b"], slots=True, frozen=True)
        miniplug.register(slotted, name="slots")
        assert trip(slotted(1, (2,))) == slotted(1, (2,))


def test_an_unregistered_subclass_is_refused():
    class Sub(Point):
        pass

    class SubPair(Pair):
        pass

    for value in (Sub(1), SubPair(1), SubError(1), enum.IntEnum("Other", "A").A):
        with pytest.raises(miniplug.NotSerializable, match=r"miniplug.register"):
            trip([value])


def test_enums():
    for value in (*Color, *Level, *Word, *Perm, Perm(0), Perm.R | Perm.X):
        back = trip(value)
        assert back is value or (back == value and type(back) is type(value))
    assert trip({Level.LOW: Level.HIGH}) == {Level.LOW: Level.HIGH}
    assert type(next(iter(trip({Level.LOW: 1})))) is Level


def test_exceptions_as_values():
    error = AppError(5, ("detail",))
    error.more = {1: 2}
    back = trip([error])[0]
    assert type(back) is AppError and back.args == ("failed with 5",)
    assert vars(back) == {"code": 5, "_detail": ("detail",), "more": {1: 2}}
    back = trip(BadFile(2, "gone", "a", None, "b"))
    assert (back.errno, back.strerror, back.filename, back.filename2, back.args) == (2, "gone", "a", "b", (2, "gone"))
    assert str(trip(BadFile(2, "gone"))) == "[Errno 2] gone"


def test_any_class_with_encode_and_decode():
    miniplug.register(collections.OrderedDict, encode=lambda table: list(table.items()), decode=collections.OrderedDict)
    table = collections.OrderedDict([((1, 2), Slotted(Point(1)))])
    back = trip({"t": table})["t"]
    assert type(back) is collections.OrderedDict and back[1, 2].value == Point(1)


# -- register


def test_register_returns_the_class_and_again_is_harmless():
    assert miniplug.register(Point) is Point and miniplug.register()(Point) is Point
    assert trip(Point(1)) == Point(1)
    miniplug.register(Point, name="other")
    assert b'["other"' in codec().dumps(Point(1), "value")[0] and trip(Point(1)) == Point(1)


def test_what_register_refuses():
    class Plain:
        pass

    main = type("Main", (), {"__module__": "__main__"})
    listed = dataclasses.dataclass(type("Listed", (list,), {"__annotations__": {"a": int}}))
    slotted = type("SlottedError", (UnicodeDecodeError,), {"__slots__": ("more",)})
    for cls, options, kind, text in (
            (slotted, {}, TypeError, "encode and decode"),
            (Plain, {}, TypeError, "encode and decode"), (listed, {}, TypeError, "encode and decode"),
            (Plain, {"encode": list}, TypeError, "together"),
            (5, {}, TypeError, "takes a class"), (main, {"encode": list, "decode": list}, ValueError, "name="),
            (Plain, {"name": "point3", "encode": list, "decode": list}, ValueError, "already"),
            (dict, {"encode": list, "decode": dict}, ValueError, "by itself"),
            (datetime.date, {"encode": str, "decode": str}, ValueError, "by itself")):
        with pytest.raises(kind, match=text):
            miniplug.register(cls, **options)
    assert trip(Point3(1)) == Point3(1)


def test_a_module_that_is_run_again_replaces_its_types(tmp_path, monkeypatch):
    (tmp_path / "reloaded_types.py").write_text(
        "import miniplug, dataclasses\n@miniplug.register\n@dataclasses.dataclass\nclass User:\n    name: str\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("reloaded_types")
    before = module.User
    importlib.reload(module)
    assert type(trip(module.User("x"))) is module.User is not before
    with pytest.raises(miniplug.NotSerializable):
        trip(before("x"))


# -- what arrives and cannot be made


@pytest.mark.parametrize("text", [
    '{"$type":[1,2]}',
    '{"$type":["nobody.Knows",{}]}', '{"$type":["test_values.Point",{"x":1}]}', '{"$type":["test_values.Point",{"x":1,"z":1}]}',
    '{"$type":["test_values.Point",[1,2]]}', '{"$type":["test_values.Point",null]}', '{"$type":["test_values.Color","BLUE"]}',
    '{"$type":["test_values.Perm",64]}', '{"$type":["test_values.Perm",[]]}', '{"$type":["test_values.Slotted",[1,2]]}',
    '{"$type":["test_values.AppError",{}]}', '{"$type":["test_values.AppError",{"args":1}]}', '{"$type":["os.system","true"]}',
    '{"$zone":"No/Where"}', '{"$array":["i",3,"little",{"$bytes":""}]}', '{"$array":["?",1,"little",{"$bytes":""}]}',
    '{"$array":["ii",4,"little",{"$bytes":""}]}'])
def test_what_cannot_be_made_here_fails_the_call(text):
    with pytest.raises(miniplug._Undecodable):
        codec().loads(text.encode(), [], True)


@pytest.mark.parametrize("text", [
    '{"$type":"x"}', '{"$type":[]}', '{"$type":["x"]}', '{"$type":[["x"],2]}',
    '{"$set":[{"$type":["test_values.Point",{"x":1,"y":2}]}]}',
    '{"$zone":"../../etc/passwd"}', '{"$array":["i",4,"middle",{"$bytes":""}]}', '{"$array":["i",4,"little",{"$bytes":"AAA="}]}',
    '{"$array":["i",4,"little",[1]]}', '{"$fraction":[1,0]}', '{"$fraction":[1.5,2]}', '{"$fraction":["1/3"]}'])
def test_what_is_malformed_is_a_protocol_error(text):
    if "$zone" in text and sys.version_info < (3, 9):
        pytest.skip("zoneinfo is new in 3.9")
    with pytest.raises(miniplug.ProtocolError):
        codec().loads(text.encode(), [], True)


def test_a_fraction_of_huge_numbers():
    value = fractions.Fraction(3**20000, 2**32000)
    back = trip(value)
    assert back == value and type(back) is fractions.Fraction and hash(back) == hash(value) and back + 1 == value + 1


def test_an_unknown_type_says_what_to_do():
    with pytest.raises(miniplug._Undecodable, match=r"'app.User' has come, which is not registered here: .*miniplug.register"):
        codec().loads(b'[{"$type":["app.User",{}]}]', [], True)


@pytest.mark.parametrize("kind", [miniplug.DeadReference, miniplug.MethodNotFound])
def test_what_comes_home_and_is_gone_fails_the_call(kind):
    def gone(tag, state):
        raise kind("it is gone")

    with pytest.raises(miniplug._Undecodable) as caught:
        miniplug._Codec(lend, unlend, gone).loads(b'[{"$own":[5,null]}]', [], True)
    assert type(miniplug._decode_error(miniplug._encode_error(caught.value.args[0], own=True))) is kind


def test_an_argument_that_cannot_be_made_is_told_to_the_caller():
    with pytest.raises(miniplug._Undecodable) as caught:
        codec().loads(b'[{"$type":["app.User",{}]}]', [], True)
    back = miniplug._decode_error(miniplug._encode_error(caught.value.args[0], own=True))
    assert type(back) is miniplug.NotSerializable and "app.User" in str(back)


# -- buffers and arrays


@pytest.mark.parametrize("code", "bBhHiIlLqQfd")
def test_arrays(code):
    for items in ([], [0, 1, 100], range(100)):
        value = array.array(code, items)
        back = trip([value, {"deep": (value * 100,)}])
        assert back == [value, {"deep": (value * 100,)}] and back[0].typecode == code
    assert shown(trip(array.array("d", [-0.0, float("inf")]))) == "array('d', [-0.0, inf])"


def test_an_array_of_another_platform():
    for order, items in (("big", [1, -1]), ("little", [256, -1])):
        back = codec().loads(f'{{"$array":["h",2,"{order}",{{"$bytes":"AAH//w=="}}]}}'.encode(), [], True)
        assert back.typecode == "h" and list(back) == items
    with pytest.raises(miniplug._Undecodable, match="items of 4 bytes"):
        codec().loads(b'{"$array":["h",4,"little",{"$bytes":"AAABAA=="}]}', [], True)


def test_buffers_of_every_kind():
    big = bytearray(100000)
    numbers = array.array("d", bytes(80000))
    view = memoryview(b"x" * 50000)
    data, buffers, _, _ = codec().dumps({"deep": [big, numbers, (view,)]}, "value")
    assert [len(buffer) for buffer in buffers] == [100000, 80000, 50000] and len(data) < 200
    back = trip([big, numbers, view, view[::2]])
    assert back == [big, numbers, bytes(view), bytes(view[::2])] and list(map(type, back)) == [bytearray, array.array, bytes, bytes]


def test_more_buffers_than_a_message_takes_go_in_it(monkeypatch):
    monkeypatch.setattr(miniplug, "_MAX_BUFFERS", 3)
    value = [memoryview(bytes([number]) * 3000) for number in range(5)]
    assert len(codec().dumps(value, "value")[1]) == 3 and trip(value) == value


def test_a_released_view_is_refused():
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(miniplug.NotSerializable, match=r"value\[0\] is of type memoryview: .*released"):
        codec().dumps([view], "value")


def test_views_of_every_shape_arrive_as_bytes():
    import ctypes

    for view in (memoryview(b""), memoryview((ctypes.c_int * 3)(1, 2, 3)), memoryview(bytes(12)).cast("B", (3, 4)),
                 memoryview(bytearray(4000)).cast("I")[::-1]):
        assert trip(view) == view.tobytes()


# -- what is refused


class Stubborn:
    def __repr__(self):
        raise RuntimeError("no text")

    def __hash__(self):
        return 1


def test_refusals_say_what_to_do(tmp_path):
    with open(__file__) as file:
        for value in (
                file, threading.Lock(), sys, int, (x for x in ()), iter([]), collections.OrderedDict(), collections.Counter(),
                collections.defaultdict(int), collections.deque(), type("Str", (str,), {})("a"), Stubborn(),
                enum.IntEnum("Other", "A").A, io.BytesIO(), datetime.datetime.now):
            for held, path in (([value], "[0]"), ((1, {"k": value}), "[1]['k']"), (Point(value), ".x"), (Slotted(value), "")):
                with pytest.raises(miniplug.NotSerializable, match=r"miniplug\.register, .* miniplug\.ref, ") as caught:
                    codec().dumps(held, "value")
                assert type(value).__qualname__ in caught.value.type_name
                assert caught.value.path == "value" + path or not path
    miniplug.register(Stubborn, encode=vars, decode=lambda state: Stubborn())
    with pytest.raises(miniplug.NotSerializable, match=r"value\['\?'\] is of type object"):
        codec().dumps({Stubborn(): object()}, "value")


def test_cycles_are_refused():
    cycle, table, point = [], {}, Point(1)
    cycle.append((cycle,))
    table[1] = [table]
    point.y = point
    for value in (cycle, table, point):
        with pytest.raises(miniplug.NotSerializable, match="nested too deeply, or contains itself"):
            codec().dumps(value, "value")


def test_shared_lists_arrive_as_two():
    inner = [1, (2,)]
    one, two = trip([inner, inner])
    assert one == two == inner and one is not two


def test_an_encode_that_fails_is_named():
    miniplug.register(Slotted, encode=lambda value: 1 / 0, decode=Slotted)
    with pytest.raises(miniplug.NotSerializable, match=r"value\[1\] is of type .*Slotted: .*ZeroDivisionError"):
        codec().dumps([1, Slotted(1)], "value")


def test_what_strikes_is_no_fault_of_the_value():
    """As a signal handler does that raises in the midst of it, and again while it is looked for the reason."""
    strikes = []

    def strike(value):
        if strikes:
            raise strikes.pop()
        return value

    miniplug.register(Slotted, encode=lambda slotted: strike([slotted.value]), decode=lambda state: strike(Slotted(*state)))
    for value in (Slotted(1), [1.5, Slotted(float("nan"))]):
        for error in (TimeoutError("struck"), ValueError("struck"), LookupError("struck")):
            for times in (1, 3):
                strikes.extend([error] * times)
                with pytest.raises(type(error), match="struck"):
                    codec().dumps(value, "value")
            content = codec().dumps(value, "value")
            strikes.append(error)
            with pytest.raises(type(error), match="struck"):
                codec().loads(content[0], content[1], content[2])
            codec().loads(content[0], content[1], content[2])
    assert not strikes


# -- references


def test_what_is_lent_is_told_and_taken_back_on_failure():
    def function():
        pass

    loans.clear()
    _, _, _, lent = codec().dumps([function, {"f": (function,)}], "value")
    assert lent == [1, 2] and trip([function]) == [function]
    loans.clear()
    for bad in (object(), [object()]):
        with pytest.raises(miniplug.NotSerializable):
            codec().dumps([function, float("nan"), bad], "value")
    assert loans and not any(loans)


# -- errors


def raised(error):
    try:
        raise error
    except BaseException as caught:
        body = miniplug._encode_error(caught)
    return miniplug._decode_error(trip(body))


def test_a_registered_exception_arrives_as_itself_and_as_remote_error():
    back = raised(AppError(7, ("x",)))
    assert isinstance(back, AppError) and isinstance(back, miniplug.RemoteError) and type(back).__name__ == "AppError"
    assert (back.code, back._detail, back.args, str(back)) == (7, ("x",), ("failed with 7",), "failed with 7")
    assert back.type_name == "test_values.AppError" and "Traceback" in back.remote_traceback
    again = raised(back)  # through a plugin, from a callback
    assert isinstance(again, AppError) and again.code == 7 and again.type_name == "test_values.AppError"
    twin = copy.copy(back)
    assert isinstance(twin, AppError) and twin.code == 7 and twin.remote_traceback == back.remote_traceback
    assert pickle.loads(pickle.dumps(back)).args == back.args  # noqa: S301


def test_an_unregistered_subclass_arrives_as_the_nearest_base():
    back = raised(SubError(7))
    assert isinstance(back, AppError) and back.code == 7 and back.type_name == "test_values.SubError"
    back = raised(BadFile(2, "gone", "f"))
    assert isinstance(back, BadFile) and (back.errno, back.filename) == (2, "f")


def test_exceptions_of_many_shapes():
    @miniplug.register(name="frozen")
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int
        message: str = "own"

    @miniplug.register(name="unicode")
    class Unicode(UnicodeDecodeError):
        pass

    @miniplug.register(name="keyed", encode=lambda error: error.args[0], decode=lambda state: Keyed(state))
    class Keyed(KeyError):
        pass

    back = raised(Frozen(3))
    assert isinstance(back, Frozen) and (back.code, back.message, back.args) == (3, "own", (3,))
    error = Unicode("utf-8", b"x", 0, 1, "why")
    error.more = [1]
    back = raised(error)
    assert isinstance(back, Unicode) and back.more == [1] and str(back) == str(error) and back.object == b"x"
    assert isinstance(raised(Keyed("k")), Keyed) and raised(Keyed("k")).args == ("k",)
    assert raised(raised(Frozen(3))).message == "own"


def test_a_method_of_an_exception_is_no_field_of_it():
    @miniplug.register(name="named")
    class Named(OSError):
        def path(self):
            return 1

    back = raised(Named(2, "gone", "f"))
    assert isinstance(back, Named) and vars(back).keys() == vars(raised(OSError(2, "gone"))).keys() and back.path() == 1


def test_one_that_is_not_registered_at_the_receiver_arrives_as_its_builtin_base():
    body = miniplug._encode_error(BadFile(2, "gone"))
    miniplug._registered.pop("test_values.BadFile")
    back = miniplug._decode_error(trip(body))
    assert isinstance(back, FileNotFoundError) is False and isinstance(back, OSError) and back.errno == 2


def test_one_that_has_no_text_arrives_as_its_type_with_the_text_that_was_told():
    if hasattr(sys, "set_int_max_str_digits"):
        back = raised(OverflowError(10**5000))
        assert isinstance(back, OverflowError) and str(back) == back.message == "(its text could not be made)"

    @miniplug.register(name="textless")
    class Textless(KeyError):
        def __str__(self):
            return self.missing

    back = raised(Textless("k"))
    assert isinstance(back, KeyError) and back.type_name.endswith("Textless") and back.args == ("k",)


def test_one_that_is_unpickled_where_a_type_in_it_is_not_registered_keeps_its_texts():
    data = pickle.dumps(raised(ValueError(Point(1), "why")))
    assert pickle.loads(data).args == (Point(1), "why")  # noqa: S301
    miniplug._registered.pop("test_values.Point")
    back = pickle.loads(data)  # noqa: S301
    assert isinstance(back, ValueError) and "why" in str(back) and "Traceback" in back.remote_traceback


def test_where_an_error_came_from_does_not_travel_with_it():
    back = raised(AppError(7))
    vars(back)["_origin"] = threading.Lock(), 5  # the session's
    again = raised(back)
    assert isinstance(again, AppError) and again.code == 7 and again._origin is None


def test_what_would_confuse_the_host_stays_plain():
    import asyncio
    import concurrent.futures

    @miniplug.register(name="stop")
    class Stop(StopIteration):
        pass

    @miniplug.register(name="closed")
    class Closed(miniplug.PluginClosed):
        pass

    for error in (Stop(1), Closed(), asyncio.CancelledError(), concurrent.futures.CancelledError(), SystemExit(1),
                  KeyboardInterrupt(), GeneratorExit(), StopIteration(), miniplug.PluginCrashed("x")):
        assert type(raised(error)) is miniplug.RemoteError
    for name in ("stop", "closed"):
        body = {"message": "m", "registered": [name, {"args": []}]}
        assert type(miniplug._decode_error(body)) is miniplug.RemoteError


def test_only_what_is_meant_stays_plain():
    """It goes by the classes: another class of such a name is like any other."""
    class PluginError(Exception):
        pass

    class StopIteration(ValueError):
        pass

    @miniplug.register(name="cancelled")
    class CancelledError(PluginError):
        pass

    for error, kind in ((CancelledError("c"), CancelledError), (StopIteration("s"), ValueError),
                        (type("RemoteError", (LookupError,), {})("l"), LookupError)):
        back = raised(error)
        assert isinstance(back, kind) and isinstance(back, miniplug.RemoteError) and str(back) == str(error)


@pytest.mark.parametrize("kind", ["open", "type", "int", "Exception", "BaseException", "SystemExit", "BaseExceptionGroup",
                                  "StopIteration", "__import__", "True", "__name__", "", "no such name"])
def test_a_kind_that_is_no_failure_stays_plain(kind):
    error = miniplug._decode_error({"kind": kind, "args": ["a"], "type": "T", "message": "m", "parts": [{}]})
    assert (type(error), str(error)) == (miniplug.RemoteError, "T: m")


def test_what_is_ours_does_not_come_from_a_peer():
    """Also in the parts of a group, of which no call tells where they came from."""
    bad = {"_origin": [1, 2], "_body": 5}
    parts = [{"kind": "ValueError", "args": ["v"], "state": bad}, {"registered": ["test_values.AppError", {"args": [1], **bad}]}]
    body = {"kind": "ExceptionGroup", "args": ["g"], "parts": parts, "state": bad}
    error = miniplug._decode_error(body)
    for each in (error, *getattr(error, "exceptions", ()), *map(miniplug._decode_error, parts)):
        assert (each._origin, type(each._body)) == (None, dict)
        assert miniplug._Runner._home(None, each) == {}


def test_a_registered_exception_with_a_metaclass_arrives_as_itself():
    class Meta(abc.ABCMeta):
        pass

    @miniplug.register(name="abstract")
    class Abstract(Exception, metaclass=Meta):
        @abc.abstractmethod
        def why(self):
            pass

    back = raised(Abstract("a"))
    assert isinstance(back, Abstract) and isinstance(back, miniplug.RemoteError) and str(back) == "a"
    assert type(copy.copy(back)) is type(back)


def test_a_registered_exception_that_knows_its_subclasses_arrives_as_itself():
    known = {}

    class Numbered(Exception):
        def __init_subclass__(cls, number):
            known[number] = cls

    @miniplug.register(name="missing")
    class Missing(Numbered, number=404):
        pass

    back = raised(Missing("m"))
    assert isinstance(back, Missing) and isinstance(back, miniplug.RemoteError) and known == {404: Missing}
    assert isinstance(copy.copy(back), Missing) and str(pickle.loads(pickle.dumps(back))) == "m"  # noqa: S301


def test_a_class_with_one_slot_that_is_no_text_of_many():
    @dataclasses.dataclass
    class One:
        __slots__ = "name"
        name: str

    assert trip(miniplug.register(name="one slot")(One)("n")).name == "n"


def test_the_name_of_a_type_is_all_of_it():
    kind = type("X", (Exception,), {"__module__": "my.builtins"})
    assert raised(kind("x")).type_name == "my.builtins.X" and raised(ValueError("v")).type_name == "ValueError"


@pytest.mark.parametrize("state", [{"object": 5}, {"start": -5, "end": -4}, {"__class__": 1, "args": 5, "__traceback__": 7}])
def test_the_state_of_an_error_cannot_reach_what_the_interpreter_relies_on(state):
    args = ["utf-8", b"x", 0, 1, "why"]
    back = miniplug._decode_error({"kind": "UnicodeDecodeError", "args": args, "state": state, "message": "m"})
    assert str(back) == str(UnicodeDecodeError(*args)) and back.args == tuple(args) and back.object == b"x"


# -- over a connection


def test_registered_types_over_a_connection(write):
    write("shared_types.py", """
        import dataclasses, miniplug
        @miniplug.register
        @dataclasses.dataclass
        class User:
            name: str
            friends: list
        @miniplug.register
        class Denied(Exception):
            def __init__(self, user):
                super().__init__(f"{user.name} may not")
                self.user = user
    """)
    path = write("plugin.py", """
        from shared_types import User, Denied
        class P:
            def echo(self, value): return value
            def older(self, user): return User(user.name + "!", [user])
            def deny(self, user): raise Denied(user)
    """)
    sys.path.insert(0, path.rsplit("plugin.py", 1)[0])
    try:
        import shared_types
        with miniplug.launch(path + ":P") as plugin:
            proxy, user = plugin.dispense(), shared_types.User("a", [(1, b"x" * 9000)])
            assert proxy.older(user) == shared_types.User("a!", [user]) and proxy.echo({1: {user.name}}) == {1: {"a"}}
            with pytest.raises(shared_types.Denied, match="a may not") as caught:
                proxy.deny(user)
            assert caught.value.user == user and isinstance(caught.value, miniplug.RemoteError)
            with pytest.raises(miniplug.NotSerializable, match=r"args\[0\]\[1\].friends is of type object"):
                proxy.echo([1, shared_types.User("x", object())])
            with pytest.raises(miniplug.NotSerializable, match=r"'test_values.Point' has come, which is not registered here"):
                proxy.echo([Point(1)])
            assert proxy.echo(user) == user
    finally:
        sys.path.pop(0)
        sys.modules.pop("shared_types", None)


def test_a_registered_class_keeps_its_type(tmp_path, monkeypatch):
    monkeypatch.setenv("MYPYPATH", str(pathlib.Path(miniplug.__file__).parent))
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "typed.py").write_text("""
from __future__ import annotations
import dataclasses, miniplug

@miniplug.register
@dataclasses.dataclass
class One:
    x: int

@miniplug.register(name="two")
class Two(Exception):
    y: str = ""

class Three: ...

reveal_type(One(1).x)
reveal_type(Two().y)
reveal_type(miniplug.register(Three, encode=miniplug.ref, decode=lambda proxy: proxy))
One("1")
miniplug.register(encode=5)
""")
    found, _, _ = mypy.run(["--strict", "--no-incremental", "--follow-imports=silent", str(tmp_path / "typed.py")])
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in found.splitlines() if "Revealed" in line]
    assert [text.rpartition("builtins.")[2] for text in revealed] == ["int", "str", "type[typed.Three]"], found
    assert 'incompatible type "str"; expected "int"' in found and "No overload variant" in found


@pytest.mark.parametrize("kind", [tuple, dict, bytes, int, set, list, bool, datetime.date])
def test_a_type_that_travels_by_itself_is_not_registered(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} travels by itself"):
        miniplug.register(kind, name="mine", encode=list, decode=kind)


def test_a_named_tuple_travels_by_its_items(registry):
    class Shadowed(collections.namedtuple("Shadowed", "a b")):
        __slots__ = ()
        a = property(lambda self: self[1])

    miniplug.register(Shadowed, name="shadowed")
    assert tuple(trip(Shadowed(1, 2))) == (1, 2)


def test_an_error_that_cannot_be_read_again_keeps_its_texts():
    error = miniplug._restore_error({"type": "KeyError", "message": "gone"}, b"[[", [], 0)
    assert type(error) is miniplug.RemoteError and error.message == "gone"


def test_a_builtin_error_without_arguments_is_made_of_its_text():
    error = miniplug._decode_error({"type": "ValueError", "kind": "ValueError", "message": "bad", "args": None})
    assert isinstance(error, ValueError) and str(error) == "bad"
