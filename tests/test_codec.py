"""Values to bytes and back: what arrives is what was sent, types and all, or the sender says where it cannot travel."""

import datetime
import decimal
import fractions
import json
import math
import pathlib
import struct
import sys
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import miniplug


def codec():
    def borrow(tag, state):
        raise ValueError(tag)

    return miniplug._Codec(lambda value, lent: None, lambda lent: None, borrow)


def trip(value):
    data, buffers, tagged, _ = codec().dumps(value, "value")
    return codec().loads(data, [bytes(buffer) for buffer in buffers], tagged)


def same(one, two):
    return picture(one) == picture(two)


def picture(value):
    """A text that tells apart what is not the same, types and all; NaN is NaN, and -0.0 is not 0.0."""
    kind = type(value).__name__
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value).hex()
    if isinstance(value, int):
        return f"{kind}({value:x})"
    if isinstance(value, complex):
        return f"complex({picture(value.real)},{picture(value.imag)})"
    if isinstance(value, (list, tuple)):
        return f"{kind}({','.join(map(picture, value))})"
    if isinstance(value, (set, frozenset)):
        return f"{kind}({','.join(sorted(map(picture, value)))})"
    if isinstance(value, dict):
        return f"{kind}({picture(list(value.items()))})"
    if isinstance(value, slice):
        return f"slice({picture([value.start, value.stop, value.step])})"
    if isinstance(value, range):
        return f"range({picture([value.start, value.stop, value.step])})"
    if isinstance(value, fractions.Fraction):
        return f"fraction({picture([value.numerator, value.denominator])})"
    return f"{kind}({value!r},{getattr(value, 'fold', 0)})"


zones = st.one_of(st.none(),
                  st.builds(datetime.timezone, st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23))),
                  st.builds(datetime.timezone, st.just(datetime.timedelta(hours=1)), st.text(max_size=5)))
texts = st.text(st.characters(), max_size=20)  # lone surrogates, too
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.complex_numbers(), texts,
    st.binary(max_size=20),
    st.binary(max_size=20).map(lambda data: data * 300),
    st.decimals().filter(lambda number: not number.is_snan()), st.fractions(), st.uuids(),
    st.datetimes(timezones=zones), st.times(timezones=zones), st.dates(), st.timedeltas(), zones,
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    texts.filter(lambda text: "\x00" not in text).map(pathlib.PurePosixPath),
    texts.filter(lambda text: "\x00" not in text).map(pathlib.PureWindowsPath),
)
hashable = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=4)
keys = texts | st.sampled_from(["$", "$tuple", "$dict", "$ref", ""]) | hashable
values = st.recursive(
    atoms | st.binary(max_size=5000).map(bytearray) | st.builds(slice, st.integers(), st.none(), hashable),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    | st.sets(hashable, max_size=4) | st.frozensets(hashable, max_size=4),
    max_leaves=20,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(values)
def test_what_arrives_is_what_was_sent(value):
    assert same(trip(value), value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text("[]{}\",:0123456789$abtupledicref. ", max_size=80).map(str.encode), st.booleans())
def test_whatever_arrives_is_a_value_or_a_protocol_error(data, tagged):
    try:
        codec().loads(data, [b"buffer"], tagged)
    except miniplug.ProtocolError:
        pass


def test_plain_data_is_plain_json():
    value = {"a": [1, 2.5, None, True, "grüße"], "b": {}}
    data, buffers, tagged, _ = codec().dumps(value, "value")
    assert (data, list(buffers), tagged) == ('{"a":[1,2.5,null,true,"grüße"],"b":{}}'.encode(), [], False)


@pytest.mark.parametrize("value", [2**53 - 1, -(2**53) + 1, 2**53, -(2**53), 10**5000, -(10**5000), 1e308, 5e-324, -0.0],
                         ids=lambda value: f"{value:.0e}" if isinstance(value, float) else f"{value.bit_length()} bits")
def test_numbers_at_the_edges(value):
    assert same(trip([value]), [value])
    assert codec().dumps(value, "value")[2] == (isinstance(value, int) and abs(value) >= 2**53)


@pytest.mark.parametrize("tagged", [0, 1])
@pytest.mark.parametrize("text", ['{"a":[1,"b"]}', "5", '" "', "{}"])
def test_spaces_around_a_value_are_json(text, tagged):
    for before, after in (("", " \r\n"), (" \t", ""), ("\n", "\n\n")):
        whole = (before + text + after).encode()
        for body in (whole, bytearray(whole), memoryview(whole)):
            assert codec().loads(body, (), tagged) == json.loads(text)
    for bad in (f"{text} 1", f" {text}]", f"\x0b{text}", f"{text}\xa0", "", " "):
        with pytest.raises(miniplug.ProtocolError):
            codec().loads(bad.encode(), (), tagged)


def test_what_comes_with_spaces_around_it_is_borrowed_once():
    borrowed = []
    made = miniplug._Codec(None, None, lambda tag, state: borrowed.append(state))
    assert made.loads(b' [{"$ref":[1,null,true]}] ', (), 1) == [None] and borrowed == [[1, None, True]]


def test_long_bytes_go_beside_the_message():
    value = {"deep": [b"x" * 5000, (bytearray(b"y" * 5000),)]}
    data, buffers, _, _ = codec().dumps(value, "value")
    assert len(data) < 100 and list(map(len, buffers)) == [5000, 5000] and buffers[0] is value["deep"][0]
    assert same(trip(value), value)


def test_memoryviews_arrive_as_bytes():
    assert trip(memoryview(b"abc")) == b"abc" and trip(memoryview(b"")) == b""
    assert trip(memoryview(b"abcdef" * 1000)[::2]) == b"ace" * 1000
    assert trip(memoryview(b"abcdefgh").cast("I")) == b"abcdefgh"


@pytest.mark.skipif(sys.version_info < (3, 9), reason="zoneinfo is new in 3.9")
def test_zones():
    import zoneinfo

    try:
        zone = zoneinfo.ZoneInfo("Europe/Berlin")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("there is no time zone database")
    moment = datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zone)
    assert repr(trip(moment)) == repr(moment) and trip(moment).tzinfo is zone
    with open(zoneinfo.TZPATH[0] + "/Europe/Berlin", "rb") as file, pytest.raises(miniplug.NotSerializable):
        trip(zoneinfo.ZoneInfo.from_file(file))


