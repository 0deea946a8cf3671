"""A plugin that was written for version 1 of the library `ledger`, and never changed. It has never heard of miniplug."""

from importlib.metadata import version
from typing import List, Tuple

import ledger


class Reader:
    def version(self) -> str:
        return version("ledger")

    def read(self, path: str) -> List[Tuple[str, int]]:
        """The name and the cents of each entry."""
        return ledger.read(path)
