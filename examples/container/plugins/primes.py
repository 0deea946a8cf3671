"""Arithmetic that may take long. It has never heard of miniplug."""

from typing import List


class Tool:
    def factors(self, number: str) -> List[int]:
        """The prime factors of a number, the least first."""
        left, divisor, found = int(number), 2, []
        while divisor * divisor <= left:
            while left % divisor == 0:
                found.append(divisor)
                left //= divisor
            divisor += 1
        return found + [left] * (left > 1)
