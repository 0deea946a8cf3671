"""A plugin that holds the key and does not keep to the protocol. argv[1]: an expression that gives the bytes with which
it answers a call of `attack`. Afterwards it hears nothing more, and does not end by itself."""

import hmac
import json
import os
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import by_hand

CALL, NOTIFY, RESULT, ERROR, ITEM, END, CREDIT, CANCEL, RELEASE, PING, PONG, SHUTDOWN = range(1, 13)
HEADER = struct.Struct("!BBHIQQ")
TAGGED, IGNORABLE, STREAM = 1, 2, 4


def frame(data):
    return struct.pack("!i", len(data)) + data


def message(kind, number, body=b"", flags=0, buffers=(), count=None, version=1, parent=0):
    header = HEADER.pack(version, kind, flags, len(buffers) if count is None else count, number, parent)
    return b"".join(map(frame, (header + body, *buffers)))


class Host:
    """The connection to the host, with the handshake done."""

    def __init__(self, greeting=()):
        self.address, self.key = os.environ["MINIPLUG_ADDRESS"], bytes.fromhex(os.environ["MINIPLUG_AUTHKEY"])
        self.socket = by_hand.connect(self.address)
        self.said = [self.receive()]
        self.say({"miniplug": 1, "role": "plugin", "nonce": os.urandom(16).hex(), "protocol_versions": [1],
                  "max_message": 1 << 20, "features": [], "codecs": ["json"], **dict(greeting)})
        self.say({"proof": self.proof("plugin")})
        self.said.append(self.receive())
        if json.loads(self.receive())["proof"] != self.proof("host"):
            sys.exit("the host does not hold the key")

    def say(self, content):
        self.said.append(json.dumps(content).encode())
        self.socket.sendall(frame(self.said[-1]))

    def proof(self, role):
        parts = [role.encode(), os.fsencode(self.address), *self.said]
        data = b"".join(struct.pack("!I", len(part)) + part for part in parts)
        return hmac.new(self.key, data, "sha256").hexdigest()

    def read(self, size):
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                sys.exit()
            data += more
        return data

    def receive(self):
        (size,) = struct.unpack("!i", self.read(4))
        return self.read(size)


def main():
    host = Host()
    while True:
        data = host.receive()
        _, kind, _, _, number, _ = HEADER.unpack_from(data)
        if kind == SHUTDOWN:
            return
        if kind == CALL:
            _, method, args, _ = json.loads(data[HEADER.size :])
            if method == "dispense":
                host.socket.sendall(message(RESULT, number, b'{"$ref":[1,null,false]}', TAGGED))
            elif method == "echo":
                host.socket.sendall(message(RESULT, number, json.dumps(args[0]).encode()))
            elif method == "attack":
                attack = eval(sys.argv[1], dict(globals(), number=number, max_message=65536))
                host.socket.sendall(attack)
                if "--closing" in sys.argv:
                    host.socket.close()
                if "--going-on" not in sys.argv:
                    time.sleep(600)


if __name__ == "__main__":
    main()
