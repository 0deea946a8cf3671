"""The plugin: one way to greet. The host starts it; started by hand it says so and exits."""

import logging

from commons import HANDSHAKE, Greeter  # first, since it finds miniplug

import miniplug

log = logging.getLogger("hello")


class GreeterHello(Greeter):
    """Says hello, and logs that it did."""

    def greet(self, name: str) -> str:
        log.debug("message from GreeterHello.greet", extra={"who": name})
        return f"Hello, {name}!"


if __name__ == "__main__":
    miniplug.serve({"greeter": GreeterHello()}, handshake=HANDSHAKE)
