"""Plugins that know the library from docs/protocol.md alone: the examples in Node.js and in Go, and one in Python by hand.

The example in Python, which the library serves, goes through the same checks as the two.
"""

import contextlib
import datetime
import gc
import hmac
import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref

import pytest
from conftest import WINDOWS, alive, until

import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.join(os.path.dirname(HERE), "examples")
RAW = os.path.join(HERE, "plugins", "raw_plugin.py")


def node_plugin(folder):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    version = subprocess.check_output([node, "--version"], universal_newlines=True)
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"node {version.strip()} is too old for this plugin")
    return [node, os.path.join(EXAMPLES, "node", "plugin.mjs")]


def go_plugin(folder):
    go = shutil.which("go")
    if go is None or WINDOWS:
        pytest.skip("there is no go" if go is None else "the example in Go is for POSIX")
    program = str(folder / "plugin")
    subprocess.run([go, "build", "-o", program, "."], cwd=os.path.join(EXAMPLES, "go"), check=True, timeout=300)
    return [program]


def python_plugin(folder):
    return os.path.join(EXAMPLES, "python", "plugin.py")


@pytest.fixture(scope="module", params=[python_plugin, node_plugin, go_plugin], ids=["python", "node", "go"])
def command(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def plugin(command):
    with miniplug.launch(command, name="numbers") as plugin:
        yield plugin


@pytest.fixture
def numbers(plugin):
    return plugin.dispense()


# -- one set of checks for the plugin in every language

PLAIN = [None, True, 0, -1.5, 2**53 - 1, "", "caf\u00e9 \U0001f600", [], [1, [2, {}]], {"a": {"b": [None]}},
         "x" * 300_000]
OTHER = [(1, 2), {1: 2}, {"$a": 1}, {"$dict": []}, {"$a": 1, "b": 2}, {1, 2}, b"abc", float("inf"), 2**53,
         datetime.date(2026, 1, 31)]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: ascii(value)[:20])
def test_plain_data_goes_through_it_unchanged(numbers, value):
    seen = []
    arrived = numbers.find([value, 1], lambda item: seen.append(item) or True)
    assert seen == [value] and arrived == value and type(arrived) is type(value)


@pytest.mark.parametrize("value", OTHER, ids=lambda value: ascii(value)[:20])
def test_what_is_not_plain_data_goes_through_it_unchanged_or_not_at_all(plugin, numbers, value):
    """The Python one takes all of it. What a plugin does not know, it refuses: nothing is altered without a word."""
    seen = []
    try:
        arrived = numbers.find([value], lambda item: seen.append(item) or True)
    except miniplug.NotSerializable as error:
        assert plugin.info["language"] != "Python" and "plain data" in str(error) and not seen
    else:
        assert seen == [value] and arrived == value and type(arrived) is type(value)
    assert numbers.divide(1, 1) == 1


def test_bytes_beside_a_message_are_refused_by_a_plugin_in_another_language(plugin, numbers):
    data = b"a" * 5000
    if plugin.info["language"] == "Python":
        assert numbers.find([data], lambda item: item == data) == data
    elif WINDOWS and plugin.info["language"] == "JavaScript":  # it does not see where they end
        with pytest.raises(miniplug.PluginCrashed, match="cannot take bytes beside a message"):
            numbers.find([data], print)
    else:
        with pytest.raises(miniplug.NotSerializable, match="bytes"):
            numbers.find([data], print)
        assert numbers.divide(1, 1) == 1


def test_it_is_called_like_any_plugin(plugin, numbers):
    assert numbers.divide(2, 3) == numbers.divide(2, other=3) == numbers.divide(other=3, one=2) == 0.67
    assert numbers.divide(2, 3, 4) == numbers.divide(2, 3, digits=4) == 0.6667
    assert {"divide", "primes", "find"} <= set(dir(numbers))
    assert not hasattr(numbers, "subtract")
    assert plugin.info["language"] in ("Python", "JavaScript", "Go")
    assert plugin.ping() < 5