class Text(str):
    pass


class Whole(int):
    pass


class Table(dict):
    pass


class Names(list):
    pass


@pytest.mark.parametrize("value", [Text("a"), Whole(3), Table(a=1), Names([1]), object(), int, len, lambda: 0,
                                   (x for x in ()), NotImplemented, sys, datetime.datetime.now],
                         ids=lambda value: type(value).__name__)
def test_what_would_change_is_refused(value):
    for where, held in (("value", value), ("value[1]", [0, value]), ("value['k'][0]", {"k": (value,)}), ("value[0]", [value, 1.5])):
        with pytest.raises(miniplug.NotSerializable) as caught:
            codec().dumps(held, "value")
        assert caught.value.path == where and type(value).__qualname__ in caught.value.type_name
    with pytest.raises(miniplug.NotSerializable, match=r"value\[1\] is of type .*Whole"):
        codec().dumps({Whole(1): 1}, "value")


def test_cycles_and_depth_are_refused():
    cycle = []
    cycle.append(cycle)
    table = {"self": None}
    table["self"] = (table,)
    for value in (cycle, table):
        with pytest.raises(miniplug.NotSerializable, match="nested too deeply, or contains itself"):
            codec().dumps(value, "value")


def test_two_references_to_one_list_arrive_as_two_lists():
    inner = [1]
    one, two = trip([inner, inner])
    assert one == two and one is not two


def test_a_path_of_this_platform():
    path = pathlib.Path("some") / "where"
    assert same(trip(path), path)


def test_decimals_and_friends_exactly():
    for value in (decimal.Decimal("1.10"), decimal.Decimal("-0"), decimal.Decimal("sNaN123"), decimal.Decimal("-Infinity"),
                  fractions.Fraction(10**40, 3), uuid.UUID(int=5), datetime.timedelta(-1, 1, 1), datetime.timezone.utc,
                  datetime.date(1, 1, 1), datetime.datetime.max, datetime.time(23, 59, fold=1)):
        assert same(trip(value), value)


def test_a_file_name_that_is_no_text():
    for path in (pathlib.PurePosixPath("a\udcff"), {pathlib.PureWindowsPath("\ud800"): [pathlib.PurePosixPath("caf\u00e9")]}):
        assert same(trip(path), path)


def test_a_time_zone_with_a_fraction_of_a_second():
    zone = datetime.timezone(datetime.timedelta(microseconds=1))  # Python reads "+00:00:00.000001" as UTC
    for value in (datetime.time(0, 0, tzinfo=zone), datetime.datetime(2026, 1, 31, tzinfo=zone)):
        assert same(trip(value), value)
