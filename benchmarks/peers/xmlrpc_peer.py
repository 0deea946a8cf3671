"""`xmlrpc` over a kept connection on the loopback interface, one for each thread."""

import sys
import xmlrpc.client

if __name__ != "__main__":
    from peers.common import ScriptPeer


    class Peer(ScriptPeer):
        def connect(self):
            self.proxy = xmlrpc.client.ServerProxy(self.address, allow_none=True, use_builtin_types=True)
            self.greet, self.record, self.echo, self.nap = self.proxy.greet, self.proxy.record, self.proxy.echo, self.proxy.nap

        def client(self):
            return xmlrpc.client.ServerProxy(self.address, allow_none=True, use_builtin_types=True)

        def disconnect(self):
            self.proxy("close")()


def main():
    from socketserver import ThreadingMixIn
    from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

    from common import serve_as_script
    from served import Served

    class Handler(SimpleXMLRPCRequestHandler):
        protocol_version = "HTTP/1.1"

    class Server(ThreadingMixIn, SimpleXMLRPCServer):
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler, logRequests=False, allow_none=True, use_builtin_types=True)
    server.register_instance(Served())
    serve_as_script(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
