# SPDX-License-Identifier: MIT
"""core.attaching: what a call may cost the service and the one who pays, and what it leaves behind when it fails."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit import attached
from tests.unit.attached import NV12, PICTURE, Play, charged, everything, rows
from tests.unit.devices import path_of
from tests.unit.machine import clients_memfd
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, World
from tests.unit.time_loop import at_rest
from udmabufd.core import attachments
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import AllocatorError, InvalidSpec, NoSuchDevice, OutOfMemory, QuotaExceeded
from udmabufd.core.limits import Limits
from udmabufd.core.placement import GROWTH
from udmabufd.core.spec import PAGE_SIZE
from udmabufd_client.contract import MAX_ATTACHMENTS


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some devices, perhaps with other limits."""
    return lambda scene, limits=None: attached.play(scene, monkeypatch, limits)


# ---- what is decided ------------------------------------------------------------------------------------------------


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Note each call of `owner`'s function `name` in the list returned."""
    function, calls = getattr(owner, name), []

    def noting(*args: Any, **keywords: Any) -> Any:
        calls.append(name)
        return function(*args, **keywords)

    patch.setattr(owner, name, noting)
    return calls


def other(world: World) -> Holder:
    """Return one more connection of ALICE's application, which has its request_ids."""
    return world.life.holder(":1.7", 1000, "camera")


