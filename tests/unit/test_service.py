# SPDX-License-Identifier: MIT
"""The use cases over an allocator that can be made to wait, fail and count: nothing leaks, nothing is half done."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.devices import MadeUpDevices
from udmabufd.core.admission import Admission
from udmabufd.core.allocator import Populate
from udmabufd.core.buffer import Holder
from udmabufd.core.custody import Custody
from udmabufd.core.errors import (
    AllocatorError,
    InvalidSpec,
    NoSuchBuffer,
    NoSuchDevice,
    OutOfMemory,
    QuotaExceeded,
)
from udmabufd.core.identity import Identity
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.maker import Maker
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.memory import Memory
from udmabufd.core.moving import Moving
from udmabufd.core.placement import Placement
from udmabufd.core.pool import Pool
from udmabufd.core.service import Grant, Service
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.core.store import NoStore
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.linux.headroom import Room
from udmabufd_client.contract import State

SPEC = {"size": PAGE_SIZE, "kind": "memfd"}
ALICE, BOB = Owner(1000, ""), Owner(1001, "")


class Scripted(MemfdAllocator):
    """The memfd allocator under a test's hand: `gate` holds allocations up, `failures` makes them fail in turn."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.failures: list[OSError | None] = []
        self.made: list[Memory] = []

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        self.waiting.set()
        assert self.gate.wait(10)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.made.append(super().allocate(request, name, populate))
        return self.made[-1]

    @property
    def all_closed(self) -> bool:
        return all(memory.memfd is not None and memory.memfd.closed for memory in self.made)


class World:
    """A service with small limits, and its parts; without a store."""

    def __init__(self) -> None:
        self.limits = Limits(max_bytes_per_user=8 * PAGE_SIZE, max_buffers_per_user=4, max_buffers=6)
        self.ledger = Ledger(self.limits, time.monotonic)
        self.allocator = Scripted()
        self.workers = Workers()
        store = NoStore()
        self.custody = Custody(self.ledger, self.limits.max_buffers, store, self.workers, self.workers, {})
        self.room = Room(1 << 40, "memory.max of udmabufd.slice", 1 << 40, 0)
        self.devices = MadeUpDevices()
        admission = Admission(lambda _: self.room, lambda: 1 << 20)
        placement = Placement(Pool(["*"], [self.allocator]), self.devices)
        exporter = UdmabufAllocator(Path("/nonexistent"), Path("/nonexistent"))
        maker = Maker(self.custody, admission, store, self.workers)
        moving = Moving(self.custody, maker, placement, exporter, store, self.workers, self.workers, 5000)
        self.service = Service(self.limits, self.ledger, placement, exporter, self.custody, maker, Identity(), moving)
        self.alice, self.bob = Holder(":1.1", ALICE), Holder(":1.2", BOB)

    def books(self) -> tuple[int, int, int, int]:
        """Bytes and buffers of alice, then of bob."""
        a, b = self.ledger.account(ALICE).amounts, self.ledger.account(BOB).amounts
        return a[Resource.BYTES], a[Resource.BUFFERS], b[Resource.BYTES], b[Resource.BUFFERS]

    async def until_allocating(self) -> None:
        assert await asyncio.to_thread(self.allocator.waiting.wait, 10)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.custody.start()
    world.custody.connected("bus", [])
    yield world
    world.allocator.gate.set()
    world.service.drop(world.alice)
    world.service.drop(world.bob)
    await world.custody.settled()
    assert world.books() == (0, 0, 0, 0)
    assert all(not world.ledger.total(resource) for resource in Resource)
    assert world.allocator.all_closed
    assert world.service.buffer_count == 0
    assert not world.custody.lingering
    await world.custody.close()
    world.workers.close()


def close(grants: list[Grant]) -> None:
    for grant in grants:
        grant.fd.close()


