"""Both sides against a bad other side: data that breaks the protocol, strangers at the door, a host without the key."""

import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

import by_hand
import pytest
from conftest import (
    HERE,
    WINDOWS,
    WINE,
    WORKSHOP,
    accepted,
    alive,
    by_hand_environment,
    channel_and_end,
    connection_of,
    stream,
    until,
)
from test_fuzz_messages import Peer

import miniplug

HOSTILE = os.path.join(HERE, "plugins", "hostile_plugin.py")
LIMIT = 65536
PROMPT = 12.0 if WINE else 3.0  # seconds; what is meant is one, but test machines are busy
KILLED = 1 if WINDOWS else -9  # the exit status


# -- a plugin that holds the key

STREAM = {  # broken below the level of frames, or only if it comes all at once
    "a frame too long": "struct.pack('!i', max_message + 25)",
    "a frame of 2 GiB": "struct.pack('!i', 0x7fffffff)",
    "a long frame too long": "struct.pack('!iQ', -1, 1 << 40)",
    "the longest frame there is": "struct.pack('!iQ', -1, (1 << 64) - 1)",
    "a negative length": "struct.pack('!i', -7)",
    "the lowest length": "struct.pack('!i', -1 << 31)",
    "a buffer too long": "message(RESULT, number, b'1', count=1) + struct.pack('!i', max_message)",
    "more items than credit": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'[' + b'1,' * 64 + b'1]')",
}
BROKEN = {
    # frames
    "a whole frame too long": "frame(bytes(max_message + 25))",
    "an empty frame": "frame(b'')",
    "a frame shorter than a header": "frame(bytes(23))",
    # headers
    "wire version 0": "message(RESULT, number, b'1', version=0)",
    "wire version 2": "message(RESULT, number, b'1', version=2)",
    "too many buffers": "message(RESULT, number, b'1', count=65537)",
    "4 billion buffers": "message(RESULT, number, b'1', count=0xffffffff)",
    "a whole buffer too long": "message(RESULT, number, b'1', count=1) + frame(bytes(max_message))",
    "buffers too long together": "message(RESULT, number, b'1', buffers=[bytes(max_message // 2)] * 2)",
    # kinds
    "kind 0": "message(0, number)",
    "kind 13": "message(13, number)",
    "kind 255": "message(255, number, b'{}', TAGGED)",
    "a shutdown from the plugin": "message(SHUTDOWN, 0, b'2.0')",
    # streams
    "an item about a call that does not stream": "message(ITEM, number, b'[1]')",
    "an end about a call that does not stream": "message(END, number)",
    "a second result": "message(RESULT, number, flags=STREAM) * 2",
    "a result in a stream": "message(RESULT, number, flags=STREAM) + message(RESULT, number, b'1')",
    "a pong in a stream": "message(RESULT, number, flags=STREAM) + message(PONG, number)",
    "items that are no array": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'1')",
    "items that are an object": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'{\"0\":1}')",
    "no items": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'[]')",
    "an item for a call that does not stream, with many more": "message(ITEM, number, b'[]') * 1000",
    "items without a body": "message(RESULT, number, flags=STREAM) + message(ITEM, number)",
    "more items than the window": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'[%s1]' % (b'1,' * 64))",
    "garbage in an item": "message(RESULT, number, flags=STREAM) + message(ITEM, number, b'[')",
    "garbage in an end": "message(RESULT, number, flags=STREAM) + message(END, number, b'[')",
    "no credit": "message(CREDIT, 1, b'0')",
    "negative credit": "message(CREDIT, 1, b'-1')",
    "too much credit": "message(CREDIT, 1, b'65')",
    "credit that is no number": "message(CREDIT, 1, b'\"1\"')",
    "credit that is true": "message(CREDIT, 1, b'true')",
    "credit with a fraction": "message(CREDIT, 1, b'1.0')",
    "credit without a body": "message(CREDIT, 1)",
    # JSON
    "garbage": "message(RESULT, number, b'garbage')",
    "half a value": "message(RESULT, number, b'[1,')",
    "two values": "message(RESULT, number, b'1 2')",
    "white space alone": "message(RESULT, number, b' ')",
    "bytes that are not UTF-8": r"message(RESULT, number, b'\"\xff\"')",
    "UTF-16": "message(RESULT, number, '[1]'.encode('utf-16'))",
    "a byte order mark": r"message(RESULT, number, b'\xef\xbb\xbf1')",
    "NaN": "message(RESULT, number, b'NaN')",
    "Infinity": "message(RESULT, number, b'[-Infinity]')",
    "deep objects": "message(RESULT, number, b'{\"a\":' * 10000)",
    "garbage in an error": "message(ERROR, number, b'garbage')",
    # calls
    "a call without a body": "message(CALL, 1)",
    "a call that is an object": "message(CALL, 1, b'{}')",
    "a call that is too short": "message(CALL, 1, b'[0,\"info\",[]]')",
    "a method that is a number": "message(CALL, 1, b'[0,5,[],{}]')",
    "arguments that are an object": "message(CALL, 1, b'[0,\"info\",{},{}]')",
    "named arguments that are an array": "message(NOTIFY, 1, b'[0,\"info\",[],[]]')",
}

