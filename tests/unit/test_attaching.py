# SPDX-License-Identifier: MIT
"""core.attaching and core.attachments: who has attached what, what that demands and costs, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit import attached, scenes
from tests.unit.attached import NV12, PICTURE, Play, charged, everything, recorded, rows
from tests.unit.devices import path_of
from tests.unit.heaps import MadeUpAllocator
from tests.unit.machine import clients_memfd
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, World
from tests.unit.time_loop import at_rest
from udmabufd.core import attaching
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer
from udmabufd.core.constraints import Constraints
from udmabufd.core.errors import (
    AllocatorError,
    Busy,
    IncompatibleConstraints,
    InvalidSpec,
    NoAllocator,
    NoSuchBuffer,
    NoSuchDevice,
    NotSupported,
    QuotaExceeded,
)
from udmabufd.core.events import Event
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Accounting
from udmabufd.core.registry import ATTACHMENT_PROPERTIES
from udmabufd.core.spec import PAGE_SIZE
from udmabufd_client.contract import MAX_ATTACHMENTS, State

HELD = r"attachment 1 \(other\) is not dynamic$"
LOOSE = "a connection has a descriptor and no dynamic attachment that would answer for it: "
"""Why a buffer stays where it is."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some devices, perhaps with other limits."""
    return lambda scene, limits=None: attached.play(scene, monkeypatch, limits)


# ---- attach and detach ----------------------------------------------------------------------------------------------


