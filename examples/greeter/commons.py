"""What host and plugin share: the interface, and the handshake that both must agree on."""

import abc
import os
import sys

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug


class Greeter(abc.ABC):
    """Greets people."""

    @abc.abstractmethod
    def greet(self, name: str) -> str:
        """A greeting for somebody."""


HANDSHAKE = miniplug.Handshake(protocol_version=1, magic_cookie_key="BASIC_PLUGIN", magic_cookie_value="hello")
