"""A plugin that speaks the wire of an older version, or of one to come: from a file of frozen bytes, without miniplug.

    python frozen_plugin.py WIRE.json PART HEARD.json

It answers what the file knows, and writes what it was told to HEARD.json: [head, the last 8 bytes of the header, body].
"""

import hmac
import json
import os
import struct
import sys
from multiprocessing.connection import Client


def proof(key, role, address, said):
    parts = [role.encode(), os.fsencode(address), *said]
    return hmac.new(key, b"".join(struct.pack("!I", len(part)) + part for part in parts), "sha256").hexdigest()


def message(head, number, body):
    return bytes.fromhex(head) + struct.pack("!QQ", number, 0) + body.encode()


def shake_hands(connection, address, key, greeting):
    said = [connection.recv_bytes(4096), greeting.encode()]
    connection.send_bytes(said[1])
    said.append(json.dumps({"proof": proof(key, "plugin", address, said)}).encode())
    connection.send_bytes(said[2])
    said.append(connection.recv_bytes(4096))
    if not hmac.compare_digest(json.loads(connection.recv_bytes(4096))["proof"], proof(key, "host", address, said)):
        sys.exit("the host does not hold the key")
    return [said[0].decode(), said[3].decode()]


def same(body, known):
    return body == known or (bool(body and known) and json.loads(body) == json.loads(known))


def serve(connection, frozen, heard):
    while True:
        try:
            frame = connection.recv_bytes()
        except EOFError:
            return
        head, (number, behalf), body = frame[:8].hex(), struct.unpack("!QQ", frame[8:24]), frame[24:].decode()
        for _ in range(int(head[8:], 16)):
            connection.recv_bytes()
        heard.append([head, behalf, body])
        known = next((each for each in frozen["answers"] if each["asked"][0] == head and same(body, each["asked"][1])), {})
        answers = [*known.get("before", []), *([known["answer"]] if "answer" in known else []), *known.get("then", [])]
        if not known and head.startswith("0101"):
            answers = [frozen["anything else"]]
        for answer_head, answer_body in answers:
            connection.send_bytes(message(answer_head, number, answer_body))
        if head.startswith("010c"):
            return


def main(wire, part, log):
    with open(wire, encoding="utf-8") as file:
        frozen = json.load(file)[part]
    address, key = os.environ["MINIPLUG_ADDRESS"], bytes.fromhex(os.environ["MINIPLUG_AUTHKEY"])
    place, _, port = address.rpartition(":")
    heard = []
    with Client(address if "/" in address or address.startswith("\\\\") else (place, int(port))) as connection:
        greeting = shake_hands(connection, address, key, frozen["greeting"])
        serve(connection, frozen, heard)
    with open(log, "w", encoding="utf-8") as file:
        json.dump([greeting, heard], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