async def test_allocate_charges_and_release_gives_back(world: World) -> None:
    (grant,) = await world.service.allocate(world.alice, SPEC)
    grant.fd.close()
    assert world.books() == (PAGE_SIZE, 1, 0, 0)
    assert grant.buffer.state is State.BACKED
    await world.service.release(world.alice, grant.buffer.id)
    assert world.books() == (0, 0, 0, 0)
    with pytest.raises(NoSuchBuffer):
        world.service.get(world.alice, grant.buffer.id)


async def test_many_are_all_or_nothing_when_the_kernel_runs_out(world: World) -> None:
    world.allocator.failures = [None, None, OSError(errno.ENOMEM, "")]
    with pytest.raises(OutOfMemory, match="ENOMEM"):
        await world.service.allocate(world.alice, SPEC, 4)
    assert len(world.allocator.made) == 2
    assert world.allocator.all_closed
    assert world.books() == (0, 0, 0, 0)


async def test_many_are_all_or_nothing_when_the_quota_runs_out(world: World) -> None:
    with pytest.raises(QuotaExceeded, match="max_buffers_per_user of 4; 4 are held"):
        await world.service.allocate(world.alice, SPEC, 5)
    with pytest.raises(QuotaExceeded, match="max_bytes_per_user"):
        await world.service.allocate(world.alice, {**SPEC, "size": 3 * PAGE_SIZE}, 3)
    assert not world.allocator.made
    assert world.books() == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [0, 17, (1 << 32) - 1])
async def test_a_count_out_of_range_names_count(world: World, count: int) -> None:
    with pytest.raises(InvalidSpec, match="^count: "):
        await world.service.allocate(world.alice, SPEC, count)


async def test_the_limit_of_all_users_holds(world: World) -> None:
    close(await world.service.allocate(world.alice, SPEC, 4))
    close(await world.service.allocate(world.bob, SPEC, 2))
    with pytest.raises(QuotaExceeded, match="has 6 buffers of all users, its limit max_buffers"):
        await world.service.create(world.bob, SPEC)


async def test_a_caller_that_dies_while_its_memory_is_made_leaves_nothing(world: World) -> None:
    world.allocator.gate.clear()
    allocation = asyncio.create_task(world.service.allocate(world.alice, SPEC, 2))
    await world.until_allocating()
    world.service.drop(world.alice)
    world.allocator.gate.set()
    with pytest.raises(NoSuchBuffer):
        await allocation
    await world.custody.settled()
    assert len(world.allocator.made) == 2
    assert world.allocator.all_closed
    assert world.books() == (0, 0, 0, 0)


async def test_one_of_many_released_while_they_are_made_undoes_all(world: World) -> None:
    world.allocator.gate.clear()
    allocation = asyncio.create_task(world.service.allocate(world.alice, SPEC, 2))
    await world.until_allocating()
    await world.service.release(world.alice, world.service.list_for(ALICE)[0].id)
    world.allocator.gate.set()
    with pytest.raises(NoSuchBuffer):
        await allocation
    await world.custody.settled()
    assert world.allocator.all_closed
    assert world.books() == (0, 0, 0, 0)


async def test_an_empty_buffer_costs_a_buffer_and_no_bytes_until_the_first_fd(world: World) -> None:
    changes: list[tuple[str, ...]] = []
    world.service.changed = lambda _buffer, names: changes.append(names)
    buffer = await world.service.create(world.alice, SPEC)
    assert (buffer.state, world.books()) == (State.EMPTY, (0, 1, 0, 0))
    grants = await asyncio.gather(*(world.service.get_fd(world.alice, buffer.id) for _ in range(5)))
    close(grants)
    assert len(world.allocator.made) == 1
    assert (buffer.state, world.books()) == (State.BACKED, (PAGE_SIZE, 1, 0, 0))
    assert changes == [("State", "Serial", "Allocator")]


