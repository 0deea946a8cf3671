"""docs/protocol.md against miniplug.py: every example there, byte for byte, in both directions."""

import array
import dataclasses
import datetime
import decimal
import enum
import fractions
import gc
import hashlib
import hmac
import json
import os
import pathlib
import re
import sys
import threading
import uuid

import pytest
from conftest import channel_and_end, channels, until

import miniplug

DOC = (pathlib.Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
SECONDS = 10.0

# What the plugin of the examples serves. It is compiled under this name so that a traceback is the same everywhere.
GREETER = '''
class Greeter:
    def about(self):
        return current.get().session.call(0, "info", (), {}, None)
    def echo(self, data):
        return data
    def greet(self, name):
        if not name:
            raise ValueError("no name")
        return f"Hello, {name}!"
    def wait(self):
        while not cancelled():
            pause.wait(0.01)
    def count(self, limit):
        yield from range(limit)
    def each(self, names, function):
        return [function(name) for name in names]
'''


def blocks(kind):
    """The fenced blocks of a kind: name to text."""
    return dict(re.findall(rf"^```{kind} ?(\S*)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL))


def parse(block):
    """A hex block: (settings, [(direction, bytes), ...]). The text beside the bytes is checked."""
    settings, wire = {}, []
    for line in block.splitlines():
        if line[0] not in "<>":
            name, value = line.split(" ", 1)
            settings[name] = value
            continue
        digits, _, remark = line[2:].partition("  ")
        data = b""
        for word in digits.split(" "):
            unit, _, times = word.partition("*")
            data += bytes.fromhex(unit) * int(times or 1)
        if remark.startswith("|"):
            assert remark == f"|{data.decode()}|"
        if wire and wire[-1][0] == line[0]:
            wire[-1] = (line[0], wire[-1][1] + data)
        else:
            wire.append((line[0], data))
    return settings, wire


HEX = {name: parse(text) for name, text in blocks("hex").items()}
SETTINGS = HEX["handshake"][0]
KEY, ADDRESS = bytes.fromhex(SETTINGS["key"]), SETTINGS["address"]


def rows(*heads):
    """The rows of the table with these heads, as lists of cells."""
    start = DOC.index("| " + " | ".join(heads) + " |\n")
    lines = DOC[start : DOC.index("\n\n", start)].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def read(sock, size):
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, f"the connection ended after {data!r}"
        data += more
    return data


def play(sock, names, mine):
    """Be one side by hand: send what the document says that this side sends, and compare what the other one sends."""
    for name in names:
        for direction, data in HEX[name][1]:
            if direction == mine:
                sock.sendall(data)
            else:
                assert read(sock, len(data)) == data, name


class Background:
    """A function on a thread of its own; `result` waits for it, and raises what it raised."""

    def __init__(self, function, *args):
        self._outcome = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function, *args):
        try:
            self._outcome = (function(*args), None)
        except BaseException as error:
            self._outcome = (None, error)

    def result(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        value, error = self._outcome
        if error is not None:
            raise error
        return value


@pytest.fixture
def ends():
    """A channel for the real side, and the other end of its connection to play by hand."""
    channel, theirs = channel_and_end()
    theirs.settimeout(SECONDS)
    yield channel, theirs
    theirs.close()
    channel.close()


@pytest.fixture
def nonce(monkeypatch):
    """Sets what the real side draws as its nonce."""
    def set_to(role):
        monkeypatch.setattr(miniplug.os, "urandom", lambda size: bytes.fromhex(SETTINGS[f"{role}_nonce"]))
    return set_to


def served():
    names = {"current": miniplug._current, "cancelled": miniplug.cancelled, "pause": threading.Event()}
    exec(compile(GREETER, "<greeter>", "exec"), names)
    return {"greeter": names["Greeter"]()}


def hello(channel, role, key=KEY, address=ADDRESS):
    made = miniplug._Hello(channel, address, key, role)
    if role == "host":
        return made.as_host([1, 2], 256 << 20)
    return made.as_plugin([1], 1 << 20, {"key": "MINIPLUG_COOKIE", "matches": True})


def host_session(channel, terms):
    def lost(cause):
        return lambda calls: miniplug.PluginClosed(repr(cause))
    return miniplug._open_session(channel, terms, 256 << 20, miniplug._Served({}), lost)


def plugin_session(channel, terms):
    plugins = miniplug._Served(served(), {"version": "1.0"})
    return miniplug._open_session(channel, terms, 1 << 20, plugins, lambda cause: lambda calls: cause, True)


CONVERSATION = ["handshake", "dispense", "call", "error", "unknown", "cancel", "notify", "ping", "nested", "stream", "close",
                "callback", "own", "release", "buffer", "shutdown"]


def be_host(channel, given_up):
    """The host of the conversation, by the real code. What it receives is checked here."""
    session = host_session(channel, hello(channel, "host"))
    proxy = session.call(0, "dispense", ("greeter",), {}, SECONDS)
    assert proxy.greet("world") == "Hello, world!"
    with pytest.raises(ValueError, match="no name") as caught:
        proxy.greet(name="")
    assert isinstance(caught.value, miniplug.RemoteError)
    assert 'File "<greeter>"' in caught.value.remote_traceback
    with pytest.raises(miniplug.MethodNotFound) as missing:
        session.call(1, "great", (), {}, SECONDS)
    assert (missing.value.name, missing.value.matches) == ("great", ["greet"])
    with pytest.raises(miniplug.CallTimeout):
        session.call(1, "wait", (), {}, 0.05)
    assert given_up.acquire(timeout=SECONDS)  # a thread of the pool tells
    proxy.greet.notify("nobody")
    assert session.ping(SECONDS) < SECONDS
    assert proxy.about() == {}
    assert list(proxy.count(66)) == list(range(66))
    with proxy.count(1_000_000) as stream:
        assert next(stream) == 0
    assert list(stream) == []
    until(lambda: not session.calls)
    assert proxy.each(["a", "b"], lambda name: name.upper()) == ["A", "B"]
    function = lambda: None  # noqa: E731 -- lent, it comes home as itself
    assert proxy.echo(function) is function
    session.call(0, "dispense", (None,), {}, SECONDS)  # a reference that is dropped, and so given back with what is sent next
    gc.collect()
    assert proxy.echo(b"a" * 2049) == b"a" * 2049
    assert not session.references.lends and not session.calls
    session.post(miniplug._SHUTDOWN, 0, 2.0)
    return session


def be_plugin(channel):
    """The plugin of the conversation, by the real code."""
    session = plugin_session(channel, hello(channel, "plugin"))
    assert session.finished.acquire(timeout=SECONDS)
    assert session.closing == 2.0
    miniplug._until(lambda: not session.requests, SECONDS)
    return session


def test_the_document_has_all_of_the_conversation():
    assert list(HEX) == CONVERSATION
    assert all(wire for _, wire in HEX.values())


def test_the_host_says_and_takes_what_the_document_says(ends, nonce, monkeypatch):
    channel, plugin = ends
    nonce("host")
    given_up, give_up = threading.Semaphore(0), miniplug._Caller.give_up
    monkeypatch.setattr(miniplug._Caller, "give_up", lambda *args: (give_up(*args), given_up.release()))
    host = Background(be_host, channel, given_up)
    play(plugin, CONVERSATION, "<")
    session = host.result()
    plugin.close()
    with pytest.raises((miniplug.PluginClosed, miniplug._Sealed)):  # the latter once the end is known
        session.call(1, "greet", (), {}, SECONDS)


def test_the_plugin_says_and_takes_what_the_document_says(ends, nonce, monkeypatch):
    channel, host = ends
    nonce("plugin")
    monkeypatch.setattr(miniplug, "_GATHER", float("inf"))  # how items gather is a matter of time; here it is of number
    plugin = Background(be_plugin, channel)
    play(host, CONVERSATION, ">")
    session = plugin.result()
    assert not session.requests
    channel.shutdown()  # as serve() does now
    assert host.recv(1) == b""  # it has sent nothing else


# -- the handshake

@pytest.mark.parametrize("change", ["key", "address"])
@pytest.mark.parametrize("role", ["host", "plugin"])
def test_a_proof_is_of_one_key_and_one_address(ends, nonce, role, change):
    channel, other = ends
    nonce(role)
    options = {"key": bytes(32)} if change == "key" else {"address": "/tmp/elsewhere/s"}
    ours, theirs = (">", "<") if role == "host" else ("<", ">")
    side = Background(lambda: hello(channel, role, **options))
    for direction, data in HEX["handshake"][1]:
        if direction == theirs:
            other.sendall(data)
        elif direction == ours and data == HEX["handshake"][1][0][1]:
            assert read(other, len(data)) == data
    with pytest.raises(miniplug.AuthenticationError):
        side.result()


@pytest.mark.parametrize("lacks", [False, True], ids=["of Python", "of OpenSSL"])
def test_a_proof_is_what_hmac_makes(monkeypatch, lacks):
    """Whichever SHA-256 there is, and however long the key is: one of more than a block is hashed first."""
    if lacks:
        monkeypatch.setitem(sys.modules, "_sha256", None)
        monkeypatch.setitem(sys.modules, "_sha2", None)
        assert miniplug._sha256() is hashlib.sha256
    for size in (16, 32, 63, 64, 65, 1000):
        key = bytes(each % 251 for each in range(size))
        hello = miniplug._Hello(None, "/tmp/s", key, "host")
        hello._said = [b"first", b"second"]
        said = b"".join(len(part).to_bytes(4, "big") + part for part in (b"plugin", b"/tmp/s", b"first", b"second"))
        assert hello._mac("plugin") == hmac.new(key, said, "sha256").hexdigest()


def test_each_message_of_the_handshake_is_covered_by_a_proof(ends, nonce):
    """Whatever is changed on the way, one side refuses: here the choice, which comes after the plugin's proof."""
    channel, host = ends
    nonce("plugin")
    plugin = Background(hello, channel, "plugin")
    said = [data for direction, data in HEX["handshake"][1] if direction == ">"]
    longer = said[1].replace(b'"codec":', b'"codec": ').replace(b"\x00\x00\x00\x25", b"\x00\x00\x00\x26")
    assert len(longer) == len(said[1]) + 1
    host.sendall(said[0] + longer)
    with pytest.raises(miniplug.AuthenticationError):
        plugin.result()


def test_a_refusal_reaches_the_plugin_under_a_proof():
    both = channels()
    hello_of_plugin = miniplug._Hello(both[1], ADDRESS, KEY, "plugin")
    plugin = Background(hello_of_plugin.as_plugin, [7], 1 << 20, {"matches": True})
    with pytest.raises(miniplug.HandshakeError, match="no common protocol version"):
        hello(both[0], "host")
    with pytest.raises(miniplug.HandshakeError, match="no common protocol version"):
        plugin.result()
    for channel in both:
        channel.close()


def test_the_handshakes_frames_are_short():
    _, wire = HEX["handshake"]
    assert sum(len(data) for _, data in wire) < miniplug._HELLO_LIMIT
    assert (miniplug._HELLO_LIMIT, miniplug._HELLO_SECONDS) == (4096, 5.0)
    assert "at most 4096 bytes" in DOC and "at most 5 seconds" in DOC


# -- the tables

def test_the_header_is_as_in_the_table():
    table = [(int(offset), int(size)) for offset, size, _ in rows("offset", "size", "field")[:2]]
    assert table == [(0, 4), (4, 8)]
    start = DOC.index("| offset | size | field |", DOC.index("## 5. Messages"))
    lines = DOC[start : DOC.index("\n\n", start)].splitlines()[2:]
    sizes = [tuple(map(int, line.split("|")[1:3])) for line in lines]
    offset = 0
    for where, size in sizes:
        assert where == offset
        offset += size
    assert offset == miniplug._HEADER.size == 24
    packed = miniplug._HEADER.pack(1, 2, 3, 4, 5, 6)
    assert [int.from_bytes(packed[where : where + size], "big") for where, size in sizes] == [1, 2, 3, 4, 5, 6]
    assert str(miniplug._MAX_BUFFERS) in lines[3]


def test_the_kinds_are_those_of_the_table():
    for number, name, _, _ in rows("kind", "name", "number", "body"):
        assert getattr(miniplug, f"_{name.upper()}") == int(number)
    assert len(rows("kind", "name", "number", "body")) == miniplug._SHUTDOWN


def test_the_methods_of_system_are_those_of_the_table():
    names = sorted(row[0].strip("`") for row in rows("method", "arguments", "result"))
    assert names == sorted(miniplug._method_names(miniplug._System))


def test_a_description_is_as_the_document_shows():
    class Greeter:
        def greet(self, name: str, *, loud=False) -> str:
            """A greeting."""

    system = miniplug._References(miniplug._Served({"greeter": Greeter})).resolve(0, "describe")
    shown = json.loads(blocks("json")["describe"])
    assert system("greeter") == shown
    assert system() == {"system": system("system"), "greeter": shown}


def test_the_window_is_that_of_the_document():
    assert f"an integer from 1 to {miniplug._WINDOW} |" in DOC
    assert f"at most {miniplug._WINDOW} items that it has not read" in DOC
    assert f"when it has read {miniplug._WINDOW // 2} or more of them" in DOC
    assert miniplug._STREAM == 4


def test_the_own_errors_carry_what_the_table_says():
    for name, _, state in rows("type", "when", "state"):
        kind = getattr(miniplug, name.strip("`"))
        carried = re.findall(r"`(\w+)`", state)
        assert sorted(carried) == sorted(kind.__dict__.get("__annotations__", {}))
        state = {key: {str: "x", int: 5, tuple: ["x"]}[type(getattr(kind, key))] for key in carried}
        error = miniplug._decode_error({"type": kind.__name__, "own": True, "message": "m", "state": state})
        assert type(error) is kind and {key: getattr(error, key) for key in carried} == state
        error = miniplug._decode_error({"type": kind.__name__, "own": True, "message": "m", "state": {key: {} for key in carried}})
        assert type(error) is kind and {key: getattr(error, key) for key in carried} == {key: getattr(kind, key) for key in carried}


# -- the codec

def codec():
    def borrow(tag, state):
        raise ValueError(tag)
    return miniplug._Codec(lambda value, lent: None, lambda lent: None, borrow)


@miniplug.register(name="shapes.Point")
@dataclasses.dataclass
class Point:
    x: object
    y: object


@miniplug.register(name="shapes.Color")
class Color(enum.Enum):
    RED = 1


def python_of(text):
    names = {"array": array, "Point": Point, "Color": Color, "datetime": datetime,
             "decimal": decimal, "fractions": fractions, "pathlib": pathlib, "uuid": uuid}
    if "zoneinfo" in text:
        zoneinfo = pytest.importorskip("zoneinfo")
        if "Europe/Berlin" not in zoneinfo.available_timezones():
            pytest.skip("this machine has no time zone database")
        names["zoneinfo"] = zoneinfo
    return eval(text, names)


def same(one, other):
    """Equal and of one type, all the way down; NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(one, memoryview):
        one = bytes(one)
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return one == other and getattr(one, "tzinfo", None) == getattr(other, "tzinfo", None)


VALUES = [[cell.split("`")[1] if "`" in cell else cell for cell in row] for row in rows("tag", "Python", "on the wire")]


@pytest.mark.parametrize(("tag", "python", "wire"), VALUES, ids=[row[1] for row in VALUES])
def test_a_value_goes_as_the_table_says_and_comes_back(tag, python, wire):
    foreign = "PosixPath" if os.name == "nt" else "WindowsPath"
    if python.startswith(f"pathlib.{foreign}"):  # it cannot be made on this platform; it arrives as the pure kind
        arrived = codec().loads(wire.encode(), [], True)
        assert same(arrived, python_of(python.replace("pathlib.", "pathlib.Pure")))
        return
    value = python_of(python)
    data, buffers, tagged, _ = codec().dumps(value, "value")
    assert (data.decode(), list(buffers), tagged) == (wire, [], tag != "none")
    assert same(value, codec().loads(wire.encode(), [], True))
    if tag == "none":
        assert same(value, codec().loads(wire.encode(), [], False))
    else:
        assert f'"{tag}"' in wire
        assert codec().loads(wire.encode(), [], False) == json.loads(wire)  # without the flag it is what it looks like


def test_the_table_has_every_tag():
    assert {row[0] for row in VALUES} - {"none"} == {*miniplug._TAGS} - {"$each", "$numbers"}


@pytest.mark.parametrize(("name", "value"), [("numbers", [1, -2] * 16), ("each", [(0, "a")] * 32)])
def test_a_long_list_goes_as_the_document_says_to_a_side_that_knows_it(name, value):
    wire = blocks("json")[name].strip()
    asked = codec()
    asked.arrays = True
    assert (asked.dumps(value, "value")[0].decode(), asked.dumps(value, "value")[2]) == (wire, 1)
    assert same(value, codec().loads(wire.encode(), [], True))
    assert "32 or more items" in DOC and miniplug._MANY == 32
    assert f'"${name}"' not in codec().dumps(value, "value")[0].decode()
    assert asked.dumps(value[:31], "value")[0] == codec().dumps(value[:31], "value")[0]


def test_what_each_may_have_is_what_the_document_says():
    told = re.search(r"It may be (.*?)\.\n", DOC, re.DOTALL).group(1)
    assert {*re.findall(r"`(\$\w+)`", told)} == miniplug._EACH


def test_the_bounds_are_those_of_the_document():
    table = {row[1]: row[0] for row in rows("bound", "of")}
    assert [int(re.findall(r"\d+", bound)[0]) for bound in table.values()] == [
        miniplug._MAX_BITS, miniplug._MAX_DIGITS, miniplug._MAX_ALIKE, miniplug._MAX_COMBINATIONS]
    assert f"more than {miniplug._MAX_PARTS} exceptions, or more than {miniplug._MAX_LEVELS} levels" in DOC


def test_a_group_arrives_as_the_document_says():
    body = json.loads(blocks("json")["group"])
    error = miniplug._decode_error(body)
    if sys.version_info < (3, 11):
        assert type(error) is miniplug.RemoteError and str(error) == "ExceptionGroup: two things (2 sub-exceptions)"
        return
    assert isinstance(error, ExceptionGroup) and isinstance(error, miniplug.RemoteError)  # noqa: F821
    assert str(error) == "two things (2 sub-exceptions)"
    first, second = error.exceptions
    assert isinstance(first, ValueError) and isinstance(first, miniplug.RemoteError) and first.args == ("no name",)
    assert (type(second), str(second), second.type_name) == (miniplug.RemoteError, "Closed: until May", "shop.Closed")


def test_buffers_begin_above_the_length_that_the_document_says():
    longest = int(re.search(r"with more than (\d+)\nbytes", DOC).group(1))
    assert codec().dumps(bytes(longest), "value")[1] == []
    long = bytes(longest + 1)
    data, buffers, tagged, _ = codec().dumps([long, bytearray(long)], "value")
    assert (data, buffers, tagged) == (b'[{"$bytes":0},{"$bytearray":1}]', [long, long], True)
    assert same(codec().loads(data, buffers, True), [long, bytearray(long)])
    assert codec().loads(b'{"$bytes":0}', [b"short"], True) == b"short"


def test_the_depth_that_is_promised():
    depth = int(re.search(r"(\d+) levels always are", DOC).group(1))
    assert codec().loads(b"[" * depth + b"]" * depth, [], False)
    assert codec().loads(b'{"$tuple":[' * (depth // 2) + b"]}" * (depth // 2), [], True)


# -- errors and log lines

def test_the_error_that_a_foreign_plugin_sends():
    error = miniplug._decode_error(json.loads(blocks("json")["error"]))
    assert isinstance(error, ValueError) and isinstance(error, miniplug.RemoteError)
    assert error.args == ("no name",) and error.type_name == "ValueError"


def test_the_least_error_and_the_empty_one():
    error = miniplug._decode_error({"type": "Oops", "message": "it broke"})
    assert (type(error), error.type_name, str(error)) == (miniplug.RemoteError, "Oops", "Oops: it broke")
    assert error.message == "it broke"
    assert type(miniplug._decode_error({})) is miniplug.RemoteError


def test_the_log_line(caplog):
    import logging
    parent = logging.getLogger("test_protocol")
    with caplog.at_level(1, "test_protocol"):
        miniplug._LogSink(parent, "stderr")(blocks("json")["log"].strip())
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("test_protocol.store.disk", "WARNING")
    assert record.getMessage() == "disk is full"
    assert record.free == 12
    assert not [key for key in vars(record) if key.startswith("@")]
