"""The host: starts the plugin and calls it. The hosts in ../node and ../go do the same with plugins in other languages."""

import itertools
import logging
import os
import sys

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin.py")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] %(name)s: %(message)s")
    with miniplug.launch(PLUGIN, name="python") as plugin:
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
