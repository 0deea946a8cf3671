"""A plugin in Python: a few things to do with numbers. ../node/plugin.mjs and ../go/plugin.go are the same."""

import logging
from typing import Any, Callable, Iterator, List, Optional

import miniplug

log = logging.getLogger("numbers")


class Numbers:
    def divide(self, one: float, other: float, digits: int = 2) -> float:
        """A plain method, and an error."""
        log.debug("dividing", extra={"one": one, "other": other})
        return round(one / other, digits)

    def primes(self, below: Optional[int] = None) -> Iterator[int]:
        """A stream, which waits for its reader. It runs its `finally` also when the host closes it."""
        found: List[int] = []
        try:
            number = 2
            while below is None or number < below:
                if all(number % prime for prime in found):
                    found.append(number)
                    yield number
                number += 1
        finally:
            log.info("no more primes", extra={"given": len(found)})

    def find(self, items: List[Any], test: Callable[[Any], bool]) -> Any:
        """The first item that passes the test, a function of the host's. Raises LookupError if there is none."""
        for asked, item in enumerate(items):
            if miniplug.cancelled():
                log.warning("given up", extra={"asked": asked})
                raise RuntimeError("given up")
            if test(item):
                return item
        raise LookupError(f"none of {len(items)} passes")


if __name__ == "__main__":
    miniplug.serve({"numbers": Numbers()}, info={"language": "Python"})
