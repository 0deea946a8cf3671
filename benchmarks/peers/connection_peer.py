"""The bare standard library: a `multiprocessing.connection` that echoes bytes. No methods, no types, no errors, no guard."""

import json
import os
import subprocess
import sys
from multiprocessing.connection import Listener

from peers.common import Peer as Base
from peers.served import RECORD

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "connection_plugin.py")
RECORD_BYTES = json.dumps(RECORD).encode()


class Client:
    def __init__(self, connection):
        self.close = connection.close
        self.send = connection.send_bytes
        self.receive = connection.recv_bytes

    def greet(self, name):
        self.send(b"world")
        return self.receive()

    def nap(self):
        self.send(b"nap")
        self.receive()


class Peer(Base, Client):
    nap = Client.nap

    def start(self):
        with Listener() as listener:
            self.process = subprocess.Popen([sys.executable, PLUGIN, listener.address, self.work, str(self.connections)])
            self.clients = [Client(listener.accept()) for _ in range(self.connections)]
        vars(self).update(vars(self.clients[0]))
        self.free = list(self.clients)

    def client(self):
        return self.free.pop()

    def record(self, value):
        self.send(RECORD_BYTES)
        return self.receive()

    def echo(self, data):
        self.send(data)
        return self.receive()

    def submit(self, name):
        self.send(b"world")
        return self.receive

    def count(self, n):
        self.send(str(n).encode())
        for _ in range(n):
            yield self.receive()

    def stop(self):
        for client in self.clients:
            client.close()
        self.process.wait()