def test_what_is_attached_decides_what_memory_there_will_be(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(**NV12)
        assert (buffer.size, buffer.request.size_requested) == (PICTURE, PICTURE)
        first = await world.attach(buffer, "camera")
        assert (first.number, first.pins, first.wish.dynamic) == (1, 0, False)
        assert buffer.request.merged.constraints == Constraints(tail_padding=PAGE_SIZE)
        assert buffer.size == PICTURE + PAGE_SIZE
        second = await world.attach(buffer, "gpu", dynamic=True)
        assert (second.number, second.wish.dynamic) == (2, True)
        # Rows of 4096 bytes.
        assert buffer.size == 2 * PICTURE + PAGE_SIZE
        assert buffer.request.merged.by == {"alignment": "gpu", "tail_padding": "camera", "stride_alignment": "gpu"}
        assert (buffer.state, buffer.charged, charged(world)) == (State.EMPTY, 0, 2)
        assert buffer.request.size_requested == PICTURE
        grant = await world.life.service.get_fd(world.holder(ALICE), buffer.id)
        grant.fd.close()
        assert buffer.charged == buffer.memory.size == 2 * PICTURE + PAGE_SIZE  # type: ignore[union-attr]
        await world.detach(buffer, 2)
        # The memory stays as it is.
        assert (buffer.size, buffer.charged) == (2 * PICTURE + PAGE_SIZE,) * 2
        assert buffer.request.layout is not None
        assert buffer.request.layout.strides == (4096, 4096)
        assert buffer.request.merged.constraints == Constraints(tail_padding=PAGE_SIZE)

    play(scene)


def test_what_the_caller_says_of_a_device_is_added(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(constraints={"size_alignment": 3 * PAGE_SIZE})
        attachment = await world.attach(buffer, "gpu", alignment=256, max_segments=7)
        assert attachment.wish.constraints == Constraints(alignment=256, stride_alignment=4096, max_segments=7)
        assert buffer.request.merged.by["size_alignment"] == "spec"
        assert buffer.size == 3 * PAGE_SIZE
        await world.detach(buffer, 1)
        assert buffer.request.merged.constraints == Constraints(size_alignment=3 * PAGE_SIZE)

    play(scene)


def test_a_buffer_that_nothing_is_attached_to_is_as_if_nothing_had_been(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(**NV12)
        before = buffer.request
        for device in ("camera", "gpu", "codec", "plain"):
            await world.attach(buffer, device)
        assert buffer.request != before
        for number in (3, 1, 4, 2):
            await world.detach(buffer, number)
        assert buffer.request == before
        assert (charged(world), rows(buffer)) == (0, [])
        assert list(world.life.custody.registry.attachments) == []

    play(scene)


def test_numbers_are_never_used_again(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create()
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        for number in (1, 2):
            assert (await world.attach(buffer, "plain")).number == number
        await world.detach(buffer, 2)
        assert (await world.attach(buffer, "plain", BOB)).number == 3
        await world.detach(buffer, 3, BOB)
        await world.detach(buffer, 1)
        # Whoever comes back later has others, after a restart, too, when all of them are gone.
        for number in (4, 5):
            await world.again()
            buffer = world.buffer(buffer.id)
            assert (await world.attach(buffer, "plain")).number == number
            await world.detach(buffer, number)
        # Of another buffer they are others.
        assert (await world.attach(await world.create(), "plain")).number == 1

    play(scene)


def test_an_attachment_is_the_connections_that_attached(play: Play) -> None:
    async def scene(world: World) -> None:
        service = world.life.service
        buffer = await world.create()
        await service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.attach(buffer, "camera")
        await world.attach(buffer, "gpu", BOB)
        for client, number in ((ALICE, 2), (BOB, 1), (ALICE, 3), (ALICE, 0)):
            before = everything(world)
            with pytest.raises(InvalidSpec, match=f"^attachment: this connection has no attachment {number}"):
                await world.detach(buffer, number, client)
            with pytest.raises(InvalidSpec, match=f"^attachment: this connection has no attachment {number}"):
                await service.get_fd(world.holder(client), buffer.id, number)
            assert everything(world) == before
        # The refused GetFd has made no memory; the right one does.
        assert buffer.state is State.EMPTY
        with pytest.raises(NoSuchBuffer):
            await world.attach(buffer, "camera", EVE)
        with pytest.raises(NoSuchBuffer):
            await world.detach(buffer, 1, EVE)
        (await service.get_fd(world.holder(BOB), buffer.id, 2)).fd.close()
        (await service.get_fd(world.holder(ALICE), buffer.id, 1)).fd.close()
        (await service.get_fd(world.holder(ALICE), buffer.id)).fd.close()
        await world.detach(buffer, 1)
        with pytest.raises(InvalidSpec, match="^attachment: "):
            await service.get_fd(world.holder(ALICE), buffer.id, 1)

    play(scene)


def test_holders_are_told(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, other = await world.create(), await world.create()
        told = world.told()
        await world.attach(buffer, "camera")
        await world.attach(buffer, "gpu")
        await world.attach(other, "camera")
        assert told == [(b.id, ATTACHMENT_PROPERTIES) for b in (buffer, buffer, other)]
        told.clear()
        await world.detach(buffer, 1)
        assert told == [(buffer.id, ("Attachments", "Constraints", "Size"))]
        told.clear()
        with pytest.raises(AllocatorError):
            await world.attach(buffer, "nothing")
        assert told == []
        # Those of who leaves end with it, and the rest is told.
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.attach(buffer, "camera", BOB)
        told.clear()
        world.life.service.drop(world.holder(BOB))
        assert told == [(buffer.id, ATTACHMENT_PROPERTIES)]
        told.clear()
        world.unplug("camera")
        assert told == [(other.id, ATTACHMENT_PROPERTIES)]

    play(scene)


def test_a_buffer_has_at_most_64(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create()
        for number in range(MAX_ATTACHMENTS):
            assert (await world.attach(buffer, "plain")).number == number + 1
        before = everything(world)
        with pytest.raises(QuotaExceeded, match="at most 64 attachments; there are 64, and 1 more"):
            await world.attach(buffer, "plain")
        assert everything(world) == before
        await world.detach(buffer, 7)
        assert (await world.attach(buffer, "plain")).number == MAX_ATTACHMENTS + 1
        await world.again()
        with pytest.raises(QuotaExceeded, match="at most 64"):
            await world.attach(world.buffer(buffer.id), "plain")
        full = await world.create(devices=["plain"] * MAX_ATTACHMENTS)
        assert len(full.attachments) == MAX_ATTACHMENTS
        before = everything(world)
        with pytest.raises(InvalidSpec, match="^devices: names 65 devices"):
            await world.create(devices=["plain"] * (MAX_ATTACHMENTS + 1))
        assert everything(world) == before

    play(scene)


def test_a_user_has_a_limit_of_all_its_buffers(play: Play) -> None:
    async def scene(world: World) -> None:
        one = await world.create(devices=["plain", "camera"])
        two = await world.create(EVE)
        await world.attach(two, "plain", EVE)
        # Applications of a user count together.
        before = everything(world)
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user of 3; there are 3"):
            await world.attach(one, "gpu")
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user"):
            await world.create(EVE, devices=["plain"])
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user"):
            await world.allocate(ALICE, devices=["plain"])
        assert everything(world) == before
        (await world.allocate(BOB, devices=["plain"] * 3))[1].close()
        await world.detach(one, 2)
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user of 3"):
            # All of a call's or none.
            await world.create(EVE, devices=["plain", "plain"])
        assert (charged(world), charged(world, EVE), charged(world, BOB)) == (1, 1, 3)
        await world.attach(one, "gpu")
        # A limit that was lowered ends nothing.
        world.machine.limits = Limits(max_attachments_per_user=1)
        await world.again()
        assert (charged(world), charged(world, EVE), charged(world, BOB)) == (2, 1, 3)

    play(scene, Limits(max_attachments_per_user=3))


# ---- with the call that makes the buffer ----------------------------------------------------------------------------


def test_devices_of_a_spec_are_attached_in_their_order(play: Play) -> None:
    async def scene(world: World) -> None:
        devices = ["gpu", "camera", "gpu"]
        expected = [(1, ALICE, "gpu"), (2, ALICE, "camera"), (3, ALICE, "gpu")]
        created = await world.create(devices=devices, **NV12)
        allocated, fd = await world.allocate(devices=devices)
        many = await world.life.service.allocate(world.holder(ALICE), {"size": 1, "devices": devices}, 3)
        for buffer in (created, allocated, *(grant.buffer for grant in many)):
            assert rows(buffer) == expected
            assert not any(attachment.wish.dynamic for attachment in buffer.attachments.values())
        assert charged(world) == 15
        assert allocated.size == SIZE + PAGE_SIZE
        assert [grant.buffer.size for grant in many] == [2 * PAGE_SIZE] * 3
        assert (await world.attach(allocated, "plain")).number == 4
        fd.close()
        for grant in many:
            grant.fd.close()
        assert world.machine.devices.watched.count(path_of("gpu")) == 10

    play(scene)


@pytest.mark.parametrize("member", ["create", "allocate"])
def test_devices_that_cannot_be_had_make_nothing(play: Play, member: str) -> None:
    async def scene(world: World) -> None:
        devices = world.machine.devices
        devices.come("far", address_bits=20)
        devices.come("picky", allocators=["heap:none"])
        devices.come("other", allocators=["udmabuf"])
        devices.come("huge", tail_padding=1 << 62)
        before = everything(world)
        for spec, error, text in (
            ({"devices": ["plain", "nothing"]}, NoSuchDevice, "nothing"),
            ({"devices": ["plain", ""]}, InvalidSpec, "^devices: is empty"),
            ({"devices": ["picky", "other"]}, IncompatibleConstraints, "^allocators: .*picky.*other"),
            ({"devices": ["picky"]}, NoAllocator, "allocators: picky accepts only heap:none"),
            ({"devices": ["plain", "card"]}, NoAllocator, "contiguous: .* card"),
            ({"devices": ["plain"], "kind": "memfd"}, InvalidSpec, "^devices: contradicts kind memfd"),
            ({"devices": ["huge"] * 2, "constraints": {"size_alignment": 1 << 63}}, InvalidSpec, "^constraints: "),
        ):
            with pytest.raises(error, match=text):
                if member == "create":
                    await world.create(**spec)
                else:
                    await world.allocate(**spec)
            assert everything(world) == before, spec

    play(scene)


def test_a_device_that_goes_before_it_is_attached(play: Play) -> None:
    """Found, and gone by the time that it would be watched: nobody would tell of it any more."""

    async def scene(world: World) -> None:
        devices = world.machine.devices
        buffer = await world.create()

        def unplugged(name: str) -> None:
            if name == "camera":
                devices.go("camera")

        before = everything(world)
        for make in (
            lambda: world.create(devices=["plain", "camera"]),
            lambda: world.allocate(devices=["plain", "camera"]),
            lambda: world.attach(buffer, "camera"),
        ):
            devices.come("camera")
            devices.while_found = unplugged
            with pytest.raises(NoSuchDevice, match="camera is gone"):
                await make()
            devices.while_found = lambda _: None
            assert everything(world) == before

    play(scene)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_refused_attach_changes_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        devices = world.machine.devices
        devices.come("picky", allocators=["heap:none"])
        devices.come("other", allocators=["udmabuf"])
        empty = await world.create(devices=["other"])
        backed, fd = await world.allocate(devices=["other"])
        memfd = await world.create(kind="memfd")
        told = world.told()
        for buffer, device, constraints, error, text in (
            (empty, "nothing", {}, NoSuchDevice, "nothing"),
            (empty, "", {}, InvalidSpec, "^device: is empty"),
            (empty, "plain", {"alignment": 0}, InvalidSpec, r"^constraints\.alignment: "),
            (empty, "plain", {"contiguous": True}, NoAllocator, "contiguous: "),
            (empty, "picky", {}, IncompatibleConstraints, "^allocators: .*other.*picky"),
            (empty, "gpu", {"alignment": (1 << 64) - 1}, IncompatibleConstraints, "^alignment: .*gpu"),
            (empty, "plain", {"tail_padding": 1 << 63}, InvalidSpec, "^constraints: makes a buffer of"),
            (backed, "picky", {}, IncompatibleConstraints, "^allocators: .*other.*picky"),
            (
                backed,
                "camera",
                {},
                Busy,
                "^tail_padding: the buffer has .* without camera; and it cannot move: " + HELD,
            ),
            (
                backed,
                "card",
                {},
                Busy,
                "^contiguous: .*of udmabuf, which does not suit card: .*; and it cannot move: ",
            ),
            (memfd, "plain", {}, NotSupported, "kind memfd"),
        ):
            before, effects = everything(world), len(world.machine.effects)
            with pytest.raises(error, match=text):
                await world.attach(buffer, device, **constraints)
            assert everything(world) == before, (device, constraints)
            assert len(world.machine.effects) == effects
        assert told == []
        assert world.machine.devices.watched == [path_of("other")] * 2
        # And no number was spent.
        assert (await world.attach(empty, "plain")).number == 2
        fd.close()

    play(scene)


def test_a_buffer_that_ends_while_its_device_is_looked_up(play: Play) -> None:
    async def scene(world: World) -> None:
        devices, service = world.machine.devices, world.life.service
        buffer = await world.create()
        await service.import_ticket(world.holder(BOB), buffer.ticket)
        devices.while_found = lambda _: world.life.custody.registry.release(buffer, world.holder(ALICE))
        with pytest.raises(NoSuchBuffer):
            await world.attach(buffer, "plain")
        devices.while_found = lambda _: world.life.custody.registry.drop(world.holder(BOB))
        with pytest.raises(NoSuchBuffer):
            await world.attach(buffer, "plain", BOB)
        devices.while_found = lambda _: None
        assert (charged(world), charged(world, BOB), world.books()) == (0, 0, {})
        # Whoever holds nothing learns nothing of devices.
        asked = len(devices.asked)
        with pytest.raises(NoSuchBuffer):
            await world.attach(buffer, "plain")
        assert len(devices.asked) == asked

    play(scene)


class TestBacked:
    """A device that comes when there is memory: it suits, or moving it would be needed."""

    def test_scattered_memory(self, play: Play) -> None:
        async def scene(world: World) -> None:
            buffer, fd = await world.allocate(size=8 * PAGE_SIZE)
            suits: list[dict[str, Any]] = [
                {"max_segments": 8},
                {"max_segment_size": PAGE_SIZE},
                {"alignment": 512},
                {"size_alignment": 4 * PAGE_SIZE},
                {"cache": ["cached"]},
                {"allocators": ["udmabuf", "heap:*"]},
            ]
            for constraints in suits:
                await world.attach(buffer, "plain", **constraints)
            for number in range(1, 7):
                await world.detach(buffer, number)
            misfits: list[tuple[dict[str, Any], str]] = [
                ({"max_segments": 7}, "max_segments"),
                ({"contiguous": True}, "contiguous"),
                ({"alignment": 2 * PAGE_SIZE}, "alignment"),
                ({"address_bits": 12}, "address_bits"),
                ({"size_alignment": 3 * PAGE_SIZE}, "size_alignment"),
                ({"tail_padding": 1}, "tail_padding"),
                ({"cache": ["uncached"]}, "cache"),
                ({"allocators": ["heap:*"]}, "allocators"),
            ]
            for constraints, key in misfits:
                with pytest.raises(Busy, match=f"^{key}: the buffer has .*; and it cannot move: {LOOSE}"):
                    await world.attach(buffer, "plain", **constraints)
            assert rows(buffer) == []
            fd.close()

        play(scene)

    def test_contiguous_memory(self, play: Play) -> None:
        async def scene(world: World) -> None:
            MadeUpAllocator(world.life, "heap:cma", contiguous=True, size_step=1 << 20, accounting=Accounting.SYSTEM)
            buffer, fd = await world.allocate(devices=["card"])
            assert (buffer.size, buffer.charged) == (1 << 20, 1 << 20)
            await world.attach(buffer, "card")
            # There is room behind the picture.
            await world.attach(buffer, "camera")
            await world.attach(buffer, "plain", size_alignment=1 << 20)
            with pytest.raises(Busy, match="^size_alignment: "):
                await world.attach(buffer, "plain", size_alignment=1 << 21)
            with pytest.raises(
                Busy, match="^contiguous: .*heap:cma, which does not suit card: .*cut at the 4096 of plain"
            ):
                await world.attach(buffer, "plain", max_segment_size=PAGE_SIZE)
            # Of an allocator that is gone only so much is known as of any memory.
            world.life.pool.remove("heap:cma")
            with pytest.raises(Busy, match="^contiguous: "):
                await world.attach(buffer, "card")
            fd.close()

        play(scene)

    def test_pictures(self, play: Play) -> None:
        async def scene(world: World) -> None:
            buffer, fd = await world.allocate(size=1)
            fd.close()
            (grant,) = await world.life.service.allocate(world.holder(ALICE), {**NV12, "devices": ["codec"]})
            buffer = grant.buffer
            assert buffer.size == 2048 * (1088 + 544)
            await world.attach(buffer, "plain", stride_alignment=1024, height_alignment=8, max_stride=5000)
            misfits: list[tuple[dict[str, Any], str]] = [
                ({"stride_alignment": 4096, "max_stride": 1 << 20}, "stride_alignment"),
                ({"max_stride": 2047}, "max_stride"),
                ({"height_alignment": 128}, "height_alignment"),
            ]
            for constraints, key in misfits:
                with pytest.raises(Busy, match=f"^{key}: .*laid out without plain"):
                    await world.attach(buffer, "plain", **constraints)
            grant.fd.close()

        play(scene)

    def test_what_a_client_has_wrapped(self, play: Play) -> None:
        async def scene(world: World) -> None:
            service, alice = world.life.service, world.holder(ALICE)
            with clients_memfd(SIZE) as brought:
                ranges = [(0, 0, SIZE)]
                buffer = await service.wrap(alice, [brought], ranges, {"devices": ["plain"]})
                await world.attach(buffer, "gpu")
                with pytest.raises(Busy, match="^contiguous: .*wrapped"):
                    await world.attach(buffer, "card")
                before = everything(world)
                for options, text in (
                    ({"devices": ["card"]}, "^contiguous: .*caller's own cannot be chosen"),
                    ({"devices": ["camera"]}, f"^ranges: {SIZE} bytes are given, .* {SIZE + PAGE_SIZE}"),
                    ({"constraints": {"allocators": ["udmabuf"]}}, "^allocators: "),
                ):
                    with pytest.raises(NoAllocator, match=text):
                        await service.wrap(alice, [brought], ranges, options)
                assert everything(world) == before

        play(scene)


# ---- at the same time -----------------------------------------------------------------------------------------------


async def under_way(world: World, buffer: Buffer) -> tuple[asyncio.Event, asyncio.Task[Any]]:
    """Begin with the memory of `buffer`; return what lets it be made, and the call."""
    put, go = world.life.store.put, asyncio.Event()

    async def slow(*args: Any) -> None:
        await go.wait()
        await put(*args)

    world.life.store.put = slow  # type: ignore[method-assign,assignment]
    making = asyncio.create_task(world.life.service.get_fd(world.holder(ALICE), buffer.id))
    await at_rest()
    return go, making


def test_who_attaches_while_the_memory_is_made_waits_for_it(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(devices=["plain"])
        go, making = await under_way(world, buffer)
        misfit = asyncio.create_task(world.attach(buffer, "camera"))
        suits = asyncio.create_task(world.attach(buffer, "plain"))
        detaching = asyncio.create_task(world.detach(buffer, 1))
        await at_rest()
        assert rows(buffer) == [(1, ALICE, "plain")]
        go.set()
        (await making).fd.close()
        with pytest.raises(Busy, match="^tail_padding: "):
            await misfit
        await detaching
        assert rows(buffer) == [(2, ALICE, "plain")]
        assert (await suits).number == 2

    play(scene)


@pytest.mark.parametrize("end", ["device", "connection"])
def test_what_ends_while_the_memory_is_made_that_suits_it(play: Play, end: str) -> None:
    """Nobody can wait then. What is made has room for what is left."""

    async def scene(world: World) -> None:
        buffer = await world.create(**NV12, devices=["plain"])
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.attach(buffer, "gpu", BOB)
        go, making = await under_way(world, buffer)
        if end == "device":
            world.unplug("gpu")
        else:
            world.life.service.drop(world.holder(BOB))
        go.set()
        (await making).fd.close()
        assert rows(buffer) == [(1, ALICE, "plain")]
        assert buffer.memory is not None
        assert buffer.charged == buffer.memory.size == 2 * PICTURE
        assert buffer.request.misfit(buffer.memory.size, buffer.request.merged) is None
        before = scenes.facts(buffer)
        await world.again()
        assert scenes.facts(world.buffer(buffer.id)) == before

    play(scene)


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_attachments_end_with_the_last_share(play: Play) -> None:
    async def scene(world: World) -> None:
        service = world.life.service
        buffer, fd = await world.allocate(devices=["plain"])
        for _ in range(2):
            await service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.attach(buffer, "gpu", BOB)
        await world.attach(buffer, "gpu")
        await service.release(world.holder(BOB), buffer.id)
        assert (len(buffer.attachments), charged(world, BOB)) == (3, 1)
        await service.release(world.holder(BOB), buffer.id)
        assert (rows(buffer), charged(world, BOB)) == ([(1, ALICE, "plain"), (3, ALICE, "gpu")], 0)
        await service.import_ticket(world.holder(BOB), buffer.ticket)
        assert (await world.attach(buffer, "gpu", BOB)).number == 4
        service.drop(world.holder(ALICE))
        assert (rows(buffer), charged(world)) == ([(4, BOB, "gpu")], 0)
        service.drop(world.holder(BOB))
        # What lingers has nothing attached, and nor has what comes back from there.
        assert (buffer.state, rows(buffer)) == (State.LINGERING, [])
        assert recorded(world).attachments == []
        assert list(world.life.custody.registry.attachments) == []
        await service.import_fd(world.holder(EVE), fd)
        assert (await world.attach(buffer, "plain", EVE)).number == 5
        fd.close()

    play(scene)


def test_what_waits_for_a_repeated_call_has_nothing_attached(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(devices=["gpu"], request_id=ID)
        world.life.service.drop(world.holder(ALICE))
        world.life.holders.clear()
        assert (rows(buffer), charged(world)) == ([], 0)
        again, other = await world.allocate(devices=["gpu"], request_id=ID)
        assert (again, rows(again)) == (buffer, [(2, ALICE, "gpu")])
        fd.close()
        other.close()

    play(scene)


def test_attachments_end_with_their_device(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[Event, dict[str, Any]]] = []
    monkeypatch.setattr(attaching, "emit", lambda _, event, **fields: events.append((event, fields)))

    async def scene(world: World) -> None:
        service = world.life.service
        one, two = await world.create(**NV12, devices=["camera", "gpu"]), await world.create(devices=["gpu"])
        await service.import_ticket(world.holder(BOB), one.ticket)
        await world.attach(one, "gpu", BOB)
        # Another name for the same one.
        await world.attach(two, path_of("gpu"))
        told: list[tuple[str, str, int, str]] = []

        def detached(buffer: Buffer, attachment: Attachment, reason: str) -> None:
            assert attachment.number not in buffer.attachments
            told.append((attachment.holder.name, buffer.id, attachment.number, reason))

        service.attaching.detached = detached
        changed = world.told()
        service.attaching.gone(path_of("nothing"))
        assert (told, changed) == ([], [])
        world.unplug("gpu")
        assert told == [
            (ALICE, one.id, 2, "gpu is gone"),
            (ALICE, two.id, 1, "gpu is gone"),
            (BOB, one.id, 3, "gpu is gone"),
            (ALICE, two.id, 2, f"{path_of('gpu')} is gone"),
        ]
        assert changed == [(one.id, ATTACHMENT_PROPERTIES), (two.id, ATTACHMENT_PROPERTIES)]
        assert (rows(one), rows(two)) == ([(1, ALICE, "camera")], [])
        assert one.size == PICTURE + PAGE_SIZE
        assert (charged(world), charged(world, BOB)) == (1, 0)
        assert [a.device for a in (each.wish for each in recorded(world).attachments)] == ["camera"]
        service.attaching.gone(path_of("gpu"))
        assert len(told) == 4
        with pytest.raises(NoSuchDevice):
            await world.attach(one, "gpu")

    play(scene)
    # Once, however many there were.
    assert events == [(Event.DEVICE_GONE, {"device": "gpu", "count": 4})]
