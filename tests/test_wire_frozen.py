"""Hosts and plugins of different versions: this one against the frozen bytes of an older one, and of one to come.

``tests/wire-0.1.json`` is what a peer of 0.1 says and expects, without any optional feature. It is never changed after a
release. Neither side of that peer is made of this version's code.
"""

import datetime
import decimal
import json
import os
import struct
import subprocess
import sys
import uuid
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
from plugins.frozen_plugin import message, proof, same

import miniplug

HERE = Path(__file__).resolve().parent
WIRES = sorted(HERE.glob("wire-*.json"))
KEY = bytes(range(32))


@pytest.fixture(params=WIRES, ids=lambda path: path.stem)
def wire(request):
    return request.param


def launched(wire, part, tmp_path, **options):
    log = tmp_path / "heard.json"
    command = [sys.executable, str(HERE / "plugins" / "frozen_plugin.py"), str(wire), part, str(log)]
    return miniplug.launch(command, name="frozen", call_timeout=30.0, **options), log


def test_this_host_and_a_plugin_of_then(wire, tmp_path):
    plugin, log = launched(wire, "plugin", tmp_path)
    with plugin:
        assert plugin.protocol_version == 1 and plugin.info == {"version": "0.1"}
        greeter = plugin.dispense("greeter")
        assert greeter.greet("world") == "Hello, world!"
        with pytest.raises(ValueError, match="no name") as caught:
            greeter.greet(name="")
        assert isinstance(caught.value, miniplug.RemoteError) and "greet" in caught.value.remote_traceback
        with pytest.raises(miniplug.RemoteError) as caught:
            greeter.broken()
        assert (caught.value.type_name, caught.value.message) == ("DiskFull", "no room")
        with pytest.raises(miniplug.MethodNotFound):
            greeter.greet("somebody else")
        plain = [None, True, 7, 1.5, "café", [1], {"a": {}}]
        assert greeter.echo(*plain) == plain
        assert greeter.echo((1, {2: "b"})) == (1, {2: "b"})
        assert greeter.echo(list(range(40))) == list(range(40))
        assert greeter.things() == [
            {1}, 2**53, float("inf"), b"\x00\xff", datetime.date(2026, 1, 31), datetime.timedelta(1, 2, 3), decimal.Decimal("1.10"),
            uuid.UUID(int=1), datetime.datetime(2026, 1, 31, 12, 5)]
        assert list(greeter.count(3)) == [0, 1, 2]
        greeter.greet.notify("nobody")
        assert plugin.ping() >= 0
    assert plugin.exit_code == 0
    (greeting, choice), heard = json.loads(log.read_text(encoding="utf-8"))
    check_greeting(greeting, "host")
    assert json.loads(choice)["protocol_version"] == 1 and json.loads(choice)["codec"] == "json"
    for each in json.loads(wire.read_text(encoding="utf-8"))["plugin"]["answers"]:
        head, body = each["asked"]
        said = [line for line in heard if line[0] == head and same(line[2], body)]
        assert said, f"the host no longer says {head} {body}"
        assert {behalf for _, behalf, _ in said} == {0}


def check_greeting(text, role):
    """What a peer of 0.1 looks at in a greeting."""
    greeting = json.loads(text)
    assert len(text) <= 4096 and greeting["miniplug"] == 1 and greeting["role"] == role
    assert len(bytes.fromhex(greeting["nonce"])) == 16
    assert 1 in greeting["protocol_versions"] and set(map(type, greeting["protocol_versions"])) == {int}
    assert greeting["max_message"] >= 4096 and isinstance(greeting["features"], list)
    assert greeting["codec"] == "json" if role == "host" else "json" in greeting["codecs"]


def test_this_host_and_a_plugin_to_come(wire, tmp_path):
    plugin, _ = launched(wire, "later plugin", tmp_path)
    with plugin:
        greeter = plugin.dispense("greeter")
        assert greeter.greet("world") == "Hello, world!"
        with pytest.raises(miniplug.RemoteError, match="no room"):
            greeter.broken()


