"""What the cluster is to compute. It has never heard of Dask, nor of miniplug."""

import os
from typing import Dict


class Parser:
    """Stands for one that is written in C and has a bug: a line with a NUL in it is its end, and that of its process."""

    def parse(self, line: str) -> Dict[str, int]:
        """The fields of a line such as ``a=1 b=2``."""
        if "\0" in line:
            os.abort()
        return {name: int(value) for name, value in (field.split("=") for field in line.split())}