@pytest.mark.parametrize("backed", [False, True])
def test_a_call_is_decided_once_however_many_devices_it_has(
    play: Play, monkeypatch: pytest.MonkeyPatch, backed: bool
) -> None:
    async def scene(world: World) -> None:
        devices = ["plain", "gpu"] * (MAX_ATTACHMENTS // 4)
        spec = {"size": SIZE, "devices": devices, "request_id": ID}
        service, placement = world.life.service, world.life.service.placement
        selected = counted(monkeypatch, world.life.pool, "select")
        judged = counted(monkeypatch, placement, "unsuitable")
        reconsidered = counted(monkeypatch, attachments, "reconsider")
        buffer = await service.create(world.holder(ALICE), spec)
        assert (len(selected), len(reconsidered)) == (1, 1)
        if backed:
            (await service.get_fd(world.holder(ALICE), buffer.id)).fd.close()
        for calls in (selected, judged, reconsidered):
            calls.clear()
        assert await service.create(other(world), spec) is buffer
        assert (len(selected), len(judged), len(reconsidered)) == (not backed, backed, 1)
        assert len(buffer.attachments) == MAX_ATTACHMENTS
        reconsidered.clear()
        service.drop(other(world))
        assert (len(buffer.attachments), len(reconsidered)) == (len(devices), 1)
        # Of one that has attached nothing there is nothing to think over.
        await service.import_ticket(world.holder(BOB), buffer.ticket)
        service.drop(world.holder(BOB))
        assert len(reconsidered) == 1

    play(scene)


def test_what_is_too_many_is_counted_before_anything_is_decided(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        spec = {"size": SIZE, "devices": ["plain"] * (MAX_ATTACHMENTS // 2 + 1), "request_id": ID}
        service = world.life.service
        buffer = await service.create(world.holder(ALICE), spec)
        before = everything(world)
        selected = counted(monkeypatch, world.life.pool, "select")
        merged = counted(monkeypatch, type(buffer.request), "under")
        with pytest.raises(QuotaExceeded, match="at most 64 attachments; there are 33, and 33 more are wanted"):
            await service.create(other(world), spec)
        # Of the spec alone, as it is read.
        assert (selected, merged) == ([], ["under"])
        assert everything(world) == before

    play(scene)


def test_the_device_that_does_not_suit_is_named_though_all_are_judged_at_once(play: Play) -> None:
    async def scene(world: World) -> None:
        spec = {"size": SIZE, "devices": ["plain", "gpu", "camera", "plain"], "request_id": ID}
        buffer = await world.life.service.create(world.holder(ALICE), spec)
        for number in (1, 2, 3, 4):
            await world.detach(buffer, number)
        (await world.life.service.get_fd(world.holder(ALICE), buffer.id)).fd.close()
        with pytest.raises(
            AllocatorError, match="^tail_padding: the buffer has .* without camera; and it cannot move: "
        ):
            await world.life.service.create(world.holder(ALICE), spec)
        assert rows(buffer) == []

    play(scene)


# ---- who pays -------------------------------------------------------------------------------------------------------

ROOM = SIZE + GROWTH
"""Bytes by which others may enlarge a buffer of SIZE."""


async def shared(world: World, **spec: Any) -> Buffer:
    """Return a buffer of ALICE's without memory that BOB, another user, holds, too."""
    buffer = await world.create(**spec)
    await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
    return buffer


def test_another_user_cannot_enlarge_a_buffer_at_its_creators_cost(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await shared(world)
        before = everything(world)
        demands: list[dict[str, Any]] = [
            {"tail_padding": 512 << 20},
            {"tail_padding": ROOM + 1},
            {"size_alignment": 1 << 40},
            {"size_alignment": SIZE + ROOM + PAGE_SIZE},
        ]
        for constraints in demands:
            with pytest.raises(QuotaExceeded, match=f"^size: .* of {SIZE} bytes {SIZE + ROOM} bytes large"):
                await world.attach(buffer, "plain", BOB, **constraints)
            assert everything(world) == before
        (await world.life.service.get_fd(world.holder(BOB), buffer.id)).fd.close()
        assert world.books()[ALICE][0] == buffer.size == SIZE

    play(scene)


def test_rows_and_heights_that_another_users_device_needs_are_growth_too(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await shared(world, **NV12)
        limit = 2 * PICTURE + GROWTH
        await world.attach(buffer, "plain", BOB, stride_alignment=4096)
        assert buffer.size == 2 * PICTURE
        with pytest.raises(QuotaExceeded, match=f"{PICTURE} bytes {limit} bytes large, .* make it {4 * PICTURE}$"):
            await world.attach(buffer, "plain", BOB, stride_alignment=8192)
        with pytest.raises(QuotaExceeded, match="^size: "):
            await world.attach(buffer, "plain", BOB, height_alignment=4096)

    play(scene)


def test_there_is_room_for_what_devices_need(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await shared(world)
        await world.attach(buffer, "plain", BOB, tail_padding=ROOM - PAGE_SIZE)
        # What several of them demand comes together.
        await world.attach(buffer, "plain", BOB, size_alignment=PAGE_SIZE)
        with pytest.raises(QuotaExceeded, match="^size: "):
            await world.attach(buffer, "plain", BOB, size_alignment=SIZE + ROOM - PAGE_SIZE + 1 << 1)
        await world.attach(buffer, "plain", BOB, tail_padding=ROOM)
        assert buffer.size == SIZE + ROOM
        with pytest.raises(QuotaExceeded, match="^size: "):
            await world.attach(buffer, "plain", BOB, tail_padding=ROOM + 1)

    play(scene)


def test_who_pays_may_demand_what_it_likes_and_so_may_its_users_other_applications(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await shared(world)
        await world.life.service.import_ticket(world.holder(EVE), buffer.ticket)
        await world.attach(buffer, "plain", EVE, tail_padding=4 * ROOM)
        assert buffer.size == SIZE + 4 * ROOM
        # Twice that, and more, is another's to demand now; and no longer once it is not demanded any more.
        attachment = await world.attach(buffer, "plain", BOB, tail_padding=8 * ROOM)
        await world.detach(buffer, attachment.number, BOB)
        await world.detach(buffer, 1, EVE)
        with pytest.raises(QuotaExceeded, match="^size: "):
            await world.attach(buffer, "plain", BOB, tail_padding=8 * ROOM)
        # Whom the charge has passed on to pays for its own.
        await world.life.service.release(world.holder(ALICE), buffer.id)
        await world.life.service.release(world.holder(EVE), buffer.id)
        assert buffer.payer == world.holder(BOB).owner
        await world.attach(buffer, "plain", BOB, tail_padding=8 * ROOM)
        (await world.life.service.get_fd(world.holder(BOB), buffer.id)).fd.close()
        assert (world.books()[BOB][0], ALICE in world.books()) == (SIZE + 8 * ROOM, False)

    play(scene)


# ---- calls that are repeated ----------------------------------------------------------------------------------------


Ask = Callable[[World, Holder], Any]


async def _create(world: World, holder: Holder) -> Buffer:
    return await world.life.service.create(holder, {"size": SIZE, "devices": ["gpu", "plain"], "request_id": ID})


async def _allocate(world: World, holder: Holder) -> Buffer:
    spec = {"size": SIZE, "devices": ["gpu", "plain"], "request_id": ID}
    (grant,) = await world.life.service.allocate(holder, spec)
    grant.fd.close()
    return grant.buffer


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("ask", [_create, _allocate])
def test_what_was_made_is_there_though_a_device_of_it_has_gone(play: Play, ask: Ask, restarted: bool) -> None:
    async def scene(world: World) -> None:
        buffer = await ask(world, world.holder(ALICE))
        world.unplug("gpu")
        if restarted:
            await world.again()
            buffer = world.buffer(buffer.id)
        assert await ask(world, world.holder(ALICE)) is buffer
        assert rows(buffer) == [(2, ALICE, "plain")]
        assert await ask(world, other(world)) is buffer
        assert rows(buffer) == [(2, ALICE, "plain"), (3, ":1.7", "plain")]
        assert charged(world) == 2
        # Once it is back, who asks has it again; who asks for something new needs it all the time.
        with pytest.raises(NoSuchDevice):
            await world.life.service.create(other(world), {"size": SIZE, "devices": ["gpu"], "request_id": ID + "x"})
        world.machine.devices.come("gpu", alignment=64)
        await ask(world, other(world))
        assert rows(buffer)[2:] == [(4, ":1.7", "gpu")]

    play(scene)


def test_what_was_wrapped_is_there_though_its_device_has_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        service, alice = world.life.service, world.holder(ALICE)
        options = {"devices": ["plain"], "request_id": ID}
        with clients_memfd(SIZE) as brought:
            buffer = await service.wrap(alice, [brought], [(0, 0, SIZE)], options)
            world.unplug("plain")
            assert await service.wrap(alice, [brought], [(0, 0, SIZE)], options) is buffer
            assert rows(buffer) == []
            with pytest.raises(NoSuchDevice):
                await service.wrap(alice, [brought], [(0, 0, SIZE)], {"devices": ["plain"]})

    play(scene)


def test_another_spec_is_refused_though_its_device_has_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.create(devices=["plain"], request_id=ID)
        world.machine.devices.go("gpu")
        before = everything(world)
        with pytest.raises(InvalidSpec, match="^request_id: "):
            await world.create(devices=["gpu"], request_id=ID)
        assert everything(world) == before

    play(scene)


@pytest.mark.parametrize(
    ("first", "same", "others"),
    [
        (
            {"cache": ["cached", "uncached"]},
            [{"cache": ["uncached", "cached"]}, {"cache": ["cached", "uncached", "cached"]}],
            [{"cache": ["cached"]}, {}],
        ),
        (
            {"allocators": ["udmabuf", "heap:*"], "alignment": 64},
            [{"alignment": 64, "allocators": ["heap:*", "udmabuf"]}],
            [{"allocators": ["udmabuf"], "alignment": 64}, {"allocators": ["udmabuf", "heap:*"], "alignment": 128}],
        ),
    ],
)
def test_a_set_is_the_same_in_any_order(
    play: Play, first: dict[str, Any], same: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(constraints=first, request_id=ID)
        for _ in range(2):
            for constraints in (first, *same):
                assert await world.create(constraints=constraints, request_id=ID) is buffer
            for constraints in others:
                with pytest.raises(InvalidSpec, match="^request_id: "):
                    await world.create(constraints=constraints, request_id=ID)
            await world.again()
            buffer = world.buffer(buffer.id)

    play(scene)


# ---- whose end is told ----------------------------------------------------------------------------------------------


def watched(world: World) -> set[str]:
    """Return the devices whose end the service wants to be told, and check that they are those of attachments."""
    paths = set(world.machine.devices.watched)
    assert paths == set(world.life.custody.registry.attachments)
    return {path.rpartition("/")[2] for path in paths}


def test_a_device_is_followed_as_long_as_anything_is_attached_to_it(play: Play) -> None:
    async def scene(world: World) -> None:
        service = world.life.service
        one, two = await shared(world, devices=["plain", "plain"]), await world.create(BOB, devices=["gpu"])
        await world.attach(one, "gpu", BOB)
        assert watched(world) == {"plain", "gpu"}
        await world.detach(one, 1)
        assert watched(world) == {"plain", "gpu"}
        await world.detach(one, 2)
        assert watched(world) == {"gpu"}
        # By the end of a share, and of a connection.
        await service.release(world.holder(BOB), one.id)
        assert watched(world) == {"gpu"}
        service.drop(world.holder(BOB))
        assert watched(world) == set()
        assert two not in world.life.custody.registry
        await world.attach(one, "camera")
        await world.again(without=ALICE)
        assert watched(world) == set()

    play(scene)


def test_a_device_that_went_is_not_followed(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.create(devices=["plain", "gpu", "plain"])
        world.unplug("plain")
        assert watched(world) == {"gpu"}

    play(scene)


@pytest.mark.parametrize("already", [False, True], ids=["alone", "attached already"])
def test_a_refused_attach_leaves_nobody_followed(play: Play, monkeypatch: pytest.MonkeyPatch, already: bool) -> None:
    """Refused after the end of the device was asked to be told."""

    async def scene(world: World) -> None:
        if already:
            await world.create(BOB, devices=["plain"])
        expected = {"plain"} if already else set()
        buffer = await world.create(**NV12)
        limit = world.machine.limits.max_attachments_per_user
        devices = world.machine.devices

        def full(*_: object) -> None:
            raise OutOfMemory("none for records")

        for make in (
            lambda: world.create(devices=["plain"] * (limit + 1)),
            lambda: world.allocate(ALICE, devices=["plain"] * (limit + 1)),
        ):
            with pytest.raises(QuotaExceeded, match="max_attachments_per_user"):
                await make()
            assert watched(world) == expected
        # The one before it was found, and is followed by then.
        devices.while_found = lambda name: void(devices.go(name)) if name == "gpu" else None
        for attach in (lambda: world.create(devices=["plain", "gpu"]), lambda: world.attach(buffer, "gpu")):
            devices.come("gpu")
            with pytest.raises(NoSuchDevice):
                await attach()
            assert watched(world) == expected
        devices.while_found = void
        world.machine.store_errors.append(OSError(errno.EBADF, ""))
        with pytest.raises(AllocatorError):
            await world.allocate(devices=["plain"])
        assert watched(world) == expected
        monkeypatch.setattr(world.life.custody.registry.recorder, "reserve", full)
        for attach in (lambda: world.create(devices=["plain"]), lambda: world.attach(buffer, "plain")):
            with pytest.raises(OutOfMemory):
                await attach()
        assert watched(world) == expected

    play(scene, Limits(max_attachments_per_user=3))


def void(_: object) -> None:
    """Do nothing."""


def test_who_detaches_while_the_service_starts_leaves_nobody_followed(play: Play) -> None:
    """The device is just being looked for, to be followed from now on."""

    async def scene(world: World) -> None:
        buffer = await world.create(devices=["plain", "gpu"])
        world.machine.devices.watched.clear()

        def found(name: str) -> None:
            if name == path_of("plain"):
                world.life.custody.registry.detach(buffer, buffer.attachments[1])

        world.machine.devices.while_found = found
        await world.life.service.attaching.resume()
        await at_rest()
        assert rows(buffer) == [(2, ALICE, "gpu")]
        assert watched(world) == {"gpu"}

    play(scene)
