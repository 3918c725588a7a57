# SPDX-License-Identifier: MIT
"""Service and books, side by side: what registry, ledger, state and store have to say at any time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from tests.unit.books import PICKY, Books, Client, Known, Payer, Quotas
from tests.unit.heaps import MadeUpAllocator
from tests.unit.machine import Life, Machine, references
from udmabufd.core import restore
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.state import StateFile
from udmabufd.core.store import STATE_NAME

DEVICES = ("gpu", "camera")
"""Devices that take any memory."""

FAR, LARGE = "heap:far", "heap:large"
"""Allocators beside the ordinary one: that which one device needs, and one that rounds sizes up to STEP."""

STEP = 4 * PAGE_SIZE

ROOT = Payer(0, "")
OWNERS = [Payer(uid, application) for uid in (1000, 1001) for application in ("", "camera")]


class Wrong(AssertionError):
    """Service and books disagree."""


class Compared:
    """A machine with the service on it, its clients, and the books of tests/unit/books.py about them."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed + 1)
        self.delays = random.Random(seed + 2)
        self.quotas = Quotas(
            bytes=rng.choice([24, 48, 100]) * PAGE_SIZE,
            wrapped=rng.choice([6, 12]) * PAGE_SIZE,
            buffers=rng.choice([6, 10, 30]),
            shares=rng.choice([8, 16, 40]),
            application_bytes=rng.choice([0, 0, 16 * PAGE_SIZE]),
            attachments=rng.choice([2, 5, 40]),
            evicted=rng.choice([6, 16, 100]) * PAGE_SIZE,
        )
        self.machine = Machine(
            Limits(
                max_bytes_per_user=self.quotas.bytes,
                max_bytes_per_application=self.quotas.application_bytes,
                max_wrapped_bytes_per_user=self.quotas.wrapped,
                max_buffers_per_user=self.quotas.buffers,
                max_shares_per_user=self.quotas.shares,
                max_attachments_per_user=self.quotas.attachments,
                max_evicted_bytes_per_user=self.quotas.evicted,
            )
        )
        for device in (*DEVICES, PICKY):
            self.come(device)
        self.machine.began = _allocators
        self.gone: set[str] = set()
        self.books = Books(self.quotas)
        self.clients: list[Client] = []
        self.known: list[Known] = []
        self.happened: Counter[str] = Counter()
        self._payers: dict[str, Payer] = {}
        self.life: Life

    def come(self, device: str) -> None:
        """Have a device come."""
        self.machine.devices.come(device, **({"allocators": [FAR]} if device == PICKY else {}))

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def delay(self) -> float:
        return self.delays.choice([0.0, 0.0, 0.0, 0.001, 0.01])

    def _being_closed(self) -> bool:
        """Whether memory has gone, and its charge has not yet, for the last descriptor is just being closed; or one is
        just being put in the place of another.
        """
        custody = self.life.custody
        gone = any(buffer not in custody.registry for buffer in custody.lingering._watches)
        return gone or bool(custody._disposals) or bool(self.life.left_open())

    def compare(self) -> None:
        """Hold registry, ledger, state and store against the books."""
        registry = {buffer.id: buffer for buffer in self.life.custody.registry}
        if wrong := self.books.observed(registry, self.now):
            raise Wrong("; ".join(wrong))
        same("ids", sorted(registry), sorted(buffer.id for buffer in self.books.buffers))
        for known in self.books.buffers:
            buffer = registry[known.id]
            same(f"shares of {known.id}", shares_of(buffer.shares), shares_of(known.shares))
            same(f"payer of {known.id}", tuple(buffer.payer), tuple(known.payer))
            backed = "evicted" if known.evicted else "backed" if known.backed else "empty"
            state = "lingering" if known.state == "lingering" else backed
            same(f"state of {known.id}", str(buffer.state), state)
            same(f"charge of {known.id}", buffer.charged, known.size if known.backed else 0)
            kept = buffer.kept and known.state != "lingering"
            same(f"facts of {known.id}", (buffer.name, buffer.ticket, buffer.serial, kept), self._facts(known))
            rows = {n: (a.holder.name, a.wish.device, a.wish.dynamic, a.pins) for n, a in buffer.attachments.items()}
            same(
                f"attachments of {known.id}",
                rows,
                {n: (row.client.name, *row[1:]) for n, row in known.attachments.items()},
            )
            same(f"attached to {known.id}", buffer.attached, known.attached)
            same(f"loose of {known.id}", {h.name for h in buffer.loose}, {client.name for client in known.loose})
            same(f"moving of {known.id}", (buffer.moving, buffer in self.life.service.moving.moves), (0, False))
            self._compare_memory(known, buffer)
            self._note(known)
        self._compare_charges()
        for owner in [*OWNERS, ROOT]:
            visible = [
                b.id
                for b in self.books.buffers
                if owner.uid == 0 or owner == b.payer or owner in {c.owner for c in b.shares}
            ]
            same(f"list for {owner}", [b.id for b in self.life.service.list_for(Owner(*owner))], visible)
        self._compare_state(registry)
        self._compare_store(registry)

    def _compare_memory(self, known: Known, buffer: Any) -> None:
        """What was written last, by whoever followed the protocol, is in the memory, and nobody else has that."""
        same(f"former memory {known.id}", buffer.origin, "" if known.origin is None else known.origin.id)
        memory = buffer.memory
        if memory is None:
            same(f"memory of {known.id}", "", known.allocator)
            return
        same(f"memory of {known.id}", (memory.allocator, memory.size), (known.allocator, known.size))
        where = self.machine.where(memory.exported.fileno())
        same(f"contents of {known.id}", self.machine.contents.get(where, ""), known.content)
        if memory.dma_buf is not None:
            # Clients', the service's own, and the store's.
            same(f"references to {known.id}", references(memory.inode), len(known.fds) + 2)

    def _note(self, known: Known) -> None:
        """Count what has come about, so that a test can see that it does."""
        if self._payers.setdefault(known.id, known.payer) != known.payer:
            self.happened["charge passed on"] += 1
            self._payers[known.id] = known.payer
        if known.state == "lingering":
            what = "a descriptor" if known.fds else "a shadow" if known.paths else "nothing"
            self.happened[f"lingers with {what}"] += 1
        elif known.state == "waiting":
            self.happened["waits after a bus" if known.kept else "waits after a request"] += 1

    @staticmethod
    def _facts(known: Known) -> tuple[str, str, int, bool]:
        return known.name, known.ticket, known.serial, known.kept

    def _compare_charges(self) -> None:
        ledger, expected = self.life.ledger, self.books.charges()
        total: Counter[str] = Counter()
        users: dict[int, Counter[str]] = {}
        for owner in [*OWNERS, ROOT]:
            amounts = expected.get(owner, Counter())
            account = ledger.account(Owner(*owner))
            found = {
                "bytes": account.amounts[Resource.BYTES],
                "wrapped": account.amounts[Resource.WRAPPED],
                "buffers": account.amounts[Resource.BUFFERS],
                "shares": account.amounts[Resource.SHARES],
                "attachments": account.amounts[Resource.ATTACHMENTS],
                "evicted": account.amounts[Resource.EVICTED],
                "lingering": account.lingering.total(),
            }
            same(f"charges of {owner}", found, {key: amounts[key] for key in found})
            same("calls and descriptors", (account.amounts[Resource.CALLS], account.amounts[Resource.FDS]), (0, 0))
            total.update(amounts)
            users.setdefault(owner.uid, Counter()).update(amounts)
        for uid, amounts in users.items():
            user = ledger.account(Owner(uid, "")).user
            same(f"bytes of user {uid}", user.amounts[Resource.BYTES], amounts["bytes"])
            same(f"evicted bytes of user {uid}", user.amounts[Resource.EVICTED], amounts["evicted"])
            same(f"buffers of user {uid}", user.amounts[Resource.BUFFERS], amounts["buffers"])
            same(f"shares of user {uid}", user.amounts[Resource.SHARES], amounts["shares"])
            same(f"lingering of user {uid}", user.lingering.total(), amounts["lingering"])
        same("all bytes", self.life.service.byte_count, total["bytes"] + total["wrapped"])

    def _compare_state(self, registry: dict[str, Any]) -> None:
        """What the next life of the service would read now is what this one has."""
        state = self.life.custody.registry.recorder.state
        copy = StateFile.open(state.fd.dup())
        found = restore.parse(copy)
        copy.close()
        same("state", [_recorded(buffer) for buffer in found.buffers], [_recorded(b) for b in registry.values()])
        shares: dict[str, list[tuple[str, int]]] = {}
        for share in found.shares:
            shares.setdefault(share.buffer, []).append((share.holder, share.count))
        same("shares in the state", shares, {b.id: shares_of(b.shares) for b in registry.values() if b.shares})
        attachments = {(a.buffer, a.number): (a.holder, a.wish, a.pins) for a in found.attachments}
        expected = {
            (b.id, a.number): (a.holder.name, a.wish, a.pins)
            for b in registry.values()
            for a in b.attachments.values()
        }
        loose = {(share.buffer, share.holder) for share in found.shares if share.loose}
        same("loose in the state", loose, {(b.id, holder.name) for b in registry.values() for holder in b.loose})
        same("attachments in the state", attachments, expected)

    def _compare_store(self, registry: dict[str, Any]) -> None:
        self.machine.handle_messages()
        stored = {name: len(fds) for name, fds in self.machine.stored.items() if name != STATE_NAME}
        for buffer in registry.values():
            memory = buffer.memory
            if memory is not None:
                parts = (memory.memfd is not None) + (memory.dma_buf is not None)
                same(f"stored for {buffer.id}", stored.pop(buffer.stored_as, 0), parts)
        if len(stored) > len(self.life.custody.lingering):
            raise Wrong(f"stored for nobody: {stored}")

    def holder(self, client: Client) -> Any:
        """The service's idea of a client."""
        return self.life.holder(client.name, client.owner.uid, client.owner.application)

    async def _again(self) -> None:
        await self.life.kill()
        self.life = await Life.begin(self.machine, [client.name for client in self.clients], self.delay)


def _allocators(life: Life) -> None:
    MadeUpAllocator(life, FAR, accounting=Accounting.SYSTEM)
    MadeUpAllocator(life, LARGE, size_step=STEP, accounting=Accounting.SYSTEM)


def _recorded(b: Any) -> tuple[object, ...]:
    where = b.stored_as, b.serial, b.moving, b.origin
    return b.id, b.name, b.payer, b.ended, b.kept, b.repeat, b.attached, where


def same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Wrong(f"{what}: {found!r}, and should be {expected!r}")


def shares_of(shares: dict[Any, int]) -> list[tuple[str, int]]:
    """In the order in which they came."""
    return [(holder.name, count) for holder, count in shares.items()]
