# SPDX-License-Identifier: MIT
"""One buffer: its identity, what was asked for, its memory, and who holds shares of it."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass, field

from udmabufd.core.ledger import Charge
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd_client.contract import State


@dataclass(eq=False, slots=True)
class Holder:
    """One connection of a client. `name` is opaque here; `gone` once the connection has ended."""

    name: str
    uid: int
    gone: bool = False


@dataclass(eq=False, slots=True)
class Buffer:
    """A live buffer. Only the registry changes `creator`, `shares`, `counted`, `bytes_charge`, `memory`, `serial` and
    `ended`; only the service `name`.
    """

    request: Request
    creator: int
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ticket: str = field(default_factory=lambda: secrets.token_hex(16))
    name: str = ""
    serial: int = 0
    memory: Memory | None = None
    ended: bool = False
    shares: Counter[Holder] = field(default_factory=Counter)
    counted: dict[int, Charge] = field(default_factory=dict)
    """The charge for one buffer of each uid that holds a share."""
    bytes_charge: Charge | None = None
    """The charge for the memory: the creator's, and after its last share the earliest holder's, `creator` then."""
    backing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the memory is being made, so that it is made once."""

    def __post_init__(self) -> None:
        self.name = self.request.name or f"udmabufd-{self.id}"

    @property
    def state(self) -> State:
        """Where in its life the buffer is."""
        return State.EMPTY if self.memory is None else State.BACKED

    @property
    def charged(self) -> int:
        """Bytes charged for it at present."""
        return 0 if self.bytes_charge is None else self.bytes_charge.bytes
