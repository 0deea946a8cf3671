"""Whatever arrives: every tag, every error, nested and mutilated. The oracles are in fuzz/oracle.py."""

import json
import os
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuzz"))
import oracle
from test_values import inner_values

import miniplug

examples = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # many, and others each time
many = settings(max_examples=examples or 200, derandomize=not examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def memory():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def tagged(name, *states):
    return st.one_of(*states).map(lambda state: {name: state})


integers = st.integers(-3, 5) | st.integers(-(2**80), 2**80) | st.sampled_from([2**63 - 1, 2**63, 2**53, 10**400])
texts = st.text(max_size=6) | st.sampled_from(
    [
        "",
        "nan",
        "-inf",
        "1e5",
        "1E+9999",
        "1e999999999",
        "0e-999999999",
        "0x10",
        "-0x" + "f" * 9000,
        "2026-01-31",
        "12:05",
        "AAAA",
        "A",
        "2026-01-31T12:05:00+00:00",
        "2026-01-31T12:05:00.000001+23:59:59.999999",
        "12:05:00",
        "q",
        "d",
        "h",
        "u",
        "little",
        "big",
        "UTC",
        "Europe/Berlin",
        "../../etc/passwd",
        "/etc/passwd",
        "a\x00b",
        "os.path/x",
        "sNaN9",
        "9" * 5000,
        "0" * 32,
        "f" * 32,
        "fuzz.Point",
        "fuzz.Mode",
        "fuzz.Failure",
        "fuzz.Syntax",
        "ValueError",
        "SyntaxError",
        "UnicodeDecodeError",
        "SystemExit",
        "ExceptionGroup",
        "__reduce__",
        "__class__",
        "with_traceback",
        "add_note",
        "R",
        "R|W",
    ]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
plain = st.just({"$int": hex(10**9000)}) | st.none() | st.booleans() | integers | floats | texts
names = st.sampled_from([*miniplug._TAGS, "$ref", "$own", "$unknown", "$"])


def deeper(inner):
    lists = st.lists(inner, max_size=4)
    return st.one_of(
        lists,
        lists.map(lambda items: items * 40),
        st.dictionaries(texts, inner, max_size=3),
        st.builds(lambda name, state: {name: state}, names, inner | lists),
        tagged("$dict", st.lists(inner, max_size=3).map(lambda items: items * 2), lists),
        tagged("$each", st.tuples(names, lists | lists.map(lambda items: items * 20))),
        tagged(
            "$numbers",
            st.tuples(st.sampled_from("qdxQ"), inner),
            st.tuples(st.sampled_from("qd"), st.binary(max_size=32).map(lambda data: {"$bytes": miniplug._base64(data)})),
        ),
        tagged(
            "$array",
            st.tuples(texts, integers, texts, inner),
            st.tuples(
                st.sampled_from("bBuhiqfd"),
                st.sampled_from([1, 2, 4, 8]),
                st.sampled_from(["little", "big"]),
                st.binary(max_size=16).map(lambda data: {"$bytes": miniplug._base64(data)}),
            ),
        ),
        tagged("$bytes", st.integers(-1, 3), st.booleans(), texts),
        *(tagged(name, st.tuples(texts, st.integers(-1, 2), inner | st.none())) for name in ("$datetime", "$time")),
        tagged("$timedelta", st.tuples(integers, integers, integers)),
        tagged(
            "$timezone",
            st.tuples(tagged("$timedelta", st.tuples(integers, integers, integers))),
            st.tuples(tagged("$timedelta", st.just([0, 3600, 0])), texts),
        ),
        *(tagged(name, st.tuples(inner, inner)) for name in ("$fraction", "$complex")),
        *(tagged(name, st.tuples(inner, inner, inner)) for name in ("$range", "$slice")),
        tagged(
            "$type",
            st.tuples(texts, inner),
            st.tuples(st.just("fuzz.Point"), st.builds(lambda x, y: {"x": x, "y": y}, inner, inner)),
            st.tuples(st.just("fuzz.Mode"), st.integers(-9, 99)),
            st.tuples(st.sampled_from(["fuzz.Failure", "fuzz.Syntax"]), states(inner)),
        ),
    )


def states(inner):
    """What an exception may be said to hold."""
    keys = st.sampled_from(
        [
            "args",
            "errno",
            "strerror",
            "filename",
            "filename2",
            "winerror",
            "name",
            "path",
            "code",
            "message",
            "object",
            "__notes__",
            "__cause__",
            "__class__",
            "__dict__",
            "__reduce__",
            "with_traceback",
            "add_note",
            "_body",
            "type_name",
            "remote_traceback",
            "text",
            "offset",
            "end_offset",
            "name_from",
            "print_file_and_line",
        ]
    )
    return st.dictionaries(keys, inner, max_size=5)


wire = plain
for _ in range(3):
    wire = st.deferred(lambda inner=wire: plain | deeper(inner))
places = st.lists(integers | texts | st.none() | wire, min_size=3, max_size=8)
arguments = (
    st.lists(wire, max_size=5)
    | st.tuples(texts, places)
    | st.tuples(texts, places.map(lambda place: {"$tuple": place}))
    | st.tuples(texts, st.just({"$bytes": "AAAA"}), integers, integers, texts)
)


def bodies(inner):
    """Bodies of error messages."""
    registered = st.tuples(
        st.sampled_from(["fuzz.Failure", "fuzz.Syntax", "fuzz.Point"]),
        st.builds(lambda state, args: {**state, "args": args}, states(wire), arguments),
    )
    plain_body = st.fixed_dictionaries(
        {},
        optional={
            "type": texts | wire,
            "message": texts | wire,
            "traceback": texts | wire,
            "own": st.booleans() | wire,
            "kind": st.sampled_from([*oracle.BUILTIN_ERRORS, "ExceptionGroup", "BaseExceptionGroup", "SystemExit"]) | wire,
            "args": arguments | wire,
            "state": states(wire) | wire,
            "registered": wire | registered,
        },
    )
    if inner is None:
        return plain_body
    return (
        st.builds(
            lambda body, parts, text: {**body, "parts": parts, "args": [text]},
            plain_body,
            st.lists(inner | wire, max_size=4) | wire,
            texts,
        )
        | plain_body
    )


error = None
for _ in range(3):
    error = st.deferred(lambda inner=error: bodies(inner))


def text_of(value):
    return json.dumps(value, ensure_ascii=True).encode()


@many
@given(wire)
def test_every_tag_with_any_state(value):
    oracle.check_value(text_of(value))


@many
@given(error | wire)
def test_every_error_can_be_used(body):
    oracle.check_error(text_of(body))


@many
@given(
    inner_values, st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6), st.integers(0, 8)), max_size=4), st.booleans()
)
def test_what_was_well_formed_and_is_mutilated(value, cuts, flag):
    data = bytes(oracle.CODEC.dumps(value, "value")[0])
    for at, put, drop in cuts:
        data = data[:at] + put + data[at + drop :]
    oracle.check_value(data, int(flag))
    oracle.check_error(data)