DEEP = {  # how deep is too deep is the JSON reader's to say: since Python 3.14 it goes by the stack that there is
    "arrays": "message(RESULT, number, b'[' * 30000 + b']' * 30000)",
    "tags": "message(RESULT, number, b'{\"$tuple\":[' * 5000 + b']}' * 5000, TAGGED)",
}

BROKEN_TAGS = [
    '{"$unknown":1}', '{"$":1}', '{"$int":5}', '{"$int":"zz"}', '{"$int":null}', '{"$float":"x"}', '{"$float":[]}',
    '{"$str":5}', '{"$bytes":0}', '{"$bytes":-1}', '{"$bytes":true}', '{"$bytes":1.0}', '{"$bytes":"a"}',
    '{"$bytearray":[1]}', '{"$tuple":5}', '{"$set":[[1]]}', '{"$set":[{}]}', '{"$frozenset":null}', '{"$dict":[1]}',
    '{"$dict":[[[],1]]}', '{"$dict":[[1,2,3]]}', '{"$dict":7}', '{"$complex":["x","y"]}', '{"$date":5}',
    '{"$range":[0,1,0]}', '{"$range":["a"]}', '{"$slice":5}', '{"$date":"yesterday"}', '{"$datetime":[]}',
    '{"$datetime":["2026-01-31T00:00:00",7,null]}', '{"$datetime":["2026-01-31T00:00:00",0,"UTC"]}', '{"$time":{}}',
    '{"$timedelta":["x"]}', '{"$timedelta":[1e300]}', '{"$timezone":[1]}',
    '{"$zone":5}', '{"$decimal":"x"}', '{"$decimal":{}}', '{"$fraction":[1,0]}', '{"$fraction":["x","y"]}',
    '{"$uuid":"x"}', '{"$uuid":5}',
    '{"$posixpath":5}', '{"$windowspath":null}', '{"$pureposixpath":[1]}', '{"$purewindowspath":{}}', '{"$ref":5}',
    '{"$ref":[]}', '{"$ref":[1]}', '{"$ref":["1",null,false]}', '{"$ref":[true,null,false]}', '{"$ref":[1,[1],false]}',
    '{"$ref":[1,5,false]}',
]

IGNORED = {
    "an unknown kind": "message(13, number, b'[1]', IGNORABLE)",
    "a result for no call": "message(RESULT, 999, b'1')",
    "an error for no call": "message(ERROR, 999, b'{}')",
    "a pong for no ping": "message(PONG, 999)",
    "a stream for no call": "message(RESULT, 999, flags=STREAM) + message(ITEM, 999, b'[1]') + message(END, 999)",
    "more items than credit for no call": "message(ITEM, 999, b'[%s1]' % (b'1,' * 64))",
    "credit for no call": "message(CREDIT, 999, b'64')",
    "a cancel for no call": "message(CANCEL, 999)",
    "a release of nothing": "message(RELEASE, 999) + message(RELEASE, 0) + message(RELEASE, (1 << 64) - 1)",
    "the body of a kind that has none": "message(CANCEL, 999, b'{\"a\": 1}')",
    "flags that mean nothing yet": "message(PING, 7, b'1', 0xfff8)",
    "a context": "message(NOTIFY, 7, b'[0,\"info\",[],{},{\"trace\":1}]')",
    "a notify of a method that is not there": "message(NOTIFY, 7, b'[0,\"nothing\",[],{}]')",
    "a notify on behalf of no call": "message(NOTIFY, 7, b'[0,\"info\",[],{}]', parent=999)",
    "a call of a reference that is not lent": "message(CALL, 7, b'[5,\"\",[],{}]')",
    "buffers that nothing names": "message(RESULT, 999, b'1', buffers=[b'x', b''])",
    "a ping": "message(PING, 7)",
    "garbage in what may be ignored": "message(99, number, b'garbage', IGNORABLE)",
    "garbage for a call that is not there": "message(RESULT, 999, b'garbage')",
}


def launch(expression, *options):
    command = [sys.executable, HOSTILE, expression, *options]
    return miniplug.launch(command, name="hostile", max_message=LIMIT, stderr="discard")


