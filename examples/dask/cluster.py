"""The same plugins on a Dask cluster: each of its workers has a plugin process of its own.

    python3 cluster.py                      starts a cluster of two workers on this machine
    python3 cluster.py tcp://HOST:8786      uses one that runs
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from dask.distributed import Client, LocalCluster, Worker, WorkerPlugin, get_worker, wait

HERE = Path(__file__).resolve().parent

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(str(HERE.parent.parent))
    import miniplug


class PluginProcess(WorkerPlugin):
    """Gives every worker of a cluster, those that come later too, a process of its own for a plugin of miniplug's.

    `path`: the plugin's file, which comes along: the workers need not have it. `attribute`: what is in it. `options`: those
    of `miniplug.launch`. The process starts with the first task that needs it, and after a crash with the next one that
    does. It ends with its worker, however that ends.
    """

    def __init__(self, name: str, path: Path, attribute: str, **options: Any) -> None:
        self.name = name  # by which Dask knows it
        self.file, self.source, self.attribute = path.name, path.read_bytes(), attribute
        self.options = {"max_restarts": 20, "restart_window": 60.0, **options}

    def setup(self, worker: Worker) -> None:
        folder = Path(worker.local_directory, self.name)
        folder.mkdir(exist_ok=True)
        (folder / self.file).write_bytes(self.source)
        self.plugin = miniplug.Plugin(f"{folder / self.file}:{self.attribute}", name=self.name, **self.options)
        self.lock, self.proxy = threading.Lock(), None  # the lock protects that there is one proxy, and so one instance

    async def teardown(self, worker: Worker) -> None:
        await self.plugin.aclose()

    def dispense(self) -> Any:
        with self.lock:
            if self.proxy is None:
                self.proxy = self.plugin.dispense()
            return self.proxy


def parse(line: str) -> dict[str, int]:
    """A task."""
    return get_worker().plugins["parser"].dispense().parse(line)


def prepare(client: Client) -> None:
    """Send the workers what they need. miniplug is one file: nothing has to be installed there."""
    client.upload_file(miniplug.__file__)
    client.register_plugin(PluginProcess("parser", HERE / "plugin.py", "Parser"))


def main(client: Client) -> None:
    prepare(client)
    lines = [f"number={number} square={number ** 2}" for number in range(1000)]
    lines[500] = "number=500\0"
    futures = client.map(parse, lines)
    wait(futures)
    for line, future in zip(lines, futures):
        if future.status == "error":
            print(f"{line!r}: {type(future.exception()).__name__}: {str(future.exception()).partition('. ')[0]}")
    print(sum(future.status == "finished" for future in futures), "of", len(lines), "lines are parsed")


if __name__ == "__main__":
    if sys.argv[1:]:
        with Client(sys.argv[1]) as client:
            main(client)
    else:
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
            main(client)
