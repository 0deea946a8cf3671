"""A plugin in Python: a few things to do with numbers. ../node/plugin.mjs and ../go/plugin.go are the same."""

import logging
import weakref
from typing import Any, Callable, Iterable, Iterator, List, Optional

import miniplug

log = logging.getLogger("numbers")


class Counter:
    def __init__(self, start: int) -> None:
        self._next = start

    def next(self) -> int:
        """The next number."""
        self._next += 1
        return self._next - 1


class Numbers:
    def __init__(self) -> None:
        self._counters: weakref.WeakSet[Counter] = weakref.WeakSet()

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

    def each(self, items: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
        """A stream of what a function of the host's makes of each item."""
        for item in items:
            yield function(item)

    def find(self, items: List[Any], test: Callable[[Any], bool]) -> Any:
        """The first item that passes the test, a function of the host's. Raises LookupError if there is none."""
        for asked, item in enumerate(items):
            if miniplug.cancelled():
                log.warning("given up", extra={"asked": asked})
                raise RuntimeError("given up")
            if test(item):
                return item
        raise LookupError(f"none of {len(items)} passes")

    def counter(self, start: int = 0) -> Any:
        """An object that stays here, and is called from the host as long as the host likes."""
        counter = Counter(start)
        self._counters.add(counter)
        return miniplug.ref(counter)

    def counters(self) -> int:
        """How many of those the host still has."""
        return len(self._counters)


if __name__ == "__main__":
    miniplug.serve({"numbers": Numbers()}, info={"language": "Python"})
