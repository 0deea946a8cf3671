"""miniplug itself."""

import os
import sys

from peers.common import Peer as Base

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(os.path.dirname(HERE)))

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
