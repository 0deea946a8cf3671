"""The plugin: a long job that tells how far it is. It has never heard of miniplug."""

import contextlib
import os
from typing import Iterator, List


class Primes:
    def write(self, limit: int, path: str) -> Iterator[int]:
        """Write all primes below a limit to a file, one a line. Yields how many numbers are done, now and then.

        The file is there only once it is whole: until then it is called PATH.part. Closed before the end, the
        generator removes that one.
        """
        part = path + ".part"
        try:
            with open(part, "w", encoding="ascii") as file:
                for start in range(0, limit, SEGMENT):
                    end = min(start + SEGMENT, limit)
                    file.writelines(f"{prime}\n" for prime in primes_between(start, end))
                    yield end
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)


SEGMENT = 1 << 16


def primes_between(start: int, end: int) -> List[int]:
    """The primes from `start` up to and without `end`, by the sieve of Eratosthenes."""
    prime = bytearray([1]) * (end - start)
    for divisor in range(2, int(end**0.5) + 1):
        first = max(divisor * divisor, -(-start // divisor) * divisor) - start
        prime[first::divisor] = bytes(len(range(first, end - start, divisor)))
    return [start + offset for offset, is_prime in enumerate(prime) if is_prime and start + offset > 1]
