"""RPyC, tuned: a UNIX socket, no compression, whole writes, method proxies fetched once, immutable arguments, which go by value."""

import sys
import time

import rpyc
from rpyc.core import SocketStream
from rpyc.core.channel import Channel

CONFIG = {"allow_public_attrs": True, "sync_request_timeout": None}
SocketStream.MAX_IO_CHUNK = 1 << 24
Channel.COMPRESSION_THRESHOLD = 1 << 40

if __name__ != "__main__":
    from peers.common import ScriptPeer


    class Client:
        def __init__(self, address):
            self.connection = self.connect(address)
            root = self.connection.root
            self.greet, self.nap, self.echo, self._record, self.count = root.greet, root.nap, root.echo, root.record, root.count
            self._submit = rpyc.async_(self.greet)

        def connect(self, address):
            while True:
                try:
                    return rpyc.utils.factory.unix_connect(address, config=CONFIG)
                except ConnectionRefusedError:  # it is bound, and listens in a moment
                    time.sleep(0.001)

        def record(self, value):
            return dict(self._record(tuple(value.items())))

        def submit(self, name):
            answer = self._submit(name)
            return lambda: answer.value


    class Peer(ScriptPeer):
        def connect(self):
            self.main = Client(self.address)
            self.clients = [self.main]
            self.greet, self.nap, self.echo, self.count = self.main.greet, self.main.nap, self.main.echo, self.main.count
            self.record, self.submit = self.main.record, self.main.submit

        def client(self):
            self.clients.append(Client(self.address))
            return self.clients[-1]

        def disconnect(self):
            for client in self.clients:
                client.connection.close()


def main():
    from common import serve_as_script
    from rpyc.utils.server import ThreadedServer
    from served import Served

    class Service(rpyc.Service, Served):
        pass

    path = sys.argv[1]
    server = ThreadedServer(Service(), socket_path=path, protocol_config=CONFIG)
    serve_as_script(path)
    server.start()


if __name__ == "__main__":
    main()
