# SPDX-License-Identifier: MIT
"""Allocators that a test makes up, beside those that a life of the service has on its machine."""

from __future__ import annotations

from typing import Any

from tests.unit.machine import Life
from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd.linux import fdstat
from udmabufd_client.contract import Kind


class MadeUpAllocator:
    """Gives memory that has no memfd. `failures` are raised in turn, None is success; `asked` has names of buffers."""

    unavailable: Refusal | None = None
    max_size = 1 << 40
    free: int | None = None

    def __init__(self, life: Life, name: str, **capabilities: Any) -> None:
        self.name = name
        self.capabilities = Capabilities(kind=Kind.DMA_BUF, **capabilities)
        self.failures: list[Exception | None] = []
        self.asked: list[str] = []
        self._life = life
        life.pool.add(self)

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """See core.matching."""
        return refusals(self.name, capabilities or self.capabilities, request, lambda: None)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make something."""
        self.asked.append(name)
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        step = self.capabilities.size_step
        size = -(-request.size // step) * step
        dma_buf = self._life.machine.export(size)
        identity = fdstat.look(dma_buf.fileno())
        self._life.made.append(
            Memory(
                allocator=self.name,
                size=size,
                memfd=None,
                dma_buf=dma_buf,
                device=identity.device,
                inode=identity.inode,
                cache=self.capabilities.cache,
                evidence=self.capabilities.evidence,
                needs_sync=True,
                accounting=self.capabilities.accounting,
            )
        )
        return self._life.made[-1]

    def close(self) -> None:
        """Do nothing."""