def attack(expression, *options, kind=miniplug.ProtocolError):
    """Have it attack while another call waits. Both calls must fail promptly, and the process must be gone."""
    with launch(expression, *options) as plugin:
        pid, proxy = plugin.pid, plugin.dispense()
        failures = []

        def wait():
            try:
                proxy.never()
            except Exception as error:
                failures.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        until(lambda: plugin._supervisor.session().reader.seat)
        start = time.monotonic()
        with pytest.raises(kind) as caught:
            for _ in proxy.attack():  # some begin as a stream
                pass
        waiter.join(PROMPT)
        assert time.monotonic() - start < PROMPT
        assert not waiter.is_alive()
        assert type(failures[0]) is type(caught.value) is kind
        assert sorted(caught.value.calls) == ["attack", "never"]
        assert not plugin.running and plugin.exit_code is not None
        assert not alive(pid)
        with pytest.raises(kind):  # until it is started again
            proxy.echo(1)
    return caught.value


# The process's end, for which the host kills it, gets ahead of the reason why.


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=stream) for name in STREAM), *BROKEN])
def test_what_breaks_the_protocol_ends_the_plugin(name):
    error = attack({**STREAM, **BROKEN}[name])
    assert "broke the protocol" in str(error) and error.exit_code == KILLED


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_value_arrives_or_breaks_the_protocol(name):
    with launch(DEEP[name], "--going-on") as plugin:
        proxy = plugin.dispense()
        try:
            value, depth = proxy.attack(), 0
            while value:
                (value,), depth = value, depth + 1
            assert depth == {"arrays": 29999, "tags": 4999}[name] and proxy.echo(1) == 1
        except miniplug.ProtocolError:
            assert sys.version_info < (3, 14)


@pytest.mark.parametrize("body", ['{"$unknown":1}', '[{"$set":[[1]]}]', '{"$bytes":0}', '{"$ref":["1",null,false]}'])
def test_a_bad_tag_ends_the_plugin(body):
    attack(f"message(RESULT, number, {body.encode()!r}, TAGGED)")


def test_a_zone_is_no_path():
    codec = miniplug._Codec(len, len, len)
    with pytest.raises((miniplug.ProtocolError, miniplug._Undecodable)):  # the latter without a zoneinfo, in Python 3.8
        codec.loads(b'{"$zone":"../../etc/passwd"}', [], True)


@pytest.mark.parametrize("body", BROKEN_TAGS)
def test_a_bad_tag_is_refused(body):
    with pytest.raises(miniplug.ProtocolError):
        decode(body, lambda tag, state: miniplug._borrow(None, tag, state))


@stream
def test_a_frame_cut_short_is_the_end_of_the_connection():
    error = attack("struct.pack('!i', 100) + bytes(50)", "--closing", kind=miniplug.PluginCrashed)
    assert error.exit_code == KILLED


def test_a_message_cut_short_of_its_buffers_is_the_end_of_the_connection():
    attack("message(RESULT, number, b'1', count=2) + frame(b'x')", "--closing", kind=miniplug.PluginCrashed)


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_ignored(name):
    with launch(IGNORED[name] + " + message(RESULT, number, b'\"fine\"')", "--going-on") as plugin:
        proxy = plugin.dispense()
        assert proxy.attack() == "fine"
        assert proxy.echo([1]) == [1]


def test_a_message_of_just_the_limit_is_taken():
    with launch("message(RESULT, number, b'\"' + b'x' * (max_message - 2) + b'\"')", "--going-on") as plugin:
        assert plugin.dispense().attack() == "x" * (LIMIT - 2)


def test_a_stream_of_the_whole_window_is_taken():
    items = "b'[%s1]' % (b'1,' * 63)"
    stream = f"message(RESULT, number, b'null', STREAM) + message(ITEM, number, {items})"
    with launch(f"{stream} + message(END, number)", "--going-on") as plugin:
        proxy = plugin.dispense()
        assert list(proxy.attack()) == [1] * 64
        assert proxy.echo(1) == 1


def test_an_error_in_a_stream_is_one_of_that_call():
    with launch("message(RESULT, number, b'', STREAM) + message(ITEM, number, b'[1]') + message(ERROR, number, b'{}')",
                "--going-on") as plugin:
        proxy = plugin.dispense()
        stream = proxy.attack()
        assert next(stream) == 1
        with pytest.raises(miniplug.RemoteError):
            next(stream)
        assert list(stream) == [] and proxy.echo(1) == 1


def test_a_result_without_a_body_is_none():
    with launch("message(RESULT, number)", "--going-on") as plugin:
        assert plugin.dispense().attack() is None


