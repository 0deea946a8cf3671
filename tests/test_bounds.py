"""What arrives costs in proportion to its size, and what is over a bound is refused by both sides, in words."""

import copy
import dataclasses
import decimal
import enum
import fractions
import json
import math
import pickle
import re
import struct
import sys
import threading
import time
import traceback

import pytest
from test_values import codec, raised, registry, trip  # noqa: F401

import miniplug

D, F, HASH = decimal.Decimal, fractions.Fraction, sys.hash_info.modulus


def loads(text, buffers=()):
    return codec().loads(text.encode() if type(text) is str else text, buffers, 1)


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


# -- values that collide


def alike(kind, count=900):
    """So many different numbers with one hash, as their states on the wire."""
    if kind == "integers":
        return [{"$int": hex(number * HASH + 5)} for number in range(1, count + 1)]
    if kind == "floats":
        return [float(5 * 2 ** (61 * number)) for number in range(count)][:16]
    if kind == "fractions":
        return [{"$fraction": [{"$int": hex(5 + (number << 70) * HASH)}, 1]} for number in range(count)]
    if kind == "tuples":
        return [{"$tuple": [-1 - (number >> bit & 1) for bit in range(10)]} for number in range(count)]
    exponents = [10 + order * (HASH - 1) for order in range(count)]
    return (
        [{"$decimal": f"1E{exponent}"} for exponent in exponents]
        if kind == "huge decimals"
        else [{"$decimal": str(number * HASH + 5)} for number in range(count)]
    )


@pytest.mark.parametrize("kind", ["integers", "fractions", "decimals", "tuples"])
@pytest.mark.parametrize("form", ["$set", "$frozenset", "$dict", "$set in a list"])
def test_values_that_collide_are_refused_before_they_are_compared(kind, form):
    states = alike(kind)
    if form == "$dict":
        states = [part for state in states for part in (state, 0)]
    value = {form.partition(" ")[0]: states}
    text = json.dumps([value, 1] if " " in form else value)

    def attempt():
        with pytest.raises(miniplug._Undecodable, match="have the same hash"):
            loads(text)

    assert seconds(attempt) < 1.0  # 24 s without the bound


