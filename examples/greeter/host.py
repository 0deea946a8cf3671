"""The host: starts the plugin, has it greet the world, and shows what the plugin logged."""

import logging
import os

from commons import HANDSHAKE, Greeter  # first, since it finds miniplug

import miniplug

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin.py")
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # what every record has


class KeyValueFormatter(logging.Formatter):
    """A record's level, logger and message, then its extra fields as ``key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        fields = [f"{key}={value}" for key, value in vars(record).items() if key not in STANDARD]
        return " ".join([super().format(record), *fields])


def main() -> None:
    handler = logging.StreamHandler()  # to stderr
    handler.setFormatter(KeyValueFormatter("[%(levelname)s] %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])

    with miniplug.launch(PLUGIN, name="greeter", handshake=HANDSHAKE) as plugin:
        greeter = plugin.dispense("greeter", Greeter)
        print(greeter.greet("world"))


if __name__ == "__main__":
    main()
