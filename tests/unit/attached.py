# SPDX-License-Identifier: MIT
"""Scenes with devices, and what is to be seen of their attachments."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit import scenes
from tests.unit.scenes import ALICE, UIDS, Scene, World
from udmabufd.core import restore
from udmabufd.core.buffer import Buffer
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.state import StateFile

NV12 = {"width": 1920, "height": 1080, "format": "NV12"}
PICTURE = 2048 * 1620
"""Bytes of it."""

Play = Callable[..., None]


def play(scene: Scene, patch: pytest.MonkeyPatch, limits: Limits | None = None) -> None:
    """Play a scene in a world with some devices."""

    async def with_devices(world: World) -> None:
        come = world.machine.devices.come
        come("camera", tail_padding=PAGE_SIZE)
        come("gpu", alignment=64, stride_alignment=4096)
        come("codec", height_alignment=16, max_segments=1 << 20)
        come("card", contiguous=True)
        come("plain")
        await scene(world)

    scenes.play(with_devices, patch, limits)


def charged(world: World, client: str = ALICE) -> int:
    """Return how many attachments the application of a client is charged for."""
    return world.life.ledger.account(Owner(*UIDS[client])).amounts[Resource.ATTACHMENTS]


def rows(buffer: Buffer) -> list[tuple[int, str, str]]:
    """Return what is attached: number, whose, what."""
    return [(a.number, a.holder.name, a.wish.device) for a in buffer.attachments.values()]


def recorded(world: World) -> restore.Records:
    """Return what the next life would read now."""
    copy = StateFile.open(world.life.custody.registry.recorder.state.fd.dup())
    found = restore.parse(copy)
    copy.close()
    return found


def everything(world: World) -> object:
    """Return all that a refused call may not have changed."""
    registry, ledger = world.life.custody.registry, world.life.ledger
    found = recorded(world)
    amounts = {
        (client, resource): ledger.account(Owner(*owner)).amounts[resource]
        for client, owner in UIDS.items()
        for resource in Resource
    }
    return (
        [(b.id, rows(b), b.attached, b.request, b.memory, list(b.shares.items())) for b in registry],
        [[(each.slot, each.order) for each in kind] for kind in (found.buffers, found.shares, found.attachments)],
        {key: amount for key, amount in amounts.items() if amount},
        {path: [(b.id, a.number) for b, a in registry.attachments.at(path)] for path in registry.attachments},
        world.stored,
    )
