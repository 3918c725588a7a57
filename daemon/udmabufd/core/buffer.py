# SPDX-License-Identifier: MIT
"""One buffer: its identity, what was asked for, its memory, who holds shares of it and who is charged."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from dataclasses import dataclass, field

from udmabufd.core.attachments import Attachment
from udmabufd.core.ledger import Charge, Owner
from udmabufd.core.memory import Memory
from udmabufd.core.spec import Request
from udmabufd_client.contract import Kind, State


@dataclass(eq=False, slots=True)
class Holder:
    """One connection of a client. `name` is opaque here; `gone` once the connection has ended."""

    name: str
    owner: Owner
    gone: bool = False

    @property
    def uid(self) -> int:
        """The connection's user."""
        return self.owner.uid


@dataclass(frozen=True, slots=True)
class Repeat:
    """The request_id that a buffer was asked for with: by whom, in which member, with which spec (its digest).

    The buffer is number `index` of the `count` that the id stands for.
    """

    owner: Owner
    request_id: str
    member: str
    digest: str
    index: int
    count: int


@dataclass(eq=False, slots=True)
class Buffer:
    """A buffer of the service. Only the registry changes what it has, but for `name`, which the service does."""

    request: Request
    payer: Owner
    """Who is charged for the memory: the creator, and after its last share the earliest holder."""
    repeat: Repeat | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ticket: str = field(default_factory=lambda: secrets.token_hex(16))
    name: str = ""
    serial: int = 0
    memory: Memory | None = None
    ended: bool = False
    """Nobody has a share of it and nobody can get one but by Import, while it lingers."""
    kept: bool = False
    """Its holders were those of a bus that has ended; it waits for them to import it again."""
    shares: Counter[Holder] = field(default_factory=Counter)
    """In the order in which they came."""
    counted: dict[Owner, Charge] = field(default_factory=dict)
    """The charge for one buffer of each owner that holds a share, and of the payer."""
    share_charges: dict[Holder, Charge] = field(default_factory=dict)
    loose: set[Holder] = field(default_factory=set)
    """Holders that have a descriptor for which no dynamic attachment answers: their memory stays where it is."""
    answered: set[Holder] = field(default_factory=set)
    """Holders whose call with the request_id was answered."""
    unanswered: set[Holder] = field(default_factory=set)
    """Holders of a former life of the service whose call with the request_id it may not have answered."""
    memory_charge: Charge | None = None
    backing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the memory is being made, so that it is made once."""
    moving: int = 0
    """The serial that it will have when the move or eviction that is under way has come to its end; 0 for none."""
    called_off: int = 0
    """The serial of the last move or eviction that was announced and cancelled: a late answer to it is to be none to
    another, so no other has it. 0 for none."""
    cut_off: int = 0
    """The serial of the move that the end of the former run has cut off, until the importers are told; 0 for none."""
    origin: str = ""
    """The id of the buffer whose former memory this is, which lingers; empty for a buffer of its own."""
    used: int = 0
    """Greater for one that was used later (Registry.use)."""
    awaited: float = 0.0
    """Seconds of the loop's clock, which goes on over a restart (CLOCK_MONOTONIC), until which those that had it when
    the bus ended may come back."""
    timed_out: float = 0.0
    """Seconds of the loop's clock when its importers last did not answer a move."""
    spared: float = 0.0
    """Seconds of the loop's clock until which it is not asked to make room."""
    stored_as: str = ""
    """Name of its descriptors in the store."""
    order: int = 0
    """Greater for a later buffer."""
    slot: int | None = None
    """Where its record is in the state, once it has one."""
    share_records: dict[Holder, tuple[int, int]] = field(default_factory=dict)
    """Slot and order of the record of each holder's shares."""
    attachments: dict[int, Attachment] = field(default_factory=dict)
    """By number."""
    attached: int = 0
    """The number of the last attachment that there was."""

    def __post_init__(self) -> None:
        self.name = self.name or self.request.name or f"udmabufd-{self.id}"

    @property
    def state(self) -> State:
        """Where in its life the buffer is."""
        if self.ended:
            return State.LINGERING
        if self.moving:
            return State.MOVING
        if self.memory is None:
            return State.EMPTY
        return State.EVICTED if self.evicted else State.BACKED

    @property
    def next_serial(self) -> int:
        """What its serial will be with the next memory."""
        return max(self.serial, self.called_off) + 1

    @property
    def evicted(self) -> bool:
        """Whether its pages are in a memfd of the service alone, which nobody has."""
        memory = self.memory
        return memory is not None and memory.dma_buf is None and self.request.kind is Kind.DMA_BUF and not self.ended

    @property
    def withdrawn(self) -> bool:
        """Whether what clients had is given up, so that it cannot live again: its memory is a mere witness."""
        memory = self.memory
        return self.ended and memory is not None and memory.dma_buf is None and self.request.kind is Kind.DMA_BUF

    @property
    def size(self) -> int:
        """Bytes of its memory, or of the memory that it would ask for now."""
        return self.request.size if self.memory is None else self.memory.size

    @property
    def charged(self) -> int:
        """Bytes charged for it at present."""
        return 0 if self.memory_charge is None else self.memory_charge.amount