@many
@given(st.binary(max_size=100), st.booleans())
def test_noise(data, flag):
    oracle.check_value(data, int(flag))


@pytest.mark.parametrize(
    "unit",
    [
        "[],",
        "{},",
        '"",',
        "0,",
        "1.5,",
        '{"$set":[]},',
        '{"$tuple":[]},',
        '{"$bytearray":""},',
        '{"$posixpath":""},',
        '{"$decimal":"1"},',
        '{"$type":["fuzz.Point",{"x":0,"y":0}]},',
        '{"a":0},',
        '{"$complex":[0,0]},',
        '{"$timedelta":[0,0,0]},',
        '{"$ellipsis":[]},',
        '{"$dict":[]},',
        '{"$own":[]},',
        '{"$array":["b",1,"big",{"$bytes":""}]},',
    ],
)
def test_much_of_what_is_small(unit):
    count = 5000
    assert len(oracle.check_value(("[" + unit * (count - 1) + unit[:-1] + "]").encode())) == count


@pytest.mark.parametrize(
    ("tag", "state"),
    [
        ("$dict", "[]"),
        ("$tuple", "[]"),
        ("$bytes", '""'),
        ("$decimal", '"1"'),
        ("$timedelta", "[0,0,0]"),
        ("$date", '"2026-01-31"'),
        ("$type", '["fuzz.Mode",0]'),
    ],
)
def test_much_of_what_each_is_small(tag, state):
    count = 5000
    assert len(oracle.check_value(f'{{"$each":["{tag}",[{",".join([state] * count)}]]}}'.encode())) == count


@pytest.mark.parametrize("part", ["{}", "0", '{"parts":[]}', '{"kind":"ValueError","args":[]}', '{"parts":[{},{}],"args":[""]}'])
@pytest.mark.parametrize("count", [10, 999, 20_000])
def test_groups_of_many(part, count):
    oracle.check_error(f'{{"type":"G","args":["t"],"parts":[{",".join([part] * count)}]}}'.encode())


@pytest.mark.parametrize("depth", [5, 29, 31, 200, 450])
def test_groups_in_groups(depth):
    oracle.check_error(b'{"args":["t"],"parts":[' * depth + b"{}" + b"]}" * depth)