def test_decimals_that_collide_with_a_huge_integer_do_not_freeze():
    many = [
        {"$int": hex(10**9000 % HASH + HASH * (10**9000 // HASH))},
        *({"$decimal": f"{number * HASH + 1}E9000"} for number in range(860)),
    ]

    def attempt():
        with pytest.raises(miniplug._Undecodable, match="the same hash"):
            loads(json.dumps({"$set": many}))

    assert seconds(attempt) < 1.0


def test_few_that_collide_are_data():
    values = {-1, -2, 5, 5 + HASH, 5 + 2 * HASH, (-1, -1), (-1, -2), (-2, -1), (-2, -2)}
    grid = {(x, y): x for x in range(-40, 40) for y in range(-40, 40)}
    assert trip(values) == values and trip(grid) == grid and trip(frozenset(grid)) == frozenset(grid)
    most = {5 + number * HASH for number in range(16)}
    assert trip(most | set(range(100, 200))) == most | set(range(100, 200))


def test_the_sender_refuses_the_same():
    for value in ({5 + number * HASH for number in range(17)}, dict.fromkeys(5 + number * HASH for number in range(17))):
        with pytest.raises(
            miniplug.NotSerializable, match=r"value\['k'\] is of type (set|dict): more than 16 of its values have the same"
        ):
            codec().dumps({"k": value}, "value")


def test_registered_types_that_collide():
    @miniplug.register(name="same")
    @dataclasses.dataclass(frozen=True)
    class Same:
        x: int

        def __hash__(self):
            return 1

    with pytest.raises(miniplug._Undecodable, match="the same hash"):
        loads(json.dumps({"$set": [{"$type": ["same", {"x": number}]} for number in range(500)]}))


# -- digits


def test_integers_are_bounded():
    for value in (2**32768 - 1, -(2**32768) + 1, 10**5000):
        assert trip([value]) == [value]
    for value in (2**32768, -(2**32768)):
        with pytest.raises(
            miniplug.NotSerializable, match=r"value\[0\] is of type int: integers of more than 32768 bits do not travel"
        ):
            codec().dumps([value], "value")
        with pytest.raises(miniplug._Undecodable, match="more than 32768 bits"):
            loads(json.dumps({"$int": hex(value)}))
    for value in (F(2**32768, 3), range(2**40000), {2**40000: 1}, slice(2**40000)):
        with pytest.raises(miniplug.NotSerializable, match="32768 bits"):
            codec().dumps(value, "value")


@pytest.mark.parametrize("limit", [None, 0])
def test_a_long_plain_integer_is_not_read_in_quadratic_time(limit):
    if hasattr(sys, "set_int_max_str_digits"):
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(before if limit is None else limit)

    def attempt():
        for text in ("9" * 1_000_000, "[1, -" + "9" * 1_000_000 + ", 2]", '{"a": [' + "1" * 20000 + "]}"):
            with pytest.raises(miniplug.ProtocolError):
                codec().loads(text.encode(), (), 0)
            with pytest.raises(miniplug.ProtocolError):
                codec().loads(text.encode(), [b"x"], 1)

    try:
        assert seconds(attempt) < 2.0
    finally:
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(before)


def test_a_text_of_digits_is_a_text():
    value = ["9" * 100_000, 1, 2.5, "1" * 4999, {"3" * 20000: 2**50}]
    assert trip(value) == value


def test_decimals_are_bounded():
    for value in (D("1E+10000"), D("-1E-10000"), D("9" * 10000), D("0E+10000"), D("NaN123"), D("Infinity"), D("0." + "1" * 9000)):
        assert str(trip(value)) == str(value)
    for text in ("1E+10001", "1E-10001", "1e999999999", "0E+999999", "9" * 10001, "0." + "0" * 10001 + "1"):
        with pytest.raises(miniplug._Undecodable, match="decimals of more than 10000 digits"):
            loads(json.dumps({"$decimal": text}))
        with pytest.raises(miniplug.NotSerializable, match="decimals of more than 10000 digits"):
            codec().dumps(D(text), "value")


def test_what_may_come_is_cheap_to_use():
    values = [2**32768 - 1, D("1E+10000"), D("9" * 10000), F(2**32768 - 1, 2**32767 - 1), D("1E-10000"), 1e308, 0.1]
    values = trip(values)

    def use():
        for one in values:
            assert f"{one}" if not isinstance(one, (int, F)) else f"{one:x}" if isinstance(one, int) else f"{one.numerator:x}"
            f"{one:f}" if isinstance(one, (D, float)) else None
            hash(one)
            for other in values:
                one == other  # noqa: B015
                {one, other}  # noqa: B018

    assert seconds(use) < 3.0


# -- flags


def test_a_flag_keeps_no_more_combinations_than_are_bounded(monkeypatch):
    monkeypatch.setattr(miniplug, "_MAX_COMBINATIONS", 40)
    kind = enum.Flag("Many", [f"bit{number}" for number in range(20)])
    miniplug.register(kind, name="many")
    known = len(kind._value2member_map_)
    for number in range(3, 60):
        try:
            assert loads(json.dumps({"$type": ["many", number]})).value == number
        except miniplug._Undecodable as error:
            assert "combinations of its flags already" in str(error)
    assert len(kind._value2member_map_) <= 40 < known + 57
    assert loads('{"$type":["many",3]}') is kind(3)  # those that are there arrive


class Gaps(enum.IntFlag):
    A = 1
    D = 8
    AD = 9
    HIGH = 0x30


class Loose(enum.Flag):
    R = 1
    W = 2
    RWX = 7


miniplug.register(Gaps)
miniplug.register(Loose)


@pytest.mark.parametrize("kind", [Gaps, Loose])
def test_a_combined_flag_is_kept_or_refused_and_never_altered(kind):
    for number in range(130):
        try:
            value = kind(number)
        except ValueError:
            continue
        if value.value != number:
            continue  # this Python leaves out bits by itself
        try:
            back = trip([value])[0]
        except (miniplug.NotSerializable, miniplug._Undecodable):
            continue
        assert back == value and type(back) is kind and back.value == number, number
    for number in (-1, 64, 1 << 70):
        try:
            assert loads(json.dumps({"$type": [f"test_bounds.{kind.__name__}", number]})).value == number
        except (miniplug._Undecodable, miniplug.ProtocolError):
            pass


def test_a_member_of_an_enum_is_not_found_by_value():
    class Odd(enum.Enum):
        A = 1

        @classmethod
        def _missing_(cls, value):
            return cls.A

    miniplug.register(Odd, name="odd")
    with pytest.raises(miniplug._Undecodable):
        loads('{"$type":["odd",7]}')


# -- numbers


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 5e-324, 1e308] * 10,
        [2**63 - 1, -(2**63), 0, -1] * 10,
        [2**63] * 40,
        [1] * 40 + [True],
        [1] * 40 + [1.0],
        [1.0] * 40 + [1],
        [True] * 40,
        [2**53] * 40,
        [None] * 40,
        [1.5] * 31,
        [float("nan")] * 31,
    ],
    ids=repr,
)
def test_long_lists_of_numbers_are_kept_exactly(values, arrays):
    for value in (values, tuple(values), {"k": [values]}, [values, {1: values}]):
        back, parts = trip(value, arrays), [value]
        assert pictures(back) == pictures(value), parts


