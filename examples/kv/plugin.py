"""The plugin: it counts, and can neither add nor keep anything by itself. For both it calls the host back."""

from typing import Callable

from commons import HANDSHAKE, Counter, Storage  # first, since it finds miniplug

import miniplug


class LendingCounter(Counter):
    """Counts with what the host lends: a storage for as long as it likes, and an adder for one call."""

    def use(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, key: str, value: int, adder: Callable[[int, int], int]) -> None:
        before = self._storage.load(key)
        self._storage.save(key, value if before is None else adder(before, value))

    def get(self, key: str) -> int:
        value = self._storage.load(key)
        if value is None:
            raise KeyError(key)
        return value


if __name__ == "__main__":
    miniplug.serve({"counter": LendingCounter}, handshake=HANDSHAKE)
