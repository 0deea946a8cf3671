"""A plugin that has no miniplug: the standard library and docs/protocol.md are enough."""

import hmac
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
from multiprocessing.connection import Client, Listener

config = {}  # what another host needs to attach, if this plugin persists
HEADER = struct.Struct("!BBHIQQ")
CALL, NOTIFY, RESULT, ERROR, RELEASE, PING, PONG, SHUTDOWN = 1, 2, 3, 4, 9, 10, 11, 12


def shake_hands(connection, address, key):
    """The handshake. Exits if the host does not hold the key, or refuses."""
    said = [connection.recv_bytes(4096)]

    def say(message):
        said.append(json.dumps(message).encode())
        connection.send_bytes(said[-1])

    def proof(role):
        parts = [role.encode(), os.fsencode(address), *said]
        data = b"".join(struct.pack("!I", len(part)) + part for part in parts)
        return hmac.new(key, data, "sha256").hexdigest()

    say({"miniplug": 1, "role": "plugin", "nonce": os.urandom(16).hex(), "protocol_versions": [1],
         "max_message": 1 << 20, "features": ["persist"] if config else [], "codecs": ["json"]})
    say({"proof": proof("plugin")})
    said.append(connection.recv_bytes(4096))
    theirs = json.loads(connection.recv_bytes(4096))
    if not hmac.compare_digest(str(theirs.get("proof")), proof("host")):
        sys.exit("the host does not hold the key")
    if "refusal" in json.loads(said[-1]):
        sys.exit(json.loads(said[-1])["refusal"])


def greet(name):
    if not name:
        raise ValueError("no name")
    return f"Hello, {name}!"


def run(target, method, args, named):
    """What a call gives: kind, flags and body of the answer."""
    if (target, method) == (0, "dispense"):
        return RESULT, 1, {"$ref": [1, ["greet"], False]}
    if (target, method) == (0, "info"):
        return RESULT, 0, {"raw": True}
    if (target, method) == (0, "reattachConfig") and config:
        return RESULT, 0, config
    if (target, method) != (1, "greet"):
        state = {"name": method, "matches": []}
        return ERROR, 0, {"type": "MethodNotFound", "message": f"no method {method}", "own": True, "state": state}
    try:
        return RESULT, 0, greet(*args, **named)
    except Exception as error:
        name = type(error).__name__
        return ERROR, 0, {"type": name, "message": str(error), "kind": name, "args": list(error.args)}


def serve(connection, address, key):
    """Serve one host. Returns whether it has said stop, and not just gone."""
    with connection:
        shake_hands(connection, address, key)
        while True:
            try:
                frame = connection.recv_bytes()
            except EOFError:
                return False
            _, kind, _, count, number, _ = HEADER.unpack_from(frame)
            for _ in range(count):
                connection.recv_bytes()
            if kind in (CALL, NOTIFY):
                answer, flags, body = run(*json.loads(frame[HEADER.size :])[:4])
                if kind == CALL:
                    connection.send_bytes(HEADER.pack(1, answer, flags, 0, number, 0) + json.dumps(body).encode())
            elif kind == PING:
                connection.send_bytes(HEADER.pack(1, PONG, 0, 0, number, 0))
            elif kind == SHUTDOWN:
                return True


def listen(stop):
    """Let hosts attach: persist. (Strangers would have to be met with a deadline; this is for tests.)"""
    windows = os.name == "nt"
    folder = tempfile.mkdtemp(prefix="miniplug-")
    address = rf"\\.\pipe\miniplug-{os.urandom(16).hex()}" if windows else os.path.join(folder, "s")
    listener, key = Listener(address), os.urandom(16)
    config.update(network="pipe" if windows else "unix", address=address, authkey=key.hex(), pid=os.getpid(), protocol_version=1)

    def attend(connection):
        if serve(connection, address, key):
            stop.set()

    def accept():
        while True:
            threading.Thread(target=attend, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return folder


def main():
    address, key = os.environ.pop("MINIPLUG_ADDRESS"), bytes.fromhex(os.environ.pop("MINIPLUG_AUTHKEY"))
    stop = threading.Event()
    folder = listen(stop) if os.environ.pop("MINIPLUG_PERSIST", None) else None
    place, _, port = address.rpartition(":")
    pipe_or_socket = "/" in address or address.startswith("\\\\")
    stopped = serve(Client(address if pipe_or_socket else (place, int(port))), address, key)
    if folder and not stopped:
        stop.wait()
    if folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