def pictures(value):
    if isinstance(value, (list, tuple)):
        return type(value), [*map(pictures, value)]
    if isinstance(value, dict):
        return [(key, pictures(part)) for key, part in value.items()]
    return type(value), struct.pack("d", value) if type(value) is float and not math.isnan(value) else repr(value)


def test_long_lists_are_plain_for_a_side_that_does_not_know_more():
    assert codec(arrays=False).dumps([*range(40)], "v")[:3] == (str([*range(40)]).replace(" ", "").encode(), [], 0)
    for plain in ([{}] * 40, [[]] * 40, [{"a": 1}] * 40, [[1, "a"]] * 40, ["a"] * 40, [None, 1] * 40):
        assert codec().dumps(plain, "v")[:3] == (json.dumps(plain, separators=(",", ":")).encode(), [], 0)
    assert codec(arrays=False).dumps([(1,)] * 32, "v")[0] == b"[" + b",".join([b'{"$tuple":[1]}'] * 32) + b"]"
    body, buffers, tagged, _ = codec().dumps([*range(1000)], "v")
    assert (body, [*map(len, buffers)], tagged) == (b'{"$numbers":["q",{"$bytes":0}]}', [8000], 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"$numbers":["q",{"$bytes":"AAAA"}]}',
        '{"$numbers":["x",{"$bytes":""}]}',
        '{"$numbers":["q",[1]]}',
        '{"$numbers":["q"]}',
        '{"$numbers":5}',
        '{"$each":["$set",[[]]]}',
        '{"$each":["$each",[["$tuple",[]]]]}',
        '{"$each":["$tuple",5]}',
        '{"$each":["$tuple",["ab"]]}',
        '{"$each":[[],[]]}',
        '{"$each":["$ref",[[1,null,false]]]}',
        '{"$each":["$bytes",[0]]}',
        '{"$each":["$date",["2026-01-31",5]]}',
        '{"$each":["$unknown",[]]}',
        '{"$dict":[1]}',
        '{"$dict":[[],1]}',
    ],
)
def test_malformed_long_lists(text):
    with pytest.raises(miniplug.ProtocolError):
        loads(text, [b"x"])


# -- errors

