"""What the fault tests share: a plugin to do harm to, and bounds."""

import contextlib
import os
import signal
import time

import pytest
from conftest import HERE

import miniplug

VICTIM = os.path.join(HERE, "faults", "victim.py") + ":Victim"
PROMPT = 3.0  # seconds; what is promised is one, but test machines are busy
SHORT = 0.2  # of which something may take so long that is meant to be cut off


class Scene:
    """A plugin that was not started yet, and the means to do harm to it."""

    def __init__(self, folder):
        self.folder = folder
        reading, self.trigger = os.pipe()
        self.stdin = os.fdopen(reading, "rb")
        self.proxy = None
        self.trouble = ""  # what the host is short of
        self.make()

    def make(self, **options):
        options = {"start_timeout": 20, **options}
        self.plugin = miniplug.Plugin(VICTIM, env={"VICTIM_FOLDER": str(self.folder)}, stdin=self.stdin, **options)

    def start(self, fault=None):
        self.strike_at_the_start(fault)
        self.plugin.start()
        self.proxy = self.plugin.dispense()

    def strike_at_the_start(self, fault):
        """The next process, that is; None: not any more."""
        at_start = self.folder / "at_start"
        if fault:
            at_start.write_text(fault)
        elif at_start.exists():
            at_start.unlink()

    def close(self):
        self.plugin.kill()
        self.stdin.close()
        os.close(self.trigger)
        strays = self.folder / "strays"
        for pid in strays.read_text().split() if strays.exists() else ():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(name="scene")
def make_scene(tmp_path):
    scene = Scene(tmp_path)
    yield scene
    scene.close()


@contextlib.contextmanager
def within(seconds):
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds
