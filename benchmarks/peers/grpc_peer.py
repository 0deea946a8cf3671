"""gRPC for Python, over a UNIX socket."""

import os
import sys

import grpc

sys.path.append(os.path.join(sys.prefix, "generated"))
from greeter_pb2 import Data, Nothing, Number, Record, Text
from greeter_pb2_grpc import GreeterServicer, GreeterStub, add_GreeterServicer_to_server

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

if __name__ != "__main__":
    from peers.common import ScriptPeer


    class Peer(ScriptPeer):
        def connect(self):
            self.channel = grpc.insecure_channel(self.address, options=OPTIONS)
            self.stub = GreeterStub(self.channel)

        def greet(self, name):
            return self.stub.greet(Text(text=name)).text

        def record(self, value):
            return self.stub.record(Record(**value))

        def echo(self, data):
            return self.stub.echo(Data(data=data)).data

        def nap(self):
            self.stub.nap(Nothing())

        def count(self, n):
            for item in self.stub.count(Number(number=n)):
                yield item.number

        def submit(self, name):
            return self.stub.greet.future(Text(text=name)).result

        def disconnect(self):
            self.channel.close()


def main():
    from concurrent.futures import ThreadPoolExecutor

    from common import serve_as_script
    from served import Served

    served = Served()

    class Servicer(GreeterServicer):
        def greet(self, request, context):
            return Text(text=served.greet(request.text))

        def record(self, request, context):
            return request

        def echo(self, request, context):
            return Data(data=request.data)

        def nap(self, request, context):
            served.nap()
            return Nothing()

        def count(self, request, context):
            for item in served.count(request.number):
                yield Number(number=item)

    server = grpc.server(ThreadPoolExecutor(64), options=OPTIONS)
    add_GreeterServicer_to_server(Servicer(), server)
    address = "unix:" + sys.argv[1]
    server.add_insecure_port(address)
    server.start()
    serve_as_script(address)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
