"""What every Python peer serves."""

import time

# 20 fields, of the kinds that every peer knows. The peers with a schema have it in greeter.proto and in goplugin/main.go.
RECORD = {
    **{f"text{n}": f"the value number {n}" for n in range(8)},
    **{f"count{n}": n * 1001 for n in range(6)},
    **{f"share{n}": n / 7 for n in range(4)},
    **{f"flag{n}": n == 1 for n in range(2)},
}
NAP = 0.010


class Served:
    def greet(self, name):
        return f"Hello, {name}!"

    def record(self, value):
        return value

    def echo(self, data):
        return data

    def nap(self):
        time.sleep(NAP)

    def count(self, n):
        yield from range(n)
