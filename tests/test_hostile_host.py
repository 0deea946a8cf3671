"""A plugin that stays, and listens: whatever comes to its door, with the key or without, it is there for an honest host."""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import by_hand
import pytest
from conftest import WINDOWS, WINE, WORKSHOP, descriptors, leftover_threads, opened_since, stream, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import miniplug

PROMPT = 12.0 if WINE else 3.0  # seconds
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A plugin that was started by hand, and what another host needs to attach to it."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY.hex())
    command = [sys.executable, miniplug.__file__, "serve", WORKSHOP, "--persist", "--authkey-file", str(key)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    yield json.loads(process.stdout.readline())
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def nothing_left(plugin):
    """In place of the one for all tests, for which there would be a child too many: the plugin."""
    before, others = descriptors(), leftover_threads()
    yield
    until(lambda: set(leftover_threads()) <= set(others), 15)
    until(lambda: opened_since(before) == {}, 5)


@pytest.fixture(autouse=True)
def is_there(plugin):
    """After each test an honest host is served, promptly, and nobody is left in the handshake."""
    yield
    start = time.monotonic()
    with miniplug.attach(plugin) as host:
        assert host.dispense("workshop").greet("you") == "Hello, you!"
    assert time.monotonic() - start < PROMPT


def opened(plugin):
    folder = f"/proc/{plugin['pid']}/fd"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0


def threads(plugin):
    folder = f"/proc/{plugin['pid']}/task"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0


@contextlib.contextmanager
def caller(plugin):
    with by_hand.connect(plugin["address"]) as sock:
        sock.settimeout(10)
        yield sock


def ended(sock):
    """The plugin ends the connection."""
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


def frame(data):
    return struct.pack("!i", len(data)) + data


def greeting(**changes):
    fields = {"miniplug": 1, "role": "host", "nonce": "00" * 16, "protocol_versions": [1], "max_message": 1 << 20,
              "features": [], "codec": "json"}
    fields.update(changes)
    return json.dumps({key: value for key, value in fields.items() if value is not None}).encode()


GREETINGS = {
    "nothing": b"", "noise": b"\xff" * 100, "half a length": b"\0\0", "half a greeting": frame(greeting())[:-10],
    "too long": struct.pack("!i", 4097) + bytes(4097), "negative": struct.pack("!i", -7), "huge": struct.pack("!iQ", -1, 1 << 40),
    "no object": frame(b"[]"), "no JSON": frame(b"{"), "deep": frame(b'{"a":' + b"[" * 4000), "empty": frame(b""),
    "a plugin's": frame(greeting(role="plugin")), "another wire": frame(greeting(miniplug=2)),
    "no versions": frame(greeting(protocol_versions=None)),
    "versions that are none": frame(greeting(protocol_versions=["1", True])),
    "no limit": frame(greeting(max_message=1.5)), "UTF-16": frame(greeting().decode().encode("utf-16")),
    "UTF-32": frame(greeting().decode().encode("utf-32")), "a byte order mark": frame(b"\xef\xbb\xbf" + greeting()),
    "long numbers": frame(greeting(protocol_versions=[10**900] * 3)), "http": b"GET / HTTP/1.1\r\n\r\n",
    "a greeting and nothing": frame(greeting()),
    "a wrong proof": frame(greeting()) + frame(b'{"protocol_version":1,"codec":"json"}') + frame(b'{"proof":"' + b"0" * 64 + b'"}'),
    "a proof that is none": frame(greeting()) + frame(b'{"protocol_version":1,"codec":"json"}') + frame(b'{"proof":["\\ud800"]}'),
    "a refusal without a proof": frame(greeting()) + frame(b'{"refusal":"go"}') + frame(b'{"proof":""}'),
    "calls without a proof": frame(greeting()) + frame(miniplug._HEADER.pack(1, 1, 0, 0, 1, 0) + b'[0,"dispense",[null],{}]') * 3,
}


BELOW_FRAMES = ("half a length", "half a greeting", "negative", "huge", "noise", "http")


@pytest.mark.parametrize("name", [pytest.param(name, marks=stream) if name in BELOW_FRAMES else name for name in GREETINGS])
def test_who_does_not_greet_as_a_host_is_sent_away(plugin, name):
    with caller(plugin) as sock:
        sock.sendall(GREETINGS[name])
        if not WINDOWS:
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.shutdown(None)
        ended(sock)


def host_channel(plugin, key=KEY, address=None):
    """A host that holds the key, and means harm: its channel after the handshake."""
    channel = miniplug._connect(plugin["address"], 5.0)
    try:
        hello = miniplug._Hello(channel, address or plugin["address"], key, "host")
        hello.as_host([1], 1 << 20)
        return channel
    except BaseException:
        channel.close()
        raise


@pytest.mark.parametrize("change", [{"key": bytes(32)}, {"address": "/tmp/elsewhere/s"}])
def test_who_holds_another_key_or_was_lured_here_is_sent_away(plugin, change):
    with pytest.raises((miniplug.PluginError, OSError, EOFError)):
        host_channel(plugin, **change)


def message(kind, number=1, body=b"", flags=0, parent=0, version=1, buffers=0):
    return miniplug._HEADER.pack(version, kind, flags, buffers, number, parent) + body


BROKEN = {
    "short": [b"x"], "empty": [b""], "another version": [message(1, version=9, body=b"[0,'info',[],{}]")],
    "an unknown kind": [message(200)], "a call that is none": [message(1, body=b"{}")],
    "a call in half": [message(1, body=b'[0,"info"')], "UTF-16": [message(1, body='[0,"info",[],{}]'.encode("utf-16"))],
    "a buffer that does not come": [message(1, body=b'[0,"info",[],{}]', buffers=3)],
    "too many buffers": [message(1, body=b'[0,"info",[],{}]', buffers=1 << 20)],
    "deep": [message(1, body=b"[" * 100000)], "a bad tag": [message(1, body=b'[0,"info",[{"$set":[[]]}],{}]', flags=1)],
    "an answer to nothing": [message(3, number=7, body=b"1")] * 3, "an item of nothing": [message(5, number=7, body=b"[1]")],
    "too much credit": [message(7, body=b"99999")],
    "a pong of nothing": [message(11, number=5)], "a release of nothing": [message(9, number=99)],
}


def send(channel, frames):
    for frame in frames:
        channel.write(channel.frame(frame))


@pytest.mark.parametrize("name", BROKEN)
def test_a_host_with_the_key_that_breaks_the_protocol_costs_its_own_connection(plugin, name):
    channel = host_channel(plugin)
    try:
        with contextlib.suppress(OSError):
            send(channel, BROKEN[name])
    finally:
        channel.close()


@pytest.mark.parametrize("count", [100])
def test_a_host_that_calls_and_goes_leaves_nothing(plugin, count):
    """In the midst of calls, of a stream, and of a message; many times."""
    def visit():
        channel = host_channel(plugin)
        dispense = message(1, 1, b'[0,"dispense",["workshop"],{}]')
        send(channel, [dispense, message(1, 2, b'[1,"sleep",[0.01],{}]'), message(1, 3, b'[1,"echo",["x"],{}]')])
        channel.close()

    for _ in range(5):
        visit()
    until(lambda: threads(plugin) < 80)
    before = opened(plugin)
    for _ in range(count):
        visit()
    until(lambda: opened(plugin) <= before + 2)


def test_a_crowd_of_silent_callers_has_a_bound(plugin):
    """More than are greeted at once: each has a thread and a descriptor, and no more than so many have."""
    before, callers = (opened(plugin), threads(plugin)), []
    try:
        callers.extend(by_hand.connect(plugin["address"]) for _ in range(miniplug._Door._CROWD + 100 if not WINDOWS else 20))
        if not WINDOWS:  # where who is turned away is not to be seen from here
            until(lambda: len(select.select(callers, [], [], 0)[0]) >= 100)
        until(lambda: opened(plugin) <= before[0] + miniplug._Door._CROWD + 5)
        until(lambda: threads(plugin) <= before[1] + miniplug._Door._CROWD + 5)
        start = time.monotonic()
        with miniplug.attach(plugin) as host:
            assert host.ping() < 5
        assert time.monotonic() - start < PROMPT
    finally:
        for sock in callers:
            sock.close()
    until(lambda: opened(plugin) <= before[0] + 2)


def test_hosts_come_in_while_others_knock_without_end(plugin):
    stop = threading.Event()

    def knock():
        while not stop.is_set():
            with contextlib.suppress(OSError), by_hand.connect(plugin["address"]) as sock:
                sock.sendall(frame(greeting()) + b"\xff" * 10)

    knockers = [threading.Thread(target=knock) for _ in range(3)]
    for each in knockers:
        each.start()
    try:
        for _ in range(5):
            with miniplug.attach(plugin) as host:
                assert host.dispense("workshop").echo(1) == 1
    finally:
        stop.set()
        for each in knockers:
            each.join()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=60), st.dictionaries(
    st.sampled_from(["miniplug", "role", "nonce", "protocol_versions", "max_message", "codec", "features", "proof", "refusal"]),
    st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=3), st.just("host"), st.just(1))).map(
        lambda fields: json.dumps(fields).encode())), max_size=4))
def test_whatever_a_caller_says(plugin, frames):
    with caller(plugin) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(b"".join(map(frame, frames)))
            sock.shutdown(socket.SHUT_WR if not WINDOWS else None)
        ended(sock)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(
    message, st.integers(0, 14), st.integers(0, 3), flags=st.integers(0, 7), parent=st.integers(0, 2),
    buffers=st.integers(0, 1),
    body=st.one_of(st.binary(max_size=20), st.sampled_from([
        b'[0,"dispense",["workshop"],{}]', b'[1,"echo",[1],{}]', b'[0,"info",[],{}]', b"1", b"[1]", b'[0,"describe",[],{}]',
        b'{"$ref":[1,null,false]}', b"[" * 50])))
    .filter(lambda data: data[1] != miniplug._SHUTDOWN), max_size=6))  # which is an honest host's right
def test_whatever_a_host_with_the_key_says(plugin, frames):
    channel = host_channel(plugin)
    try:
        with contextlib.suppress(OSError):
            send(channel, frames)
    finally:
        channel.close()