@pytest.mark.parametrize("body", [
    'null', '5', '[]', '{}', '{"message":5}', '{"message":null,"type":7}', '{"own":true,"type":"launch"}',
    '{"own":true,"type":"RemoteError"}', '{"own":true,"type":[]}', '{"own":1,"type":"Handshake"}',
    '{"kind":[],"args":[]}', '{"kind":"ValueError","args":5}', '{"kind":"SystemExit","args":[0]}',
    '{"kind":"KeyboardInterrupt","args":[]}',
    '{"kind":"StopIteration","args":[]}', '{"kind":"eval","args":["1"]}', '{"kind":"UnicodeDecodeError","args":[1]}',
    '{"kind":"OSError","args":[],"state":{"args":5,"__class__":1,"__cause__":2}}', '{"traceback":{"a":1},"state":[1]}',
    '{"own":true,"type":"MethodNotFound","state":{"__class__":1,"name":{},"other":2}}',
])
def test_a_strange_error_is_an_error_of_that_call(body):
    with launch(f"message(ERROR, number, {body.encode()!r})", "--going-on") as plugin:
        proxy = plugin.dispense()
        with pytest.raises(miniplug.PluginError) as caught:
            proxy.attack()
        assert not isinstance(caught.value, miniplug.PluginCrashed)
        assert proxy.echo(1) == 1


# -- what the codec must not be made to do

def decode(text, borrow=None, buffers=()):
    codec = miniplug._Codec(lambda value, lent: None, lambda lent: None, borrow or (lambda tag, state: None))
    return codec.loads(text.encode(), buffers, True)


@pytest.mark.parametrize("tag", ["$tuple", "$set", "$frozenset", "$complex", "$timedelta", "$fraction"])
def test_a_range_is_not_unrolled(tag):
    with pytest.raises(miniplug.ProtocolError):
        decode(f'{{"{tag}":{{"$range":[1,3,1]}}}}')


@pytest.mark.parametrize(("tag", "method"), [("$uuid", "replace"), ("$dict", "keys")])
def test_a_reference_is_not_called_while_decoding(tag, method):
    asked = []

    class Target:
        label = "it"

        def call(self, name, *_):
            asked.append(name)
            return []

    with contextlib.suppress(miniplug.ProtocolError):
        decode(f'{{"{tag}":{{"$ref":[1,["{method}"],false]}}}}', lambda tag, state: miniplug._Proxy(Target(), state[1]))
    assert asked == []


def test_a_buffer_is_taken_once():
    with pytest.raises(miniplug.ProtocolError):
        decode('[{"$bytearray":0},{"$bytearray":0}]', buffers=[b"x" * 4096])


@pytest.mark.parametrize("number", ["7", "-1", "null", '"1"', "[]"])
def test_what_comes_home_and_was_not_lent_fails_one_call(number):
    with launch(f"message(RESULT, number, b'{{\"$own\":[{number},null]}}', TAGGED)", "--going-on") as plugin:
        proxy = plugin.dispense()
        with pytest.raises(miniplug.PluginError, match="not lent") as caught:
            proxy.attack()
        assert not isinstance(caught.value, miniplug.PluginCrashed)
        assert proxy.echo(1) == 1


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_a_reference_has_a_number_of_64_bits(number):
    with launch(f"message(RESULT, number, b'{{\"$ref\":[{number},null,false]}}', TAGGED)", "--going-on") as plugin:
        proxy = plugin.dispense()
        with contextlib.suppress(miniplug.ProtocolError):
            proxy.attack()
            for value in range(3):
                assert proxy.echo(value) == value


@pytest.mark.parametrize("answer", ["5", "null", '{"$ref":[1,null,false]}'])
def test_dispense_gives_a_reference_or_breaks_the_protocol(answer, write):
    plugin = write("no_reference.py", f"""
        import sys
        sys.path.insert(0, {os.path.dirname(HOSTILE)!r})
        from hostile_plugin import *
        host = Host()
        host.socket.sendall(message(RESULT, HEADER.unpack_from(host.receive())[4], {answer.encode()!r}))
        host.receive()  # a release, a shutdown, or the end
        """)
    with miniplug.launch([sys.executable, plugin], stderr="discard") as plugin, pytest.raises(miniplug.ProtocolError):
        plugin.dispense()


# -- without end


@pytest.mark.parametrize("items", [b"[]", b"[1]"])
def test_a_stream_that_nobody_reads_keeps_no_more_than_the_window(items):
    """However many messages come of it, and however few items are in each."""
    peer = Peer("plain", [(3, 4, "asked", 0, b"", ()), *[(5, 0, "asked", 0, items, ())] * 20_000], stays=True)
    with miniplug.attach(peer.config) as plugin:
        stream = plugin.dispense("x").plain()
        with pytest.raises(miniplug.ProtocolError):
            plugin.ping(50)
        assert len(stream._call.inbox) <= 66  # the window, one that is too much, and the end
    peer.close()


