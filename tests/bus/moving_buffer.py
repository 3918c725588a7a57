# SPDX-License-Identifier: MIT
"""A fake service with one buffer that moves when a test says so, and what tests of moves share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.bus.fake_allocator import PATH, Backing, FakeAllocator
from tests.bus.test_client_restart import answer_all
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming

MILLISECONDS = 8_000


class Mover:
    """The service's side of moves of its one buffer. `client` is the unique name of whom it asks."""

    def __init__(self, fake: FakeAllocator, backing: Backing) -> None:
        self.fake = fake
        self.backing = backing
        self.client = ""

    def answer(self) -> None:
        """Answer everything, with the present memory; attachments are numbered from 1."""
        fake, backing = answer_all(self.fake), self.backing
        numbers = iter(range(1, 1000))

        def attach(incoming: Incoming) -> None:
            self.client = incoming.header.sender
            fake.attached(incoming.header, next(numbers))

        def share(incoming: Incoming) -> None:
            fake.reply(incoming.header, "oa{sv}", PATH, backing.info())

        def allocate(incoming: Incoming) -> None:
            self.client = incoming.header.sender
            fake.reply(incoming.header, "oha{sv}", PATH, 0, backing.info(), fds=[backing.give()])

        fake.answers |= {
            "Allocate": allocate,
            "Import": share,
            "ImportTicket": share,
            "Attach": attach,
            "GetFd": self.give,
            "GetAll": lambda incoming: fake.reply(incoming.header, "a{sv}", backing.properties()),
        }

    def give(self, incoming: Incoming) -> None:
        """Answer GetFd: what was evicted comes back."""
        backing = self.backing
        if backing.state == "evicted":
            backing.move()
            backing.state = "backed"
            self.fake.changed(incoming.header.sender, backing.properties())
        self.fake.reply(incoming.header, "ha{sv}", 0, backing.info(), fds=[backing.give()])

    # What it says

    def ask(self, *numbers: int, evict: bool = False, timeout: int = MILLISECONDS) -> None:
        """Ask attachments to stop using the memory."""
        self.backing.state = "moving"
        self.fake.changed(self.client, {"State": Variant("s", "moving")})
        for number in numbers:
            member = "EvictNotify" if evict else "MoveNotify"
            self.fake.say(self.client, member, number, self.backing.serial + 1, timeout)

    def move(self, *numbers: int) -> None:
        """Move, and tell the attachments."""
        self.backing.move()
        self.backing.state = "backed"
        self.fake.changed(self.client, self.backing.properties())
        for number in numbers:
            self.fake.say(self.client, "Moved", number, self.backing.serial)

    def cancel(self, *numbers: int) -> None:
        """Tell the attachments that everything stays."""
        self.backing.state = "backed"
        self.fake.changed(self.client, {"State": Variant("s", "backed")})
        for number in numbers:
            self.fake.say(self.client, "MoveCancelled", number, self.backing.serial + 1)

    def evict(self) -> None:
        """Have the memory evicted."""
        self.backing.state = "evicted"
        self.fake.changed(self.client, {"State": Variant("s", "evicted")})

    # What it hears

    async def ready(self, count: int = 1) -> list[list[Any]]:
        """Wait for so many MoveReady in all; return their bodies."""
        await self.fake.called("MoveReady", count)
        return self.bodies("MoveReady")

    def bodies(self, member: str) -> list[list[Any]]:
        return [body for header, body in self.fake.calls if header.member == member]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (nothing of what is tested sets an event)
            await asyncio.sleep(0.002)