def test_its_errors_are_builtin_and_remote(plugin, numbers):
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        numbers.divide(1, 0)
    assert isinstance(caught.value, miniplug.RemoteError) and caught.value.args == ("division by zero",)
    assert plugin.info["language"] == "Go" or "plugin." in caught.value.remote_traceback  # an error in Go has no trace
    with pytest.raises(LookupError, match="none of 2 passes"):
        numbers.find([1, 2], lambda item: False)
    for arguments, named in [((), {}), ((1,), {}), ((1, 2, 3, 4), {}), ((1, 2), {"one": 1}), ((1, 2), {"three": 3})]:
        with pytest.raises(TypeError):
            numbers.divide(*arguments, **named)
    assert numbers.divide(1, 1) == 1


def test_what_it_does_not_have(plugin):
    assert plugin.dispense("numbers").divide(1, 1) == 1
    with pytest.raises(miniplug.PluginNotFound) as unknown:
        plugin.dispense("letters")
    assert unknown.value.names == ["numbers"]
    assert plugin.dispense("system").info() == plugin.info


def test_it_answers_while_another_call_waits(numbers):
    entered, go_on = threading.Event(), threading.Event()
    call = numbers.find.submit([7], lambda item: entered.set() or go_on.wait(30))
    assert entered.wait(30)
    assert numbers.divide(1, 2) == 0.5 and not call.done()
    go_on.set()
    assert call.result(30) == 7


def test_its_stream(plugin, numbers):
    assert list(numbers.primes(30)) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert list(numbers.primes(below=2)) == []
    assert sum(1 for _ in numbers.primes(10_000)) == 1229
    with numbers.primes() as one, numbers.primes() as other:
        assert [next(one), next(other), next(one)] == [2, 2, 3]
        assert numbers.divide(1, 1) == 1


def logged(caplog, message):
    return [record for record in caplog.records if record.getMessage() == message]


def test_its_stream_waits_for_its_reader_and_ends_when_closed(command, caplog):
    with caplog.at_level(logging.INFO), miniplug.launch(command, name="numbers") as plugin:
        numbers = plugin.dispense()
        with numbers.primes() as stream:
            for _ in range(200):
                last = next(stream)
            assert last == 1223
            assert plugin.ping() < 30 and logged(caplog, "no more primes") == []
        until(lambda: logged(caplog, "no more primes"))
    (record,) = logged(caplog, "no more primes")
    assert 200 <= record.given <= 200 + 64 + 1


def test_it_passes_an_exception_of_the_hosts_on(numbers):
    error = KeyError("seven")

    def refuse(item):
        raise error

    with pytest.raises(KeyError, match="seven") as caught:
        numbers.find(["seven"], refuse)
    assert caught.value is error


def test_it_calls_back_on_behalf_of_the_call(numbers):
    threads = []
    assert numbers.find([7], lambda item: threads.append(threading.get_ident()) or True) == 7
    assert threads[0] == threading.get_ident()  # the thread that waits for the call runs what is asked for it


def test_it_calls_the_plugin_through_the_host(numbers):
    assert numbers.find([1, 2], lambda item: numbers.divide(item, 2) == 1) == 2
    assert numbers.find([1, 2], lambda item: numbers.find([item], lambda inner: inner == item) == 1) == 1
    assert numbers.find([1, 4], lambda item: list(numbers.primes(item)) == [2, 3]) == 4


def test_it_gives_back_what_it_was_lent(numbers):
    def lend(passes):
        def function(item):
            return passes

        with contextlib.suppress(LookupError):
            numbers.find([1], function)
        return weakref.ref(function)

    for passes in (True, False):
        function = lend(passes)
        until(lambda function=function: gc.collect() is not None and function() is None)


