"""Pyro5 over a UNIX socket, with its own serializer."""

import sys

import Pyro5.api
import serpent

if __name__ != "__main__":
    from peers.common import ScriptPeer


    class Peer(ScriptPeer):
        def connect(self):
            self.proxy = Pyro5.api.Proxy(self.address)
            self.proxies = [self.proxy]
            self.greet, self.record, self.nap, self.count = self.proxy.greet, self.proxy.record, self.proxy.nap, self.proxy.count

        def echo(self, data):
            return serpent.tobytes(self.proxy.echo(data))

        def client(self):
            self.proxies.append(Pyro5.api.Proxy(self.address))
            return self.proxies[-1]

        def disconnect(self):
            for proxy in self.proxies:
                proxy._pyroClaimOwnership()
                proxy._pyroRelease()


def main():
    from common import serve_as_script
    from served import Served

    daemon = Pyro5.api.Daemon(unixsocket=sys.argv[1])
    uri = daemon.register(Pyro5.api.expose(Served)(), "served")
    serve_as_script(uri)
    daemon.requestLoop()


if __name__ == "__main__":
    main()
