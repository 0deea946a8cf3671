"""A proxy of `multiprocessing.managers.BaseManager`. It gives each thread a connection of its own by itself."""

import multiprocessing
from multiprocessing.managers import BaseManager, IteratorProxy

from peers.common import Peer as Base
from peers.served import Served


class Manager(BaseManager):
    pass


Manager.register("Iterator", proxytype=IteratorProxy, create_method=False)
Manager.register("Served", Served, exposed=("greet", "record", "echo", "nap", "count"), method_to_typeid={"count": "Iterator"})


class Peer(Base):
    def start(self):
        self.manager = Manager(ctx=multiprocessing.get_context("spawn"))
        self.manager.start()
        self.served = served = self.manager.Served()
        self.greet, self.record, self.echo, self.nap, self.count = (
            served.greet, served.record, served.echo, served.nap, served.count)

    def stop(self):
        self.manager.shutdown()