def test_a_call_that_is_given_up(command, caplog):
    entered, go_on, seen = threading.Event(), threading.Event(), []

    def test(item):
        seen.append(item)
        entered.set()
        go_on.wait(30)

    with caplog.at_level(logging.INFO), miniplug.launch(command, name="numbers") as plugin:
        numbers = plugin.dispense()
        call = numbers.find.submit([1, 2, 3], test)
        assert entered.wait(30) and call.cancel()
        go_on.set()
        until(lambda: logged(caplog, "given up"))
        assert numbers.divide(1, 1) == 1
    (record,) = logged(caplog, "given up")
    assert record.asked == 1 and seen == [1]


def test_a_log_record_of_its(command, caplog):
    with caplog.at_level(logging.DEBUG), miniplug.launch(command, name="numbers") as plugin:
        plugin.dispense().divide(1, 4)
    (record,) = logged(caplog, "dividing")
    assert (record.name, record.levelname, record.one, record.other) == ("miniplug.numbers.numbers", "DEBUG", 1, 4)


def test_notifying_it(command):
    lines = []
    with miniplug.launch(command, stderr=lines.append) as plugin:
        numbers = plugin.dispense()
        numbers.divide.notify(1, 0)
        numbers.primes.notify()
        assert numbers.divide(1, 1) == 1
    assert any("division by zero" in line for line in lines)


def test_it_ends_when_told(command):
    plugin = miniplug.launch(command)
    numbers, seen = plugin.dispense(), threading.Event()
    call = numbers.find.submit([1, 2], lambda item: seen.set())
    stream = numbers.primes()
    assert seen.wait(30) and next(stream) == 2
    plugin.close(grace=20)
    assert plugin.exit_code == 0 and not plugin.running
    with pytest.raises((miniplug.PluginClosed, miniplug.RemoteError)):
        call.result(30)
    plugin.start()
    assert numbers.divide(1, 1) == 1
    plugin.close(grace=20)


def test_its_crash(plugin, numbers):
    entered, go_on = threading.Event(), threading.Event()
    call = numbers.find.submit([1], lambda item: entered.set() or go_on.wait(30))
    assert entered.wait(30)
    os.kill(plugin.pid, signal.SIGTERM if WINDOWS else signal.SIGKILL)  # which on Windows is not to be caught either
    with pytest.raises(miniplug.PluginCrashed):
        call.result(30)
    go_on.set()


def test_started_by_hand_it_says_that_it_is_a_plugin(command):
    command = [sys.executable, command] if isinstance(command, str) else command
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(HERE))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,  # noqa: UP022
                          check=False, timeout=30, env=environment)
    assert done.returncode == 1 and b"is a plugin" in done.stderr