SYNTAX = ["bad", {"$tuple": ["f.py", 1, 1, "x = (", 1, 10**12]}]
BODIES = {
    "an end far away": {"kind": "SyntaxError", "args": SYNTAX},
    "a place far away": {"kind": "SyntaxError", "args": ["bad", ["f.py", 10**9, 10**9, "x", 1, 10**9]]},
    "a text of another type": {"kind": "SyntaxError", "args": ["bad", ["f.py", 1, 1, 5, 1, 2]]},
    "a file of another type": {"kind": "IndentationError", "args": ["bad", [[], {}, "x", None, None, None]]},
    "a message of another type": {"kind": "SyntaxError", "args": [{"a": 1}, ["f.py", 1, 1, "x", 1, 2]]},
    "a huge number": {"kind": "ValueError", "args": [{"$int": hex(10**9000)}], "message": "the text"},
    "a huge number as the text": {
        "kind": "ValueError",
        "args": ["a"],
        "message": {"$int": hex(10**9000)},
        "type": {"$int": hex(10**9000)},
    },
    "a plain error with a huge number": {"message": {"$int": hex(10**9000)}, "traceback": {"$int": hex(10**9000)}},
    "a kind that is a huge number": {"kind": {"$int": hex(10**9000)}, "args": []},
    "methods": {
        "kind": "ValueError",
        "args": ["a"],
        "state": dict.fromkeys(
            [
                "with_traceback",
                "add_note",
                "__reduce__",
                "__reduce_ex__",
                "__str__",
                "__class__",
                "__dict__",
                "__cause__",
                "__setstate__",
            ],
            5,
        ),
    },
    "notes": {"kind": "ValueError", "args": ["a"], "state": {"__notes__": 5}},
    "notes of another type": {"kind": "ValueError", "args": ["a"], "state": {"__notes__": [1, [2]]}},
    "a name that is none": {"kind": "NameError", "args": ["a"], "state": {"name": [1]}},
    "a number of a file": {
        "kind": "OSError",
        "args": [{"$int": hex(10**9000)}, {"$int": hex(10**9000)}, [1]],
        "state": {"errno": [1], "filename": {}},
    },
    "a number of a line": {"kind": "SyntaxError", "args": ["a"], "state": {"lineno": {"$int": hex(10**9000)}, "filename": "f"}},
    "an import": {"kind": "ImportError", "args": ["a"], "state": {"name": "this", "name_from": "antigravity", "path": [1]}},
    "a reference": {"kind": "ValueError", "args": [{"$ref": [1, None, True]}]},
    "depth": {"kind": "ValueError", "args": json.loads("[" * 400 + "]" * 400)},
    "what is missing": {"registered": ["test_values.AppError", {"args": [1]}], "type": "test_values.AppError", "message": "m"},
    "what is its own": {"registered": ["test_values.AppError", {"args": [1], "with_traceback": 1, "__str__": 2, "code": 7}]},
}


@pytest.mark.parametrize("name", BODIES)
def test_an_error_can_be_printed_chained_copied_and_pickled(name):
    body = {"type": "T", "message": "the text", **BODIES[name]}
    made = miniplug._Codec(None, None, lambda tag, state: threading.Lock())  # what cannot be copied, such as a proxy
    error = miniplug._decode_error(made.loads(json.dumps(body).encode(), (), 1))

    def use():
        texts = [str(error), repr(error)]
        with pytest.raises(KeyError):
            try:
                raise error.with_traceback(None)
            except type(error) as caught:
                texts += traceback.format_exception(type(caught), caught, caught.__traceback__)
                raise KeyError("next") from caught
        if hasattr(Exception, "add_note"):
            error.add_note("noted")
            assert "noted" in "".join(traceback.format_exception(type(error), error, None))
        for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301
            assert isinstance(twin, miniplug.RemoteError) and str(twin)
        assert sum(map(len, texts)) < 60_000

    assert isinstance(error, miniplug.RemoteError) and seconds(use) < 1.0


def test_what_is_honest_of_an_error_is_kept():
    try:
        compile("x = (\n", "file.py", "exec")
    except SyntaxError as caught:
        error = raised(caught)
        for name in ("msg", "filename", "lineno", "args"):
            assert getattr(error, name) == getattr(caught, name), name
        assert str(error) == str(caught)
    error = OSError(2, "gone", "file")
    error.extra = [1, (2,)]
    back = raised(error)
    assert (back.errno, back.strerror, back.filename, back.extra, str(back)) == (2, "gone", "file", [1, (2,)], str(error))
    if hasattr(Exception, "add_note"):
        error.add_note("a note")
        assert raised(error).__notes__ == ["a note"]


@pytest.mark.parametrize(
    ("error", "text", "message"),
    [
        (type("MyError", (Exception,), {})("disk full", 7), "MyError: ('disk full', 7)", "('disk full', 7)"),
        (SystemExit(3), "SystemExit: 3", "3"),
        (SystemExit(), "SystemExit", ""),
        (KeyboardInterrupt(), "KeyboardInterrupt", ""),
        (Exception("plain"), "Exception: plain", "plain"),
        (GeneratorExit("x"), "GeneratorExit: x", "x"),
    ],
)
def test_the_text_of_a_plain_error_begins_with_its_type(error, text, message):
    for back in (raised(error), raised(raised(error)), pickle.loads(pickle.dumps(raised(error)))):  # noqa: S301
        assert (type(back), str(back), back.message) == (miniplug.RemoteError, text, message)
    assert raised(error).type_name.endswith(type(error).__name__)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in 3.11")
