"""A plugin that was written for version 2 of the library `ledger`. It has never heard of miniplug."""

from importlib.metadata import version
from typing import Iterable, Tuple

import ledger


class Writer:
    def version(self) -> str:
        return version("ledger")

    def write(self, path: str, entries: Iterable[Tuple[str, int]]) -> None:
        new = ledger.Ledger(path)
        for name, cents in entries:
            new.add(name, cents)
        new.save()

    def total(self, path: str) -> int:
        """The cents in a file."""
        return ledger.Ledger.load(path).total()