@pytest.mark.parametrize("kind", [1, 2], ids=["calls", "notifications"])
def test_calls_on_behalf_of_a_submitted_one_run_in_so_many_threads(kind):
    """The others wait, and hold up nothing."""
    count, inside, go = 2000, [], threading.Event()

    def block():
        inside.append(None)
        assert go.wait(50)

    calls = [(kind, 0, number + 1, "asked", b'[1,"",[],{}]', ()) for number in range(count)]
    peer = Peer("plain", [*calls, (3, 0, "asked", 0, b"7", ())], stays=True)
    with miniplug.attach(peer.config) as plugin:
        before = threading.active_count()
        call = plugin.dispense("x").plain.submit(block)
        assert call.result(50) == 7  # which came after them
        until(lambda: len(inside) == miniplug._NESTED)
        assert threading.active_count() <= before + 2 * miniplug._NESTED  # some found that those who run are enough
        assert len(inside) == miniplug._NESTED
        go.set()
        until(lambda: len(inside) == count)
    peer.close()


# -- strangers at the door

@pytest.mark.skipif(WINDOWS, reason="a named pipe is not queued for: each caller gets one of its own")
def test_a_queue_before_the_door_is_waited_in(tmp_path):
    address, queue = str(tmp_path / "s"), []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                queue.append(socket.socket(socket.AF_UNIX))
                queue[-1].setblocking(False)
                queue[-1].connect(address)
        listener.settimeout(1)

        def let_in():
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        opener = threading.Timer(0.1, let_in)
        opener.start()
        try:
            miniplug._connect(address, 10.0).close()
        finally:
            for sock in queue:
                sock.close()
            opener.join()


def stranger(address):
    sock = by_hand.connect(address)
    sock.settimeout(10)
    return sock


def knocks(address, kind, stop):
    """Come to the door in some bad way. Returns what is to be closed in the end."""
    if kind == "crowd":
        return [stranger(address) for _ in range(100)]
    sock = stranger(address)
    if kind == "leaving":
        sock.close()
    elif kind == "half":
        sock.sendall(b"\0\0")
    elif kind == "huge":
        sock.sendall(struct.pack("!i", 4097) + bytes(4097))
    elif kind == "negative":
        sock.sendall(struct.pack("!i", -7))
    elif kind == "babbling":
        threading.Thread(target=babble, args=(sock, [b"\xff" * 65536], stop), daemon=True).start()
    elif kind == "deep":
        sock.sendall(struct.pack("!i", 4096) + b"[" * 4096)
    elif kind == "slow":
        threading.Thread(target=babble, args=(sock, [b"\0", b"\0", b"\x0f", *[b" "] * 4000], stop), daemon=True).start()
    elif kind == "other key":
        threading.Thread(target=shake, args=(channel_of(sock), address, bytes(32)), daemon=True).start()
    elif kind == "no key":
        threading.Thread(target=shake, args=(channel_of(sock), address, b""), daemon=True).start()
    return [sock]


def babble(sock, pieces, stop):
    """Say pieces, again and again, one each 10 ms, until nobody listens."""
    with contextlib.suppress(OSError):
        while not stop.is_set():
            for piece in pieces:
                sock.sendall(piece)
                if stop.wait(0.01):
                    return


def channel_of(sock):
    return miniplug._PipeChannel(sock.connection) if WINDOWS else miniplug._Channel(connection_of(sock.dup()))


def shake(channel, address, key):
    """The plugin's part of the handshake."""
    try:
        return miniplug._Hello(channel, address, key, "plugin").as_plugin([1], 1 << 20, {"matches": True})
    except (miniplug.PluginError, OSError, EOFError) as error:
        return error
    finally:
        channel.close()


@pytest.fixture
def doors(monkeypatch):
    """A list for functions that take the door's address and come before the plugin; and the doors that were made."""
    visitors, made = [], []

    class Door(miniplug._Door):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)
            for visit in visitors:
                visit(self.listener.address)

    monkeypatch.setattr(miniplug, "_Door", Door)
    return visitors, made


@pytest.fixture
def decoded(monkeypatch):
    """The lengths of what is decoded in handshakes."""
    lengths = []
    loads = miniplug.json.loads

    def count(data, *args, **kwargs):
        if isinstance(data, bytes):
            lengths.append(len(data))
        return loads(data, *args, **kwargs)

    monkeypatch.setattr(miniplug.json, "loads", count)
    return lengths


