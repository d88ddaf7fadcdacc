"""Places by name, so many for each: who finds none free waits behind the others of that name, and of no other."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Queue:
    """The places of one name, and how many have one or wait for it."""

    free: asyncio.Semaphore
    concerned: int = 0


class Places:
    """Nothing is kept of a name that nobody has a place of.

    Args:
        each: places of one name.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._queues: dict[Hashable, _Queue] = {}

    def __len__(self) -> int:
        """Names of which somebody has a place or waits for one."""
        return len(self._queues)

    async def take(self, name: Hashable) -> None:
        """Wait for a place; it must be given back."""
        queue = self._queues.setdefault(name, _Queue(asyncio.Semaphore(self._each)))
        queue.concerned += 1
        try:
            await queue.free.acquire()
        except BaseException:
            self._unconcerned(name)
            raise

    def give_back(self, name: Hashable) -> None:
        """A place is free for the next."""
        self._queues[name].free.release()
        self._unconcerned(name)

    @asynccontextmanager
    async def place(self, name: Hashable) -> AsyncIterator[None]:
        """Hold a place."""
        await self.take(name)
        try:
            yield
        finally:
            self.give_back(name)

    def _unconcerned(self, name: Hashable) -> None:
        self._queues[name].concerned -= 1
        if not self._queues[name].concerned:
            del self._queues[name]
