"""What host and plugin share: the interfaces, and the handshake that both must agree on."""

import abc
import os
import sys
from typing import Callable, Optional

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug


class Storage(abc.ABC):
    """Where numbers are kept. The host has one, and lends it to the plugin."""

    @abc.abstractmethod
    def load(self, key: str) -> Optional[int]:
        """The number that is kept under a key, or None."""

    @abc.abstractmethod
    def save(self, key: str, value: int) -> None:
        """Keep a number."""


class Counter(abc.ABC):
    """Numbers by name that grow. This is what the plugin is."""

    @abc.abstractmethod
    def use(self, storage: Storage) -> None:
        """Keep the numbers there from now on."""

    @abc.abstractmethod
    def put(self, key: str, value: int, adder: Callable[[int, int], int]) -> None:
        """Add to a number, in the way that the caller adds."""

    @abc.abstractmethod
    def get(self, key: str) -> int:
        """The number. Raises KeyError if none was put there."""


HANDSHAKE = miniplug.Handshake(protocol_version=1, magic_cookie_key="KV_PLUGIN", magic_cookie_value="counter")
