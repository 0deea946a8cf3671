"""What the plugins of calls.py serve, and what they are sent."""

import time

MANY = 20_000


def record(number):
    """20 fields, none of whose values another record has."""
    return {**{f"text{n}": f"the value number {number * 8 + n}" for n in range(8)},
            **{f"count{n}": number * 6006 + n * 1001 for n in range(6)},
            **{f"share{n}": (number * 4 + n) / 7 for n in range(4)},
            **{f"flag{n}": n == 1 for n in range(2)}}


def makers():
    """What makes the n-th of many in one result, by name. (What they take is imported only where it is wanted.)"""
    from datetime import date, datetime, timedelta, timezone
    from decimal import Decimal
    from uuid import UUID

    noon = datetime(2000, 1, 1, 12)
    return {"tuples": lambda n: (n, n + 1),
            "dicts with int keys": lambda n: {n: n + 1},
            "8 bytes each": lambda n: n.to_bytes(8, "big"),
            "dates": lambda n: date(2000, 1, 1) + timedelta(n),
            "naive datetimes": lambda n: noon + timedelta(seconds=n),
            "UTC datetimes": lambda n: noon.replace(tzinfo=timezone.utc) + timedelta(seconds=n),
            "Decimals": lambda n: Decimal(n) / 4,
            "UUIDs": lambda n: UUID(int=n << 64 | n)}


def values(name):
    make = makers()[name]
    return [make(number) for number in range(MANY)]


class Served:
    def __init__(self):
        self.made = {}

    def processor(self):
        return time.process_time()

    def greet(self, name):
        return f"Hello, {name}!"

    def echo(self, value):
        return value

    def values(self, name):
        if name not in self.made:
            self.made[name] = values(name)
        return self.made[name]

    def call_back(self, function, value):
        return function(value)
