"""A plugin that has no miniplug: the standard library and docs/protocol.md are enough."""

import hmac
import json
import os
import struct
import sys
from multiprocessing.connection import Client

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
         "max_message": 1 << 20, "features": [], "codecs": ["json"]})
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
    if (target, method) != (1, "greet"):
        state = {"name": method, "matches": []}
        return ERROR, 0, {"type": "MethodNotFound", "message": f"no method {method}", "own": True, "state": state}
    try:
        return RESULT, 0, greet(*args, **named)
    except Exception as error:
        name = type(error).__name__
        return ERROR, 0, {"type": name, "message": str(error), "kind": name, "args": list(error.args)}


def main():
    address, key = os.environ.pop("MINIPLUG_ADDRESS"), bytes.fromhex(os.environ.pop("MINIPLUG_AUTHKEY"))
    place, _, port = address.rpartition(":")
    pipe_or_socket = "/" in address or address.startswith("\\\\")
    with Client(address if pipe_or_socket else (place, int(port))) as connection:
        shake_hands(connection, address, key)
        while True:
            frame = connection.recv_bytes()
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
                return


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        pass  # the host is gone
