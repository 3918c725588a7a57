# SPDX-License-Identifier: MIT
"""Room when memory is short: which buffers are evicted, in which order, and how long their importers are waited for.

How a buffer is evicted is eviction.py's matter; when memory is short, the maker's and the kernel's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import AllocatorError
from udmabufd.core.memory import Memory
from udmabufd.core.moves import held_in_place
from udmabufd.core.registry import Registry
from udmabufd_client.contract import UDMABUF

log = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Seconds for which further buffers are asked to make room, and waited for."""

PROMPT: Final = 0.25
"""Seconds in which importers answer as a rule; after that others are asked, too."""

ASKED_AT_ONCE: Final = 64
"""Buffers, at least, that are asked at the same time once some have not made room in that time."""

SPARED: Final = 600.0
"""Seconds for which a buffer that could not be evicted is not asked again."""


class Relief:
    """See the module. `evict` is called with a buffer whose backing lock is held; it raises AllocatorError."""

    def __init__(self, registry: Registry, evict: Callable[[Buffer, Memory], Awaitable[None]]) -> None:
        self._registry = registry
        self._evict = evict
        self._under_way: asyncio.Future[int] | None = None
        self._wanted = 0
        self._late: set[asyncio.Task[int]] = set()

    async def relieve(self, wanted: int) -> int:
        """Evict buffers that nobody needs in place, the least recently used first, until at least `wanted` bytes are
        free from their pins, or until that has taken too long; return how many are. One at a time: whoever comes
        meanwhile has it go on for what is wanted in all, and waits for the same end.
        """
        if self._under_way is None or self._under_way.done():
            self._wanted = 0
            self._under_way = asyncio.ensure_future(self._relieve())
        self._wanted += wanted
        return await asyncio.shield(self._under_way)

    async def _relieve(self) -> int:
        now = asyncio.get_running_loop().time
        deadline = now() + PATIENCE
        idle = [b for b in self._registry if not b.backing.locked() and _idle(b)]
        idle.sort(key=lambda buffer: buffer.used, reverse=True)
        asked: set[asyncio.Task[int]] = set()
        freed, least = 0, 1
        while (idle or asked) and freed < self._wanted and now() < deadline:
            # All that may be needed are asked at the same time: each of their importers may let us wait.
            hoped, count = freed, 0
            while idle and (count < least or hoped < self._wanted):
                buffer = idle.pop()
                asked.add(asyncio.ensure_future(self._evict_if_idle(buffer)))
                hoped, count = hoped + buffer.size, count + 1
            # Those that do not answer are not to keep the others from being asked.
            least, prompt = ASKED_AT_ONCE, now() + PROMPT if idle else deadline
            while asked and freed < self._wanted and now() < prompt:
                done, asked = await asyncio.wait(asked, timeout=prompt - now(), return_when=asyncio.FIRST_COMPLETED)
                freed += sum(task.result() for task in done)
        # What still waits for an answer ends by itself.
        self._late |= asked
        for task in asked:
            task.add_done_callback(self._late.discard)
        return freed

    async def _evict_if_idle(self, buffer: Buffer) -> int:
        """Evict `buffer` if it is still idle; return the bytes that are free of pins then. Fails for nobody."""
        try:
            # Whoever has the lock, or is about to get it, may wait for memory, and so for this.
            async with asyncio.timeout(0):
                await buffer.backing.acquire()
        except TimeoutError:
            return 0
        try:
            memory = buffer.memory
            if memory is None or not _idle(buffer):
                return 0
            await self._evict(buffer, memory)
        except AllocatorError as error:
            buffer.spared = asyncio.get_running_loop().time() + SPARED
            log.info("Buffer %s is not evicted: %s", buffer.id, error)
            return 0
        except Exception:
            # Whoever lacks memory is to have it of another one.
            buffer.spared = asyncio.get_running_loop().time() + SPARED
            log.exception("Buffer %s could not be evicted", buffer.id)
            return 0
        finally:
            buffer.backing.release()
        return memory.size


def plain(memory: Memory) -> bool:
    """Whether it is a memfd of ordinary pages, which can be swapped out once nothing pins them."""
    return memory.allocator == UDMABUF and memory.memfd is not None


def _idle(buffer: Buffer) -> bool:
    memory = buffer.memory
    return (
        memory is not None
        and not buffer.ended
        and buffer.spared <= asyncio.get_running_loop().time()
        and plain(memory)
        and memory.dma_buf is not None
        and held_in_place(buffer) is None
        # Without an importer that could be asked, nobody may have a descriptor.
        and (bool(buffer.attachments) or memory.references() == 0)
    )
