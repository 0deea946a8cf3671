"""A command line that counts. The plugin does the counting; the host adds for it, and keeps the numbers.

    python3 host.py put KEY NUMBER      adds to what is kept under a key
    python3 host.py get KEY             prints it
"""

import json
import os
import sys
from typing import Dict, Optional, Sequence

from commons import HANDSHAKE, Counter, Storage  # first, since it finds miniplug

import miniplug

HERE = os.path.dirname(os.path.abspath(__file__))


class FileStorage(Storage):
    """Numbers in a file of JSON. Only the host touches it; the plugin calls these methods."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self, key: str) -> Optional[int]:
        return self._numbers().get(key)

    def save(self, key: str, value: int) -> None:
        numbers = {**self._numbers(), key: value}
        with open(self._path, "w", encoding="utf-8") as file:
            json.dump(numbers, file, indent=2)

    def _numbers(self) -> Dict[str, int]:
        try:
            with open(self._path, encoding="utf-8") as file:
                return dict(json.load(file))
        except FileNotFoundError:
            return {}


def add(one: int, other: int) -> int:
    """Lent to the plugin as it is: a function goes by reference on its own."""
    print(f"the plugin has the host add {one} and {other}")
    return one + other


def main(arguments: Sequence[str]) -> int:
    if [len(arguments), *arguments[:1]] not in ([3, "put"], [2, "get"]):
        print("usage: host.py put KEY NUMBER, or host.py get KEY", file=sys.stderr)
        return 2
    with miniplug.launch(os.path.join(HERE, "plugin.py"), name="counter", handshake=HANDSHAKE) as plugin:
        counter = plugin.dispense("counter", Counter)
        counter.use(miniplug.ref(FileStorage(os.path.join(HERE, "numbers.json"))))  # the object stays here
        try:
            if arguments[0] == "put":
                counter.put(arguments[1], int(arguments[2]), add)
            else:
                print(counter.get(arguments[1]))
        except (KeyError, ValueError) as error:  # the first one is raised in the plugin
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
