# SPDX-License-Identifier: MIT
"""core.registry: shares and whom they charge, on its own; whole histories of it are in test_model.py, attachments in
test_attaching.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from udmabufd.core.attachments import Wish
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.constraints import NONE
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.registry import Registry
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.core.state import StateFile
from udmabufd.linux import memfd

REQUEST = Request.from_spec({"size": PAGE_SIZE, "kind": "memfd"})
CAMERA, PLAYER, BOB, EVE = Owner(1000, "camera"), Owner(1000, "player"), Owner(1001, ""), Owner(1002, "")


class World:
    """A registry that ends at once what nobody holds."""

    def __init__(self) -> None:
        self.ledger = Ledger(
            Limits(max_buffers_per_user=3, max_shares_per_user=4, max_attachments_per_user=3), lambda: 0.0
        )
        self.state = StateFile.create()
        self.ended: list[Buffer] = []
        self.registry = Registry(self.ledger, 5, self.state, self.end)
        self.names = iter(range(100))

    def end(self, buffer: Buffer) -> None:
        self.ended.append(buffer)
        assert not self.registry.end(buffer)
        if buffer.memory is not None:
            buffer.memory.close()

    def holder(self, owner: Owner) -> Holder:
        return Holder(f":1.{next(self.names)}", owner)

    def backed(self, holder: Holder) -> Buffer:
        buffer = self.registry.create(REQUEST, holder)
        self.registry.billing.charge_memory(buffer, REQUEST.size)
        memory = MemfdAllocator(1 << 40).allocate(REQUEST, "test", memfd.populate)
        self.registry.back(buffer, memory, "0")
        self.registry.record_shares(buffer)
        return buffer

    def charged(self, owner: Owner) -> tuple[int, int, int]:
        """Bytes, buffers, shares."""
        amounts = self.ledger.account(owner).amounts
        return amounts[Resource.BYTES], amounts[Resource.BUFFERS], amounts[Resource.SHARES]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for holder in world.registry.holders():
        world.registry.drop(holder)
    copy = StateFile.open(world.state.fd.dup())
    assert not copy.records
    copy.close()
    assert all(not world.ledger.total(resource) for resource in Resource)
    assert len(world.registry) == 0
    world.state.close()


def test_shares_are_counted_for_each_connection(world: World) -> None:
    one, two = world.holder(CAMERA), world.holder(CAMERA)
    buffer = world.registry.create(REQUEST, one)
    for _ in range(3):
        world.registry.share(buffer, two)
    # A buffer counts once for an application, a share once for a connection.
    assert world.charged(CAMERA) == (0, 1, 2)
    world.registry.release(buffer, one)
    with pytest.raises(NoSuchBuffer):
        world.registry.release(buffer, one)
    with pytest.raises(NoSuchBuffer):
        world.registry.held(buffer.id, one)
    for _ in range(2):
        world.registry.release(buffer, two)
    assert not world.ended
    world.registry.release(buffer, two)
    assert world.ended == [buffer]
    with pytest.raises(NoSuchBuffer):
        world.registry.share(buffer, one)


def test_the_charge_passes_to_the_same_user_first_and_then_to_the_earliest_holder(world: World) -> None:
    creator = world.holder(CAMERA)
    buffer = world.backed(creator)
    eve, bob, player, camera = (world.holder(owner) for owner in (EVE, BOB, PLAYER, CAMERA))
    for holder in (eve, bob, player, camera):
        world.registry.share(buffer, holder)
    payers = []
    for holder in (creator, camera, player, eve, bob):
        payers.append(buffer.payer)
        assert world.charged(buffer.payer)[0] == PAGE_SIZE
        assert world.ledger.total(Resource.BYTES) == PAGE_SIZE
        world.registry.drop(holder)
    assert payers == [CAMERA, CAMERA, PLAYER, EVE, BOB]
    # The last to pay goes on until the end.
    assert buffer.payer == BOB


def test_who_shares_anew_is_no_earlier_holder(world: World) -> None:
    creator, bob, eve = world.holder(CAMERA), world.holder(BOB), world.holder(EVE)
    buffer = world.backed(creator)
    world.registry.share(buffer, bob)
    world.registry.share(buffer, eve)
    world.registry.release(buffer, bob)
    world.registry.share(buffer, bob)
    world.registry.drop(creator)
    assert buffer.payer == EVE
    assert world.charged(CAMERA) == (0, 0, 0)


def test_a_share_that_a_quota_forbids_leaves_nothing(world: World) -> None:
    bob = world.holder(BOB)
    for _ in range(3):
        world.registry.create(REQUEST, bob)
    buffer = world.backed(world.holder(CAMERA))
    with pytest.raises(QuotaExceeded, match="max_buffers_per_user of 3; 3 are held"):
        world.registry.share(buffer, bob)
    assert world.charged(BOB) == (0, 3, 3)
    assert bob not in buffer.shares
    others = [world.holder(EVE) for _ in range(4)]
    for other in others:
        world.registry.share(buffer, other)
    with pytest.raises(QuotaExceeded, match="max_shares_per_user of 4; there are 4"):
        world.registry.share(buffer, world.holder(EVE))
    # One more share of a connection that has one costs nothing.
    world.registry.share(buffer, others[0])
    assert world.charged(EVE) == (0, 1, 4)


def test_all_users_together_have_a_limit(world: World) -> None:
    for owner in (CAMERA, CAMERA, BOB, BOB, EVE):
        world.registry.create(REQUEST, world.holder(owner))
    with pytest.raises(QuotaExceeded, match="has 5 buffers of all users, its limit max_buffers"):
        world.registry.create(REQUEST, world.holder(EVE))
    assert world.charged(EVE) == (0, 1, 1)


def test_a_connection_that_has_ended_gets_nothing(world: World) -> None:
    gone, bob = world.holder(CAMERA), world.holder(BOB)
    world.registry.drop(gone)
    with pytest.raises(NoSuchBuffer):
        world.registry.create(REQUEST, gone)
    buffer = world.registry.create(REQUEST, bob)
    with pytest.raises(NoSuchBuffer):
        world.registry.share(buffer, gone)
    assert world.charged(CAMERA) == (0, 0, 0)
    assert [b.id for b in world.registry] == [buffer.id]


def test_who_sees_a_buffer(world: World) -> None:
    creator, bob = world.holder(CAMERA), world.holder(BOB)
    first, second = world.registry.create(REQUEST, creator), world.registry.create(REQUEST, creator)
    world.registry.share(second, bob)
    assert world.registry.visible_to(CAMERA) == [first, second]
    assert world.registry.visible_to(BOB) == [second]
    assert world.registry.visible_to(PLAYER) == []
    assert world.registry.visible_to(None) == [first, second]


def test_a_file_and_a_ticket_lead_to_their_buffer(world: World) -> None:
    buffer = world.backed(world.holder(CAMERA))
    assert buffer.memory is not None
    assert world.registry.files.find(buffer.memory.device, buffer.memory.inode) is buffer
    assert world.registry.by_ticket(buffer.ticket) is buffer
    major, minor = buffer.memory.device
    for device, inode in (((major, minor + 1), buffer.memory.inode), ((major, minor), buffer.memory.inode + 1)):
        with pytest.raises(NoSuchBuffer):
            world.registry.files.find(device, inode)
    (holder,) = buffer.shares
    world.registry.release(buffer, holder)
    with pytest.raises(NoSuchBuffer):
        world.registry.files.find((major, minor), buffer.memory.inode)
    with pytest.raises(NoSuchBuffer):
        world.registry.by_ticket(buffer.ticket)


def test_a_call_that_is_repeated_after_a_restart_has_its_share_already(world: World) -> None:
    holder, other = world.holder(CAMERA), world.holder(CAMERA)
    buffer = world.registry.create(REQUEST, holder, recorded=True)
    buffer.unanswered.add(holder)
    world.registry.share(buffer, holder, repeated=True)
    assert buffer.shares[holder] == 1
    # Once, and nobody else.
    world.registry.share(buffer, holder, repeated=True)
    world.registry.share(buffer, other, repeated=True)
    assert (buffer.shares[holder], buffer.shares[other]) == (2, 1)
    buffer.unanswered.add(other)
    world.registry.drop(other)
    assert other not in buffer.unanswered


GPU, CAMERA_DEVICE = (Wish(name, f"/sys/devices/{name}", NONE) for name in ("gpu", "camera"))


def attached(world: World, owner: Owner) -> int:
    return world.ledger.account(owner).amounts[Resource.ATTACHMENTS]


def test_a_buffer_comes_with_all_its_attachments_or_not_at_all(world: World) -> None:
    holder, registry = world.holder(CAMERA), world.registry
    buffer = registry.create(REQUEST, holder, wishes=[GPU, CAMERA_DEVICE], recorded=True)
    assert [(a.number, a.wish) for a in buffer.attachments.values()] == [(1, GPU), (2, CAMERA_DEVICE)]
    with pytest.raises(QuotaExceeded, match="max_attachments_per_user of 3"):
        registry.create(REQUEST, holder, wishes=[GPU, GPU], recorded=True)
    # A buffer or a share too many, or a connection that has ended, leaves no attachment either.
    registry.create(REQUEST, holder)
    registry.create(REQUEST, holder)
    with pytest.raises(QuotaExceeded, match="max_buffers_per_user"):
        registry.create(REQUEST, holder, wishes=[GPU])
    gone = world.holder(BOB)
    registry.drop(gone)
    with pytest.raises(NoSuchBuffer):
        registry.create(REQUEST, gone, wishes=[GPU])
    assert (attached(world, CAMERA), attached(world, BOB)) == (2, 0)
    assert registry.attachments.at(GPU.path) == [(buffer, buffer.attachments[1])]
    assert (len(registry), world.charged(BOB)) == (3, (0, 0, 0))


def test_several_are_attached_together_or_none(world: World) -> None:
    holder, stranger = world.holder(CAMERA), world.holder(CAMERA)
    buffer = world.backed(holder)
    with pytest.raises(QuotaExceeded):
        world.registry.attach(buffer, holder, [GPU] * 4)
    with pytest.raises(NoSuchBuffer):
        world.registry.attach(buffer, stranger, [GPU])
    assert (buffer.attachments, buffer.attached, attached(world, CAMERA)) == ({}, 0, 0)
    first, second = world.registry.attach(buffer, holder, [GPU, CAMERA_DEVICE])
    assert (first.number, second.number, buffer.attached) == (1, 2, 2)
    assert set(world.registry.attachments) == {GPU.path, CAMERA_DEVICE.path}
    world.registry.detach(buffer, first)
    assert set(world.registry.attachments) == {CAMERA_DEVICE.path}
    assert world.registry.attachments.at(GPU.path) == []