KINDS = ["silent", "leaving", "half", "huge", "negative", "babbling", "deep", "slow", "other key", "no key", "crowd"]


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=[*KINDS, "all"])
def test_strangers_do_not_hold_up_the_plugin(doors, decoded, kinds):
    visitors, made = doors
    stop, socks = threading.Event(), []
    visitors.append(lambda address: [socks.extend(knocks(address, kind, stop)) for kind in kinds])
    start = time.monotonic()
    try:
        with miniplug.launch(WORKSHOP, start_timeout=20) as plugin:
            assert time.monotonic() - start < PROMPT  # and not the 5 s that a stranger may stay
            assert plugin.dispense().greet("world") == "Hello, world!"
            for sock in socks:  # the door is closed, and who stood there is sent away
                if sock.fileno() >= 0:
                    with contextlib.suppress(OSError):
                        while sock.recv(65536):
                            pass
            until(lambda: not made[0].callers)
            assert all(length <= 4096 for length in decoded)
    finally:
        stop.set()
        for sock in socks:
            sock.close()


def test_a_stranger_is_sent_away_when_the_time_is_up(doors, monkeypatch, write):
    """The plugin itself does not come before the stranger is gone."""
    visitors, _ = doors
    monkeypatch.setattr(miniplug, "_HELLO_SECONDS", 0.2)
    waited = []

    def visit(address):
        with stranger(address) as sock:
            assert sock.recv(4096)  # the host's greeting
            waited.append(sock.recv(4096))

    visitors.append(visit)
    with miniplug.launch(WORKSHOP) as plugin:
        assert plugin.ping() < 10
    assert waited == [b""]


def greeted(key, tell, address=None):
    """A door that lets in who holds the key."""
    def greet(channel, its_address):
        return miniplug._Hello(channel, address or its_address, key, "host").as_host([1], LIMIT)
    return miniplug._Door(greet, lambda channel, result: tell.append((channel, result)))


def test_a_proof_cannot_be_replayed():
    """Not even under the same key and at the same address: the host's nonce is another one."""
    key, met = os.urandom(32), []
    address = "/the/same/one"
    door = greeted(key, met, address)
    ours, theirs = channel_and_end()
    pump = Relay(theirs, stranger(door.listener.address))
    assert isinstance(shake(ours, address, key), miniplug._Terms)
    until(lambda: len(met) == 1)
    pump.join()
    door.close()
    met.pop()[0].close()

    door = greeted(key, met, address)
    with stranger(door.listener.address) as sock:
        sock.sendall(bytes(pump.said))  # all that the plugin has said
        with contextlib.suppress(OSError):
            while sock.recv(4096):
                pass
    until(lambda: not door.callers)
    door.close()
    assert not met


def test_a_handshake_cannot_be_relayed():
    """The plugin was lured to another address, from which all is passed on to the host as it is."""
    key, met = os.urandom(32), []
    door = greeted(key, met)
    ours, theirs = channel_and_end()
    pump = Relay(theirs, stranger(door.listener.address))
    assert isinstance(shake(ours, "/tmp/elsewhere/s", key), (OSError, EOFError))
    pump.join()
    until(lambda: not door.callers)
    door.close()
    assert not met


def test_a_proof_cannot_be_reflected():
    """Who holds no key sends back what the host has said."""
    key, met = os.urandom(32), []
    door = greeted(key, met)
    with stranger(door.listener.address) as sock, contextlib.suppress(OSError):
        while True:
            data = sock.recv(4096)
            if not data:
                break
            sock.sendall(data)
    until(lambda: not door.callers)
    door.close()
    assert not met


class Relay:
    """Passes on what comes, both ways. `said`: what came from the first side."""

    def __init__(self, one, other):
        self.said = bytearray()
        self._socks = one, other
        self._threads = [threading.Thread(target=self._pass, args=args, daemon=True)
                         for args in ((one, other, self.said), (other, one, bytearray()))]
        for thread in self._threads:
            thread.start()

    def _pass(self, source, sink, kept):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(4096)
                if not data:
                    break
                kept += data
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def join(self):
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for sock in self._socks:
            sock.close()