def test_a_plugin_of_another_version_of_the_interface_is_refused_by_name(wire, tmp_path):
    with pytest.raises(miniplug.HandshakeError) as caught:
        launched(wire, "plugin", tmp_path, protocol_versions=[2, 3])
    assert "1" in str(caught.value) and "2" in str(caught.value) and "3" in str(caught.value)


PLUGIN = """\
import miniplug

class Greeter:
    def greet(self, name):
        if not name:
            raise ValueError("no name")
        return f"Hello, {name}!"

    def echo(self, value):
        return value

    def kinds(self, values):
        return repr(values)

    def count(self, end):
        yield from range(end)

miniplug.serve({"greeter": Greeter}, info={"version": "1"})
"""


class OldHost:
    """A host of then, connected with a plugin of this version."""

    def __init__(self, frozen, command, folder):
        self.number = 0
        address = rf"\\.\pipe\miniplug-{os.urandom(16).hex()}" if os.name == "nt" else str(folder / "s")
        with Listener(address) as listener:
            environment = {**os.environ, "MINIPLUG_ADDRESS": address, "MINIPLUG_AUTHKEY": KEY.hex(), "MINIPLUG_LOG_LEVEL": "30",
                           "MINIPLUG_COOKIE": miniplug.Handshake().magic_cookie_value, "MINIPLUG_PIPES": "",
                           "PYTHONPATH": str(HERE.parent)}
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            self.connection = listener.accept()
        said = [frozen["greeting"].encode()]
        self.connection.send_bytes(said[0])
        said += [self.connection.recv_bytes(4096), self.connection.recv_bytes(4096)]
        check_greeting(said[1].decode(), "plugin")
        assert json.loads(said[2])["proof"] == proof(KEY, "plugin", address, said[:2])
        said.append(frozen["choice"].encode())
        self.connection.send_bytes(said[3])
        self.connection.send_bytes(json.dumps({"proof": proof(KEY, "host", address, said)}).encode())

    def say(self, head, body):
        self.number += 0 if head.startswith("010c") else 1
        number = {"010c": 0, "0109": 4711}.get(head[:4], self.number)  # of a shutdown; of a reference that is not there
        self.connection.send_bytes(message(head, number, body))

    def hear(self):
        """The next message about the last call: its head, and its body or None."""
        frame = self.connection.recv_bytes()
        assert struct.unpack("!QQ", frame[8:24]) == (self.number, 0)
        return frame[:8].hex(), json.loads(frame[24:]) if frame[24:] else None


def part_of(answer, known):
    """Of an object as much as the old peer looks at."""
    return {key: answer.get(key) for key in known} if isinstance(known, dict) and isinstance(answer, dict) else answer


def test_this_plugin_and_a_host_of_then(wire, tmp_path):
    frozen = json.loads(wire.read_text(encoding="utf-8"))["host"]
    script = tmp_path / "greeter.py"
    script.write_text(PLUGIN)
    host = OldHost(frozen, [sys.executable, str(script)], tmp_path)
    with host.process, host.connection:
        try:
            host.say("0101000000000000", '[0,"dispense",["greeter"],{}]')
            head, body = host.hear()
            target, methods, callable_ = body["$ref"][:3]
            assert (head, sorted(methods), callable_) == ("0103000100000000", ["count", "echo", "greet", "kinds"], False)
            for each in frozen["calls"]:
                head, body = each["ask"]
                host.say(head, body.replace("TARGET", str(target)))
                if "answered" in each:
                    head, body = host.hear()
                    assert [head, part_of(body, each["answered"][1])] == each["answered"]
                items = []
                while "items" in each:
                    head, body = host.hear()
                    if head == "0106000000000000":
                        break
                    assert head == "0105000000000000"
                    items += body
                assert items == each.get("items", [])
            assert host.process.wait(20) == 0
        finally:
            host.process.kill()
