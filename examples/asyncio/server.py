"""A small asyncio server that has its answers from a plugin, and a client for it.

    python3 server.py                       runs both, once
    python3 server.py serve PORT            runs the server, until Ctrl-C
    python3 server.py ask PORT REQUEST...   sends it one request

A request is one line: ``total FIRST LAST`` is answered with the price of all those items together, ``watch ITEM COUNT``
with the item's next prices, one a line. The server closes the connection when all is said.
"""

import asyncio
import os
import sys
import time
from typing import Any, List, Sequence

try:
    import miniplug
except ImportError:  # not installed, as in a fresh clone: it is the one file two folders up
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
    import miniplug

PLUGIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plugin.py")


async def answer(market: Any, words: List[str], writer: asyncio.StreamWriter) -> None:
    """Answer one request with the plugin's help."""
    if words[0] == "total":
        items = range(int(words[1]), int(words[2]) + 1)
        prices = await asyncio.gather(*[market.price.submit(item) for item in items])  # all of them at once
        writer.write(b"%d\n" % sum(prices))
    elif words[0] == "watch":
        async for price in await market.changes.submit(int(words[1]), int(words[2])):
            writer.write(b"%d\n" % price)
            await writer.drain()  # a slow client slows the plugin's generator, and nothing piles up
    else:
        raise ValueError(f"no such request: {words[0]}")


async def start_server(market: Any, port: int = 0) -> asyncio.AbstractServer:
    """A server on this machine that has started. Port 0: one that is free."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(market, (await reader.readline()).decode().split() or ["nothing"], writer)
        except (ValueError, IndexError, miniplug.PluginError) as error:
            writer.write(f"error: {error}\n".encode())
        finally:
            writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", port)


async def ask(port: int, *words: Any) -> List[str]:
    """Send the server a request. Returns the lines of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(" ".join(map(str, words)).encode() + b"\n")
    lines = (await reader.read()).decode().splitlines()
    writer.close()
    return lines


async def serve_for_ever(port: int) -> None:
    async with miniplug.Plugin(f"{PLUGIN}:Market") as plugin, await start_server(plugin.dispense(), port) as server:
        await server.serve_forever()


async def demonstrate() -> None:
    """Start the plugin and the server, be two clients at once, and print what they were told."""
    async with miniplug.Plugin(f"{PLUGIN}:Market") as plugin, await start_server(plugin.dispense()) as server:
        port, start = server.sockets[0].getsockname()[1], time.monotonic()
        total, changes = await asyncio.gather(ask(port, "total", 1, 100), ask(port, "watch", 7, 5))
        seconds = time.monotonic() - start
    print("a hundred items cost", *total)
    print("item 7 goes", *changes)
    print("a hundred waits of 0.05 s took", "less than 2 s" if seconds < 2 else f"{seconds:.1f} s")


def main(arguments: Sequence[str]) -> int:
    try:
        if not arguments:
            asyncio.run(demonstrate())
        elif arguments[0] == "serve" and len(arguments) == 2:
            asyncio.run(serve_for_ever(int(arguments[1])))
        elif arguments[0] == "ask" and len(arguments) > 2:
            print(*asyncio.run(ask(int(arguments[1]), *arguments[2:])), sep="\n")
        else:
            print("usage: server.py, or server.py serve PORT, or server.py ask PORT REQUEST...", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