@pytest.mark.skipif(WINDOWS, reason="a named pipe is in no folder")
def test_the_doors_folder_is_private_and_goes_with_it():
    listener = miniplug._Listener()
    assert stat.S_IMODE(os.stat(listener.folder).st_mode) == 0o700
    assert os.path.dirname(listener.address) == listener.folder
    listener.close()
    assert not os.path.exists(listener.folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be", "utf-8-sig"])
def test_a_greeting_is_utf_8(encoding):
    """Before the proof nothing is tried out, and no decoder is imported."""
    code = """if True:
        import sys, by_hand, miniplug
        listener = miniplug._Listener()
        theirs = by_hand.connect(listener.address)
        ours = listener.accept()
        words = '{"miniplug":1,"role":"plugin","protocol_versions":[1],"max_message":4096}'
        said = words.encode(sys.argv[1])
        codecs = {"encodings." + name for name in ("utf_16", "utf_16_le", "utf_32", "utf_32_be", "utf_8_sig")}
        for name in codecs:
            sys.modules.pop(name, None)
        theirs.sendall(len(said).to_bytes(4, "big") + said)
        try:
            miniplug._Hello(ours, "/tmp/s", b"k" * 32, "host").hear_greeting()
        except miniplug.ProtocolError as error:
            print(error, sorted(codecs & sys.modules.keys()))
        ours.close()
        theirs.close()
        listener.close()
    """
    done = subprocess.run([sys.executable, "-c", code, encoding], env=by_hand_environment(), stdout=subprocess.PIPE,
                          check=True, timeout=60, text=True)
    assert done.stdout == "what came is no handshake []\n"


# -- a port is everybody's: where there is no folder, strangers may crowd before the door

tcp = pytest.mark.skipif(WINDOWS, reason="there is always a named pipe")


@tcp
def test_a_plugin_comes_in_through_a_flood(monkeypatch):
    """Strangers who connect as fast as they can, say nothing, and keep what they get."""
    flooder = """if True:
        import collections, socket, sys
        held = collections.deque()
        print(flush=True)
        while len(held) < 200_000:
            held.append(socket.socket())
            held[-1].setblocking(False)
            if held[-1].connect_ex(("127.0.0.1", int(sys.argv[1]))) == 111:
                break
            if len(held) > 500:
                held.popleft().close()
    """
    flooders = []

    class Door(miniplug._Door):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            port = self.listener.address.rpartition(":")[2]
            flooders.extend(subprocess.Popen([sys.executable, "-c", flooder, port], stdout=subprocess.PIPE) for _ in range(2))
            for each in flooders:
                each.stdout.readline()

        def close(self):
            for each in flooders:
                each.kill()
                each.communicate()
            super().close()

    monkeypatch.setattr(miniplug, "_Door", Door)
    monkeypatch.setattr(miniplug, "_temp_folders", list)
    with miniplug.launch(WORKSHOP, start_timeout=50) as plugin:
        assert plugin.dispense().greet("you") == "Hello, you!"


@tcp
def test_who_was_pushed_out_of_a_crowd_comes_again():
    key, left = bytes(32), []
    listener = miniplug._Listener("127.0.0.1:0")
    address = listener.address

    def doorkeeper():
        for say in (None, b"", b"\0\0"):  # he is pushed out at once, or in the midst of the host's first words
            channel = accepted(listener)
            if say is not None:
                channel.sock.sendall(say)
            left.append(channel.close())
        channel = accepted(listener)
        left.append(miniplug._Hello(channel, address, key, "host").as_host([1], LIMIT))
        channel.close()

    keeper = threading.Thread(target=doorkeeper)
    keeper.start()
    try:
        channel, terms = miniplug._come_in(
            address, lambda channel: miniplug._Hello(channel, address, key, "plugin").as_plugin([1], LIMIT, {"matches": True}))
        channel.close()
    finally:
        keeper.join(20)
        listener.close()
    assert terms.protocol_version == 1 and len(left) == 4


@tcp
@pytest.mark.parametrize("case", ["another key", "a socket in a folder", "nobody listens"])
def test_who_is_refused_does_not_come_again(case):
    listener = miniplug._Listener("" if case == "a socket in a folder" else "127.0.0.1:0")
    address, tries = listener.address, []

    def greet(channel):
        tries.append(channel)
        if case == "another key":
            raise miniplug.AuthenticationError("another key")
        raise EOFError

    if case == "nobody listens":
        listener.close()
    try:
        with pytest.raises((miniplug.AuthenticationError, EOFError, ConnectionRefusedError)):
            miniplug._come_in(address, greet)
    finally:
        listener.close()
    assert len(tries) == (case != "nobody listens")


def test_of_a_crowd_chance_picks_who_has_to_go(monkeypatch):
    """Not the one who has been there longest: who comes in a flood would never have the time to speak. Those who are over
    the number are sent away, and one who holds the key comes in."""
    monkeypatch.setattr(miniplug._Door, "_CROWD", 4)
    monkeypatch.setattr(miniplug.os, "urandom", lambda size, real=os.urandom: b"\x02" if size == 1 else real(size))
    key, met, inside = os.urandom(32), [], []

    def greet(channel, address):
        inside.append(channel)
        return miniplug._Hello(channel, address, key, "host").as_host([1], LIMIT)

    door = miniplug._Door(greet, lambda channel, result: met.append(channel))
    callers = []
    try:
        for count in range(1, 8):
            callers.append(stranger(door.listener.address))
            until(lambda: len(inside) == count)  # noqa: B023 -- waited for here
        first = inside[:2]
        assert all(any(each is one for each in door.callers) for one in first)
        assert len(door.callers) == 4
        end = stranger(door.listener.address)
        assert isinstance(shake(channel_of(end), door.listener.address, key), miniplug._Terms)
        end.close()
        until(lambda: len(met) == 1)
    finally:
        for sock in callers:
            sock.close()
        for channel in met:
            channel.close()
        door.close()


def test_the_key_is_fresh_for_every_launch(write):
    plugin = write("tells.py", """
        import os
        KEY, COOKIE = os.environ.get("MINIPLUG_AUTHKEY"), os.environ.get("MINIPLUG_COOKIE")

        class Tells:
            def environment(self):
                return [KEY, COOKIE, *(name for name in os.environ if name.startswith("MINIPLUG"))]
        """)
    with miniplug.launch(f"{plugin}:Tells") as one:  # it is taken out before the plugin's own code runs
        assert one.dispense().environment() == [None, None]
    keys = []
    for _ in range(2):
        key = write("key.py", "import os, sys; sys.exit(os.environ['MINIPLUG_AUTHKEY'])")
        with pytest.raises(miniplug.LaunchError) as caught:
            miniplug.launch([sys.executable, key])
        keys.append(caught.value.output[-1])
    assert [len(bytes.fromhex(key)) for key in keys] == [32, 32] and keys[0] != keys[1]


# -- a host without the key

PLUGIN = """
    import miniplug

    class Greeter:
        def __init__(self):
            print("made", flush=True)
        def greet(self, name):
            print("called", flush=True)

    miniplug.serve({"greeter": Greeter})
    print("returned", flush=True)
    """


@contextlib.contextmanager
def lured(write, key=None):
    """A real plugin that was started by somebody else: its process, its key and the connection."""
    listener = miniplug._Listener()
    key = os.urandom(32).hex() if key is None else key
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(HERE), MINIPLUG_ADDRESS=listener.address,
                       MINIPLUG_AUTHKEY=key, MINIPLUG_COOKIE=miniplug.Handshake().magic_cookie_value)
    process = subprocess.Popen([sys.executable, write("lured.py", PLUGIN)], stdin=subprocess.DEVNULL, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    channel = None
    try:
        channel = accepted(listener)
        yield process, key, channel, listener.address
    finally:
        process.kill()
        process.communicate()
        if channel is not None:
            channel.close()
        listener.close()


def check_refusal(process, words):
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out == ""
    assert err.count("\n") == 1 and words in err


def test_a_plugin_refuses_a_host_with_another_key(write):
    with lured(write) as (process, _, channel, address):
        hello = miniplug._Hello(channel, address, bytes(32), "host")
        hello.greet([1], LIMIT, codec="json")
        hello.hear_greeting()
        hello.hear()  # its proof, which this host cannot check
        hello.say(protocol_version=1, codec="json")
        hello.prove()
        with contextlib.suppress(OSError):  # it may be gone by then
            channel.write(channel.frame(miniplug._HEADER.pack(1, 1, 0, 0, 1, 0) + b'[0,"dispense",[null],{}]'))
        check_refusal(process, "does not hold the key")


def test_a_plugin_believes_no_refusal_without_a_proof(write):
    with lured(write) as (process, _, channel, address):
        hello = miniplug._Hello(channel, address, bytes(32), "host")
        hello.greet([1], LIMIT, codec="json")
        hello.hear_greeting()
        hello.hear()
        hello.say(refusal="give up")
        hello.prove()
        check_refusal(process, "does not hold the key")


NO_HOST = {
    "nothing": b"", "half a length": b"\0\0", "too long": struct.pack("!i", 4097), "negative": struct.pack("!i", -7),
    "no object": struct.pack("!i", 2) + b"[]", "deep": struct.pack("!i", 4096) + b"[" * 4096, "noise": b"\xff" * 100,
    "http": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("said", NO_HOST.values(), ids=NO_HOST)
def test_a_plugin_refuses_what_is_no_host(write, said):
    with lured(write) as (process, _, channel, _):
        if not WINDOWS:
            channel.sock.sendall(said)
        elif said:
            channel.write(channel.frame(said))
        channel.shutdown()
        check_refusal(process, "no host at")


def test_a_plugin_refuses_a_host_that_plays_its_own_part_back(write):
    with lured(write) as (process, _, channel, address):
        hello = miniplug._Hello(channel, address, bytes(32), "host")
        hello.greet([1], LIMIT, codec="json")
        hello.hear_greeting()
        proof = hello.hear()
        hello.say(protocol_version=1, codec="json")
        hello.say(**proof)
        check_refusal(process, "does not hold the key")


def test_a_plugin_that_was_given_no_key_says_so(write):
    with lured(write, key="xyz") as (process, *_):
        check_refusal(process, "no host at")


def test_a_plugin_waits_no_longer_for_a_host_than_it_says(monkeypatch):
    monkeypatch.setattr(miniplug, "_HELLO_SECONDS", 0.1)
    ours, theirs = channel_and_end()
    with theirs:
        assert isinstance(shake(ours, "/nowhere/s", bytes(32)), TimeoutError)
