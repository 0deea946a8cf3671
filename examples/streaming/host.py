"""A long job in a plugin, with a progress bar, and Ctrl-C to stop it.

    python3 host.py LIMIT FILE     writes all primes below LIMIT to FILE
"""

import os
import sys
from typing import Sequence

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin.py")
INTERRUPTED = 130  # what shells say of a program that Ctrl-C has ended


def show(done: int, total: int, width: int = 40) -> None:
    """Draw the progress bar anew, if there is a terminal to draw it on."""
    if sys.stderr.isatty():
        filled = width * done // total
        print(f"\r[{'#' * filled}{'.' * (width - filled)}] {100 * done // total:3} %", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or not arguments[0].isdigit():
        print("usage: host.py LIMIT FILE", file=sys.stderr)
        return 2
    limit, path = int(arguments[0]), os.path.abspath(arguments[1])
    try:
        with miniplug.launch(f"{PLUGIN}:Primes") as plugin, plugin.dispense().write(limit, path) as progress:
            for done in progress:
                show(done, limit)
    except KeyboardInterrupt:  # by now the stream is closed, the plugin has cleaned up, and its process has ended
        print(f"\ninterrupted: {arguments[1]} was not written", file=sys.stderr)
        return INTERRUPTED
    with open(path, encoding="ascii") as file:
        print(f"{sum(1 for _ in file)} primes below {limit} are in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
