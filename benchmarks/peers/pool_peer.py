"""A ProcessPoolExecutor of one process, started anew and not forked. It has one process, so it does one thing at a time."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from peers.common import Peer as Base
from peers.served import Served

served = Served()


class Peer(Base):
    def start(self):
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def greet(self, name):
        return self.pool.submit(served.greet, name).result()

    def record(self, value):
        return self.pool.submit(served.record, value).result()

    def echo(self, data):
        return self.pool.submit(served.echo, data).result()

    def nap(self):
        return self.pool.submit(served.nap).result()

    def submit(self, name):
        return self.pool.submit(served.greet, name).result

    def stop(self):
        self.pool.shutdown()