async def test_a_first_fd_that_fails_can_be_asked_for_again(world: World) -> None:
    buffer = await world.service.create(world.alice, SPEC)
    world.allocator.failures = [OSError(errno.ENOSPC, "")]
    with pytest.raises(OutOfMemory):
        await world.service.get_fd(world.alice, buffer.id)
    assert world.books() == (0, 1, 0, 0)
    (await world.service.get_fd(world.alice, buffer.id)).fd.close()
    assert world.books() == (PAGE_SIZE, 1, 0, 0)


async def test_a_buffer_released_while_its_first_fd_is_made_ends(world: World) -> None:
    buffer = await world.service.create(world.alice, SPEC)
    world.allocator.gate.clear()
    asking = [asyncio.create_task(world.service.get_fd(world.alice, buffer.id)) for _ in range(2)]
    await world.until_allocating()
    await world.service.release(world.alice, buffer.id)
    world.allocator.gate.set()
    for task in asking:
        with pytest.raises(NoSuchBuffer):
            await task
    await world.custody.settled()
    assert world.books() == (0, 0, 0, 0)


async def test_a_ticket_shares_and_each_holder_releases_for_itself(world: World) -> None:
    buffer = await world.service.create(world.alice, SPEC)
    with pytest.raises(NoSuchBuffer):
        world.service.get(world.bob, buffer.id)
    assert await world.service.import_ticket(world.bob, buffer.ticket) is buffer
    assert await world.service.import_ticket(world.bob, buffer.ticket) is buffer
    assert world.books() == (0, 1, 0, 1)
    world.service.drop(world.alice)
    (await world.service.get_fd(world.bob, buffer.id)).fd.close()
    assert world.books() == (0, 0, PAGE_SIZE, 1)
    await world.service.release(world.bob, buffer.id)
    assert world.service.get(world.bob, buffer.id) is buffer
    await world.service.release(world.bob, buffer.id)
    with pytest.raises(NoSuchBuffer):
        await world.service.import_ticket(world.bob, buffer.ticket)


async def test_an_import_counts_against_the_importer(world: World) -> None:
    for _ in range(4):
        await world.service.create(world.bob, SPEC)
    buffer = await world.service.create(world.alice, SPEC)
    with pytest.raises(QuotaExceeded):
        await world.service.import_ticket(world.bob, buffer.ticket)
    assert world.books() == (0, 1, 0, 4)
    assert not world.service.list_for(Owner(12345, ""))
    assert len(world.service.list_for(Owner(0, ""))) == 5


async def test_names_are_checked_and_changed(world: World) -> None:
    buffer = await world.service.create(world.alice, SPEC)
    await world.service.set_name(world.alice, buffer.id, "front")
    assert buffer.name == "front"
    with pytest.raises(InvalidSpec, match="^name: "):
        await world.service.set_name(world.alice, buffer.id, "x" * 32)
    with pytest.raises(NoSuchBuffer):
        await world.service.set_name(world.bob, buffer.id, "mine")
    assert buffer.name == "front"


async def test_the_earliest_holder_takes_the_charge_when_the_creator_has_released(world: World) -> None:
    (grant,) = await world.service.allocate(world.alice, SPEC)
    grant.fd.close()
    await world.service.import_ticket(world.bob, grant.buffer.ticket)
    await world.service.release(world.alice, grant.buffer.id)
    assert world.books() == (0, 0, PAGE_SIZE, 1)
    world.service.drop(world.bob)
    await world.custody.settled()
    assert world.books() == (0, 0, 0, 0)


async def test_memory_made_after_the_creator_left_is_charged_to_who_stayed(world: World) -> None:
    buffer = await world.service.create(world.alice, SPEC)
    await world.service.import_ticket(world.bob, buffer.ticket)
    world.allocator.gate.clear()
    asking = asyncio.create_task(world.service.get_fd(world.bob, buffer.id))
    await world.until_allocating()
    world.service.drop(world.alice)
    world.allocator.gate.set()
    (await asking).fd.close()
    assert world.books() == (0, 0, PAGE_SIZE, 1)