def check_ends_with_host(write, command):
    host = write("host.py", f"""
        import sys, miniplug
        plugin = miniplug.launch({command!r})
        print(plugin.pid, flush=True)
        sys.stdin.read()
        """)
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(HERE))
    process = subprocess.Popen([sys.executable, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with process:
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
    until(lambda: not alive(pid), 5)


def test_it_ends_with_its_host(command, write):
    check_ends_with_host(write, command)


@pytest.mark.skipif(WINDOWS, reason="there it has a real pipe")
def test_node_finds_the_frames_on_a_pipe_however_they_come(tmp_path):
    """A host that writes as to a pipe of Windows, without lengths: Node.js reads that as bytes, many frames at once or a part
    of one. Its address is here the path of a socket, as the plugin looks only how it begins."""
    address, key = r"\\.\pipe\numbers", "ab" * 32
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(str(tmp_path), address))
    listener.listen()
    environment = dict(os.environ, MINIPLUG_ADDRESS=address, MINIPLUG_AUTHKEY=key)
    with listener, subprocess.Popen(node_plugin(tmp_path), cwd=str(tmp_path), env=environment, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL) as process:
        host = listener.accept()[0]
        with host, host.makefile("rb") as replies:
            greeting = b'{"miniplug":1,"role":"host","nonce":"00","max_message":1000}'
            host.sendall(greeting)
            said = [b"host", address.encode(), greeting]
            said += [read_json(replies), read_json(replies), b'{"protocol_version":1,"codec":"json"}']
            mac = hmac.new(bytes.fromhex(key), digestmod="sha256")
            for part in said:
                mac.update(struct.pack("!I", len(part)) + part)
            proof = b'{"proof":"%s"}' % mac.hexdigest().encode()
            host.sendall(said[-1] + proof + frame(CALL, 1, b'[0,"info",[],{}]') + frame(CALL, 2, b'[0,"dispense",[nu'))
            assert read_reply(replies) == (RESULT, 1)
            host.sendall(b'll],{}]' + frame(PING, 3) + frame(PING, 4) + frame(CALL, 5, b'[0,"info",[],{}]'))
            assert {read_reply(replies) for _ in range(4)} == {(RESULT, 2), (PONG, 3), (PONG, 4), (RESULT, 5)}
            host.sendall(frame(PING, 6) + frame(SHUTDOWN, 0, b"2.0"))
    assert process.returncode == 0


CALL, RESULT, PING, PONG, SHUTDOWN = 1, 3, 10, 11, 12


def frame(kind, number, body=b""):
    return struct.pack("!BBHIQQ", 1, kind, 0, 0, number, 0) + body


def read_json(stream):
    """The bytes of the next JSON value, which is no number."""
    text = stream.read(1)
    while True:
        try:
            json.loads(text.decode())
            return text
        except ValueError:
            text += stream.read(1)


def read_reply(stream):
    _, kind, _, _, number, _ = struct.unpack("!BBHIQQ", stream.read(24))
    read_json(stream)
    return kind, number


# -- Python without miniplug

@pytest.fixture
def raw():
    with miniplug.launch([sys.executable, RAW], env={"PYTHONPATH": ""}) as plugin:
        yield plugin


def test_a_raw_plugin_is_called_like_any(raw):
    greeter = raw.dispense("greeter")
    assert greeter.greet("world") == greeter.greet(name="world") == "Hello, world!"
    assert raw.info == {"raw": True} and raw.ping() < 5


def test_a_raw_plugin_that_does_not_say_what_it_can_do(raw):
    with pytest.raises(miniplug.MethodNotFound, match="describe"):
        raw.describe()
    assert raw.running


def test_a_raw_plugins_exception_is_builtin_and_remote(raw):
    with pytest.raises(ValueError, match="no name") as caught:
        raw.dispense().greet("")
    assert isinstance(caught.value, miniplug.RemoteError)
    with pytest.raises(TypeError):
        raw.dispense().greet()


def test_a_raw_plugin_closes_gracefully():
    plugin = miniplug.launch([sys.executable, RAW])
    plugin.dispense()
    plugin.close(grace=20)
    assert plugin.exit_code == 0


def test_a_raw_plugin_is_told_why_it_is_refused():
    with pytest.raises(miniplug.HandshakeError, match="no common protocol version") as caught:
        miniplug.launch([sys.executable, RAW], protocol_versions=[7], stderr="discard")
    assert caught.value.plugin["protocol_versions"] == [1]


def test_a_raw_plugin_ends_with_its_host(write):
    check_ends_with_host(write, [sys.executable, RAW])


def test_a_raw_plugin_can_persist():
    owner = miniplug.launch([sys.executable, RAW], persist=True)
    config = owner.reattach_config()
    owner.detach()
    with miniplug.attach(config) as plugin, miniplug.attach(config) as other:
        assert plugin.dispense().greet("one") == "Hello, one!" and other.dispense().greet("two") == "Hello, two!"
    with miniplug.attach(config) as plugin:
        plugin.kill()
    until(lambda: not (alive(config["pid"]) or os.path.isdir(os.path.dirname(config["address"]))))
