"""What the peers share."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def library():
    """The folder of the miniplug.py that is measured."""
    return os.environ.get("BENCHMARK_LIBRARY", ROOT)


def use_library(arguments=()):
    """Have `import miniplug` find it: the one that these arguments give with --library, or that of an earlier process, or ours."""
    if "--library" in arguments:
        given = os.path.abspath(arguments[arguments.index("--library") + 1])
        if os.path.isfile(given) and os.path.basename(given) != "miniplug.py":
            folder = tempfile.mkdtemp(prefix="bench-")
            atexit.register(shutil.rmtree, folder, True)
            given = shutil.copy(given, os.path.join(folder, "miniplug.py"))
        os.environ["BENCHMARK_LIBRARY"] = os.path.dirname(given) if os.path.isfile(given) else given
    sys.path.insert(0, library())


class Peer:
    """One way to call an object in another process.

    Between `start()` and `stop()` a peer has the methods of `served.Served`: `greet`, `record`, `echo`, `nap` and `count`,
    and `submit(name)`: a greet() whose answer is not waited for; it returns a function that does. One that it has not
    is None. `client()` gives what a further thread calls `greet` and `nap` on.
    `work` and `connections` tell the bare peer, which has no methods, how its plugin has to behave.
    """

    submit = count = nap = None

    def __init__(self, work="echo", connections=1):
        self.work = work
        self.connections = connections

    def client(self):
        return self


class ScriptPeer(Peer):
    """A peer whose own module, run as a script, is the plugin. See `serve_as_script`."""

    def start(self):
        self.folder = tempfile.mkdtemp(prefix="bench-")
        script = sys.modules[type(self).__module__].__file__
        self.process = subprocess.Popen([sys.executable, script, os.path.join(self.folder, "s")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, encoding="utf-8")
        self.address = self.process.stdout.readline().strip()
        self.connect()

    def stop(self):
        self.disconnect()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder)

    def disconnect(self):
        """Let go of all connections."""


def serve_as_script(address):
    """The plugin's side: tell the host where it listens, and end with it."""
    print(address, flush=True)
    threading.Thread(target=lambda: os._exit(bool(sys.stdin.read())), daemon=True).start()
