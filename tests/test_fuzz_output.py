"""Whatever a plugin writes: the host reads it at a cost in proportion, runs none of it, and can print what it made of it."""

import io
import json
import logging
import sys
import threading
import time

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import miniplug

SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
SECONDS = 2.0  # for a few kilobytes, on a machine that is busy; a cost that is out of proportion is seen all the same

# -- what must not happen while a line is read

FORBIDDEN = ("exec", "compile", "import", "open", "os.", "subprocess.", "socket.", "ctypes.", "marshal.", "pickle.")
_seen, _watched = [], threading.local()


def _audit(event, args):
    if getattr(_watched, "on", False) and event.startswith(FORBIDDEN):
        _seen.append((event, args))


sys.addaudithook(_audit)
miniplug._import("datetime")
miniplug._import("traceback")


class Quiet:
    """Within it no code is run and no file opened, and it does not take long."""

    def __enter__(self):
        _seen.clear()
        _watched.on = True
        self._start = time.monotonic()

    def __exit__(self, *error):
        _watched.on = False
        assert time.monotonic() - self._start < SECONDS
        assert not _seen


class Written(logging.Handler):
    """A handler as a host has it: each record is formatted, and goes to a file in UTF-8."""

    def __init__(self):
        super().__init__(0)
        self.file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        self.records = []
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(levelno)d %(message)s"))

    def emit(self, record):
        self.file.write(self.format(record) + "\n")
        self.file.flush()
        self.records.append(record)


PARENT = "host.fuzzed"


def deliver(lines):
    """Have the log take lines; returns the records that it made of them."""
    logger, handler = logging.getLogger(PARENT), Written()
    logger.propagate = False
    logger.setLevel(1)
    logger.addHandler(handler)
    try:
        sink = miniplug._LogSink(logger, "stderr")
        with Quiet():
            for line in lines:
                sink(line)
            sink.flush()
    finally:
        logger.removeHandler(handler)
    return handler.records


# -- lines

TEXT = st.text(st.characters(), max_size=40)
ODD_TEXT = st.one_of(TEXT, st.sampled_from(["", "root", ".", "a..b", "a." * 300, "x" * 1000, "%s %(name)s", "\x00\x1b[2J", "\n\r"]))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**2000), 1e308, 0, -1, True, 2**63]))
VALUES = st.recursive(st.one_of(st.none(), NUMBERS, ODD_TEXT), lambda each: st.one_of(
    st.lists(each, max_size=4), st.dictionaries(ODD_TEXT, each, max_size=4)), max_leaves=20)
KNOWN = ["@message", "@level", "@module", "@timestamp", "@levelno", "@traceback"]
KEYS = st.one_of(st.sampled_from([*KNOWN, *KNOWN, "msg", "args", "exc_info", "levelno", "name", "getMessage", "__class__",
                                  "__dict__", "message", "asctime", "stack_info", "process", "@other"]), ODD_TEXT)
USUAL = st.fixed_dictionaries({"@message": TEXT}, optional={
    "@level": st.sampled_from(["error", "WARN", "info", "debug", "trace", "off", ""]), "@module": ODD_TEXT,
    "@timestamp": st.one_of(st.sampled_from(["2026-01-31T00:00:00Z", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00",
                                             "Z" * 1000, "2026"]), ODD_TEXT, NUMBERS),
    "@levelno": NUMBERS, "@traceback": st.one_of(ODD_TEXT, VALUES)})
RECORDS = st.builds(lambda usual, more: {**more, **usual} if len(more) % 2 else {**usual, **more},
                    USUAL, st.dictionaries(KEYS, VALUES, max_size=5))
JSON_LINES = st.builds(
    lambda fields, cut, junk: (json_of(fields)[:cut] if cut else json_of(fields)) + junk,
    RECORDS, st.one_of(st.none(), st.integers(0, 60)), st.sampled_from(["", "", "", "}", " ", "]", "\x00"]))


def json_of(fields):
    """As json.dumps, with numbers of any length, which some Pythons refuse to write."""
    try:
        return json.dumps(fields)
    except ValueError:
        return '{"@message":"m","number":%s}' % ("9" * 5000)