async def test_another_users_figures_are_not_told(world: World) -> None:
    close(await world.service.allocate(world.alice, {**SPEC, "size": 8 * PAGE_SIZE}))
    buffer = await world.service.create(world.alice, SPEC)
    await world.service.import_ticket(world.bob, buffer.ticket)
    with pytest.raises(QuotaExceeded) as caught:
        await world.service.get_fd(world.bob, buffer.id)
    assert "in use" not in str(caught.value)
    with pytest.raises(QuotaExceeded, match=f"{8 * PAGE_SIZE} are in use"):
        await world.service.get_fd(world.alice, buffer.id)


async def test_a_name_given_while_the_memory_is_made_reaches_the_kernel(world: World) -> None:
    buffer = await world.service.create(world.alice, {**SPEC, "name": "old"})
    world.allocator.gate.clear()
    asking = asyncio.create_task(world.service.get_fd(world.alice, buffer.id))
    await world.until_allocating()
    naming = asyncio.create_task(world.service.set_name(world.alice, buffer.id, "new"))
    await asyncio.sleep(0)
    assert buffer.name == "old"
    world.allocator.gate.set()
    (await asking).fd.close()
    await naming
    assert buffer.name == "new"


async def test_the_error_of_an_allocation_outlives_its_undoing(world: World) -> None:
    world.allocator.failures = [OSError(errno.ENOSPC, "")]
    world.allocator.gate.clear()
    allocation = asyncio.create_task(world.service.allocate(world.alice, SPEC))
    await world.until_allocating()
    (buffer,) = world.service.list_for(ALICE)
    await world.service.import_ticket(world.bob, buffer.ticket)
    await world.service.release(world.alice, buffer.id)
    world.allocator.gate.set()
    with pytest.raises(OutOfMemory):
        await allocation
    world.service.drop(world.bob)


async def test_what_is_explained_is_what_would_be_done(world: World) -> None:
    world.devices.come("picky", alignment=1 << 20)
    (row,) = await world.service.explain(world.alice, SPEC)
    assert (row[0], row[1]) == (world.allocator, ())
    for spec, field in (
        ({"size": 1}, "kind"),
        ({**SPEC, "constraints": {"contiguous": True, "max_segment_size": 1}}, "contiguous"),
        ({"size": 1, "devices": ["picky"]}, "kind"),
        ({"size": 1, "devices": ["picky"], "constraints": {"alignment": (1 << 64) - 1}}, "alignment"),
    ):
        ((_, refusals, *_),) = await world.service.explain(world.alice, spec)
        assert refusals[0].field == field
        with pytest.raises(AllocatorError):
            await world.service.allocate(world.alice, spec)
    for wrong, error in (
        ({"size": 0}, InvalidSpec),
        ({**SPEC, "devices": ["picky"]}, InvalidSpec),
        ({"size": 1, "devices": ["gone"]}, NoSuchDevice),
        ({"size": 1, "constraints": {"cache": []}}, InvalidSpec),
    ):
        with pytest.raises(error):
            await world.service.explain(world.alice, wrong)
    # Nothing came of all that, not even an interest in the device.
    assert (world.books(), world.allocator.made, world.devices.watched) == ((0, 0, 0, 0), [], [])


async def test_each_look_up_counts_as_a_call(world: World) -> None:
    for name in ("one", "two", "three"):
        world.devices.come(name)

    def calls(owner: Owner) -> int:
        return world.ledger.account(owner).user.calls_in_window

    await world.service.explain(world.alice, SPEC)
    assert calls(ALICE) == 0
    await world.service.explain(world.alice, {"size": 1, "devices": ["one"] * 64})
    assert calls(ALICE) == 64
    # Whether they are there or not.
    for verb in (world.service.allocate, world.service.create, world.service.explain):
        with pytest.raises(AllocatorError):
            await verb(world.alice, {"size": 1, "devices": ["one", "gone"]})
    assert calls(ALICE) == 70
    assert [device.name for device in await world.service.list_devices(world.alice)] == ["one", "three", "two"]
    assert (calls(ALICE), calls(BOB)) == (73, 0)
