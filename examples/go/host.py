"""The host: builds the plugin, which is in Go, starts it, and calls it like any other."""

import itertools
import logging
import os
import subprocess
import sys

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))
PLUGIN = os.path.join(HERE, "plugin")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")
    subprocess.run(["go", "build", "-o", PLUGIN, "."], cwd=HERE, check=True)  # quick, unless a source has changed
    with miniplug.launch([PLUGIN], name="go") as plugin:
        numbers = plugin.dispense()
        print("a third:", numbers.divide(1, 3, digits=4))
        try:
            numbers.divide(1, 0)
        except ZeroDivisionError as error:
            print("no way:", error)
        with numbers.primes() as primes:  # there is no end of them
            print("primes:", *itertools.islice(primes, 10))
        print("found:", numbers.find(list(range(100)), lambda number: number * number > 2000))
        print("it is in", plugin.info["language"])


if __name__ == "__main__":
    main()