LINES = st.one_of(JSON_LINES, ODD_TEXT.filter(lambda text: "\n" not in text).map(miniplug._clean), st.sampled_from([
    "Traceback (most recent call last):", "  File x", "ValueError: x", "", "  + Exception Group Traceback", "Exception in thread ",
    "The above exception was the direct cause of the following exception:", "{" * 500, '{"@message":' + "[" * 5000]))


@SETTINGS
@given(st.lists(LINES, max_size=12))
@example(['{"@message":"m","@module":"' + "a." * 40000 + '"}'])
@example(['{"@message":"m","@module":"."}'])
@example(['{"@message":"m","x":' + "9" * 100000 + "}"])
@example(['{"@message":"m","x":' + "[" * 100000 + "]" * 100000 + "}"])
@example(["Traceback (most recent call last):", *["  x"] * 10000])
def test_every_line_is_a_record_that_can_be_written(lines):
    records = deliver(lines)
    traces = sum(line.startswith(miniplug._LogSink._HEADS) for line in lines)
    assert bool(records) == bool(lines) and len(records) <= len(lines)
    if not traces:  # else several lines are one record
        assert len(records) == len(lines)
    for record in records:
        assert record.name == PARENT or record.name.startswith(PARENT + ".")
        assert type(record.levelno) is int and 0 < record.levelno <= 100
        assert record.args in ((), None) or record.args[0] == record.getMessage()


def test_afterwards_there_are_no_loggers_of_a_plugins():
    made = [name for name in logging.Logger.manager.loggerDict if name.startswith(PARENT + ".")]
    assert made in ([], [PARENT + ".stderr"])


@SETTINGS
@given(RECORDS)
def test_what_a_record_says_arrives(fields):
    """Where nothing is over a limit: its message, and its fields with their types."""
    line = json_of(fields)
    try:
        expected = json.loads(line)
    except ValueError:
        return
    (record,) = deliver([line])
    if isinstance(expected.get("@message"), str):
        assert record.getMessage() == miniplug._clean(expected["@message"])
        for key, value in expected.items():
            plain = not isinstance(value, (str, float, list, dict)) and not key.startswith("@")
            if plain and not hasattr(logging.makeLogRecord({"message": "", "asctime": ""}), key) and key == miniplug._clean(key):
                assert vars(record)[key] == value
    else:
        assert record.getMessage() == line


@SETTINGS
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"\r", b"\n", b"\r\n", "ü€😀".encode(), b"\xe2\x82", b"{}"]))))
def test_bytes_are_lines_however_they_come(chunks):
    data = b"".join(chunks)
    whole = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n").replace("\r", "\n")
    expected = whole.split("\n")
    if not expected[-1]:
        del expected[-1]
    lines = []
    reader = miniplug._Lines(None, lines.append)
    with Quiet():
        for chunk in [*filter(None, chunks), b""]:
            reader._take(chunk)
    assert lines == expected
    assert len(reader.last()) <= miniplug._TAIL_LINES


@SETTINGS
@given(st.lists(st.one_of(LINES, st.just("Fatal Python error: Segmentation fault")), max_size=60))
def test_the_last_words_are_short(lines):
    reader = miniplug._Lines(None, lambda line: None)
    with Quiet():
        reader._take("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n")
        last = reader.last()
    assert len(last) <= miniplug._TAIL_LINES and all(len(line) <= 1100 for line in last)
    for line in last:
        line.encode("utf-8")


# -- what the command line prints of what a plugin says of itself

@SETTINGS
@given(VALUES)
def test_what_is_printed_of_a_value(value):
    with Quiet():
        text = miniplug._printable(value)
    assert isinstance(text, str) and text


def remote_error(type_name, message):
    error = miniplug.RemoteError("x")
    error.type_name, error.message = type_name, message
    return error


@SETTINGS
@given(ODD_TEXT, ODD_TEXT, st.lists(ODD_TEXT.filter(lambda text: "\n" not in text), max_size=5))
def test_an_error_is_one_line(type_name, message, output):
    for error in (remote_error(type_name, message), miniplug.PluginCrashed(message, output=output)):
        with Quiet():
            line = miniplug._one_line(error)
        assert "\n" not in line