class TestGroups:
    def test_a_group_arrives_as_one_with_each_part_as_it_would_alone(self):
        from test_values import AppError

        inner = ExceptionGroup("inner", [KeyError("k"), AppError(5)])  # noqa: F821
        group = ExceptionGroup("outer", [ValueError("v"), inner, type("MyError", (Exception,), {})("m")])  # noqa: F821
        group.add_note("noted")
        for back in (raised(group), raised(raised(group)), copy.copy(raised(group)), pickle.loads(pickle.dumps(raised(group)))):  # noqa: S301
            assert isinstance(back, ExceptionGroup) and isinstance(back, miniplug.RemoteError)  # noqa: F821
            assert str(back) == "outer (3 sub-exceptions)" and back.type_name == "ExceptionGroup" and back.__notes__ == ["noted"]
            first, second, third = back.exceptions
            assert isinstance(first, ValueError) and isinstance(first, miniplug.RemoteError) and first.args == ("v",)
            assert [type(part).__mro__[2] for part in second.exceptions] == [KeyError, AppError]
            assert second.exceptions[1].code == 5
            assert type(third) is miniplug.RemoteError and str(third) == "MyError: m"
            matched, rest = back.split(ValueError)
            assert len(matched.exceptions) == 1 and len(rest.exceptions) == 2
            assert "ValueError: v" in "".join(traceback.format_exception(back))

    def test_what_would_end_the_host_arrives_as_a_plain_part(self):
        back = raised(BaseExceptionGroup("all", [KeyboardInterrupt(), ValueError("v"), SystemExit(2)]))  # noqa: F821
        assert isinstance(back, ExceptionGroup) and back.type_name == "BaseExceptionGroup"  # noqa: F821
        assert [str(part) for part in back.exceptions] == ["KeyboardInterrupt", "v", "SystemExit: 2"]
        assert type(back.exceptions[0]) is miniplug.RemoteError

    def test_one_of_thousands_arrives_plain(self):
        back = raised(ExceptionGroup("many", [ValueError()] * 1001))  # noqa: F821
        assert type(back) is miniplug.RemoteError and str(back) == "ExceptionGroup: many (1001 sub-exceptions)"
        assert len(raised(ExceptionGroup("many", [ValueError()] * 1000)).exceptions) == 1000  # noqa: F821
        deep = ValueError()
        for _ in range(31):
            deep = ExceptionGroup("deep", [deep])  # noqa: F821
        assert type(raised(deep)) is miniplug.RemoteError
        assert type(raised(deep.exceptions[0])) is not miniplug.RemoteError

    def test_a_host_without_groups_gets_the_same_text(self, monkeypatch):
        monkeypatch.delattr("builtins.ExceptionGroup")
        body = {
            "type": "ExceptionGroup",
            "message": "outer (2 sub-exceptions)",
            "kind": "ExceptionGroup",
            "args": ["outer"],
            "parts": [{}, {}],
        }
        back = miniplug._decode_error(body)
        assert type(back) is miniplug.RemoteError and str(back) == "ExceptionGroup: outer (2 sub-exceptions)"


# -- objects that are lent by their type


def test_a_type_whose_instances_are_lent_by_reference(write):
    path = write(
        "trees.py",
        """
        import miniplug

        class Node:
            def __init__(self, name, children=()):
                self._name, self._children = name, list(children)
            def name(self): return self._name
            def children(self): return self._children
            def parent_of(self, node): return node in self._children

        if not hasattr(miniplug, "the_host"):
            miniplug.register(Node, name="trees.Node", encode=miniplug.ref, decode=lambda node: node)

        class Trees:
            def root(self): return Node("root", [Node("left"), Node("right", [Node("leaf")])])
    """,
    )

    class Node:
        """What stands in the host for a node of the plugin's."""

        def __init__(self, proxy):
            self.proxy = proxy

        def walk(self):
            yield self.proxy.name()
            for child in self.proxy.children():
                yield from child.walk()

    miniplug.register(Node, name="trees.Node", encode=lambda node: node.proxy, decode=Node)
    with miniplug.launch(path + ":Trees") as plugin:
        root = plugin.dispense().root()
        assert type(root) is Node and [*root.walk()] == ["root", "left", "right", "leaf"]
        left, right = root.proxy.children()
        assert root.proxy.parent_of(right) is True and left.proxy.parent_of(right) is False  # at home it is itself again
        with pytest.raises(ValueError, match=re.escape("travels by itself")):
            miniplug.register(dict, encode=miniplug.ref, decode=dict)
