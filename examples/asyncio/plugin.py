"""The plugin: prices, as they come from somewhere slow. It has never heard of miniplug."""

import asyncio
from typing import AsyncIterator

DELAY = 0.05  # seconds that the market takes to answer


class Market:
    async def price(self, item: int) -> int:
        """The price of an item. Many can be asked for at once: while one waits, others run."""
        await asyncio.sleep(DELAY)
        return item * item % 97 + 1

    async def changes(self, item: int, count: int) -> AsyncIterator[int]:
        """The next prices of an item, as they come."""
        price = await self.price(item)
        for step in range(count):
            await asyncio.sleep(DELAY / 10)
            price += (-1) ** step * (step + 1)
            yield price
