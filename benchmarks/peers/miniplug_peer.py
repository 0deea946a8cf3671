"""miniplug itself."""

import os

from peers.common import Peer as Base
from peers.common import use_library

HERE = os.path.dirname(os.path.abspath(__file__))
use_library()

import miniplug


class Peer(Base):
    def start(self):
        self.plugin = miniplug.launch(os.path.join(HERE, "served.py") + ":Served")
        served = self.plugin.dispense()
        self.greet, self.record, self.echo, self.nap, self.count = (
            served.greet, served.record, served.echo, served.nap, served.count)

    def submit(self, name):
        return self.greet.submit(name).result

    def stop(self):
        self.plugin.close()
