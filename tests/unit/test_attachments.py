# SPDX-License-Identifier: MIT
"""core.attachments over restarts and kills, and with repeated calls; what a call does is in test_attaching.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.unit import attached
from tests.unit.attached import NV12, PICTURE, Play, charged, everything, recorded, rows
from tests.unit.devices import path_of
from tests.unit.machine import Killed
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, World, facts
from tests.unit.time_loop import at_rest
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import Busy, NoSuchDevice, QuotaExceeded
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.state import HALF, SLOT
from udmabufd_client.contract import BUS_GRACE, State


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some devices, perhaps with other limits."""
    return lambda scene, limits=None: attached.play(scene, monkeypatch, limits)


async def some(world: World) -> list[Buffer]:
    """Return an empty buffer, one with memory, and one of two connections, with attachments."""
    empty = await world.create(devices=["gpu", "camera"], **NV12)
    backed, fd = await world.allocate(ALICE, devices=["codec"], **NV12)
    fd.close()
    await world.attach(backed, "plain", dynamic=True)
    await world.detach(backed, 1)
    shared = await world.create(BOB, constraints={"size_alignment": 3 * PAGE_SIZE})
    await world.life.service.import_ticket(world.holder(ALICE), shared.ticket)
    await world.attach(shared, "camera", alignment=8)
    await world.attach(shared, "gpu", BOB)
    await world.detach(shared, 2, BOB)
    await world.attach(shared, "plain", BOB, max_segments=9)
    return [empty, backed, shared]


# ---- restarts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orderly", [False, True], ids=["killed", "stopped"])
def test_attachments_are_as_they_were(play: Play, orderly: bool) -> None:
    async def scene(world: World) -> None:
        await some(world)
        before = [facts(buffer) for buffer in world.life.custody.registry]
        amounts = [charged(world, client) for client in (ALICE, BOB, EVE)]
        assert amounts == [4, 1, 0]
        for _ in range(3):
            if orderly:
                await world.life.end()
            await world.again()
            registry = world.life.custody.registry
            # The request with what is merged is among the facts.
            assert [facts(buffer) for buffer in registry] == before
            assert [charged(world, client) for client in (ALICE, BOB, EVE)] == amounts
            paths = {path_of(name) for name in ("gpu", "camera", "plain")}
            assert set(registry.attachments) == paths == set(world.machine.devices.watched)
        empty, backed, shared = registry
        # And they go on: numbers, ends and demands.
        assert (await world.attach(backed, "plain")).number == 3
        assert (await world.attach(shared, "plain", BOB)).number == 4
        await world.detach(empty, 1)
        assert empty.size == PICTURE + PAGE_SIZE
        (await world.life.service.get_fd(world.holder(ALICE), empty.id, 2)).fd.close()
        world.life.service.drop(world.holder(BOB))
        assert rows(shared) == [(1, ALICE, "camera")]
        assert shared.request.merged.constraints.size_alignment == 3 * PAGE_SIZE

    play(scene)


def test_a_number_is_not_used_again_though_its_record_is_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        empty, (backed, fd) = await world.create(), await world.allocate()
        for buffer in (empty, backed):
            for number in (1, 2):
                await world.attach(buffer, "plain")
                await world.detach(buffer, number)
        assert recorded(world).attachments == []
        await world.again()
        for buffer in (empty, backed):
            assert (await world.attach(world.buffer(buffer.id), "plain")).number == 3
        fd.close()

    play(scene)


@pytest.mark.parametrize("backed", [False, True])
def test_a_number_is_not_used_again_though_its_holder_left_without_a_word(play: Play, backed: bool) -> None:
    """Nothing is written of the buffer then: its own record had told of the number before."""

    async def scene(world: World) -> None:
        if backed:
            buffer, fd = await world.allocate()
            fd.close()
        else:
            buffer = await world.create()
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        for _ in range(2):
            await world.attach(buffer, "plain", BOB)
        world.life.service.drop(world.holder(BOB))
        world.names.remove(BOB)
        await world.again()
        assert (await world.attach(world.buffer(buffer.id), "plain")).number == 3

    play(scene)


def test_a_number_that_a_kill_left_ahead_of_the_buffers_record(play: Play) -> None:
    """The attachment was recorded, and not yet that its number is given: who looks sees it all the same."""

    async def scene(world: World) -> None:
        buffer = await world.create()
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        world.machine.effects.clear()
        world.machine.kill_after = 2
        with pytest.raises(Killed):
            await world.attach(buffer, "plain")
        await world.again()
        assert rows(world.buffer(buffer.id)) == [(1, ALICE, "plain")]
        world.life.service.drop(world.holder(ALICE))
        world.names.remove(ALICE)
        await world.again()
        assert (await world.attach(world.buffer(buffer.id), "plain", BOB)).number == 2

    play(scene)


@pytest.mark.parametrize("spoiled", ["attachment", "buffer", "other"])
def test_what_can_be_recovered_of_a_damaged_state(play: Play, spoiled: str) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(devices=["plain", "gpu"])
        other, other_fd = await world.allocate(BOB, devices=["camera"])
        (first, *_) = buffer.attachments.values()
        slots = {"attachment": first.record and first.record[0], "buffer": buffer.slot, "other": other.slot}
        for half in (0, HALF):
            os.pwrite(world.state_fd(), b"\xff" * 64, (slots[spoiled] or 0) * SLOT + half)
        await world.again()
        custody, holders = world.life.custody, world.life.holders
        await custody.recover(False, world.machine.bus_id, world.names, 0, holders.get)
        holders |= {holder.name: holder for holder in custody.registry.holders()}
        found = {b.id: rows(b) for b in world.life.custody.registry}
        both = [(1, ALICE, "plain"), (2, ALICE, "gpu")]
        if spoiled == "attachment":
            assert found == {buffer.id: both[1:], other.id: [(1, BOB, "camera")]}
            assert (await world.attach(world.buffer(buffer.id), "plain")).number == 3
            await world.detach(world.buffer(buffer.id), 3)
        elif spoiled == "buffer":
            assert [each for each in found.values() if each] == [[(1, BOB, "camera")]]
        else:
            assert [each for each in found.values() if each] == [both]
        counts = [sum(row[1] == client for each in found.values() for row in each) for client in (ALICE, BOB)]
        assert [charged(world, client) for client in (ALICE, BOB)] == counts
        assert len(recorded(world).attachments) == sum(counts)
        fd.close()
        other_fd.close()

    play(scene)


def test_attachments_of_who_has_gone_meanwhile_are_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        *_, shared = await some(world)
        await world.again(without=ALICE)
        registry = world.life.custody.registry
        shared = world.buffer(shared.id)
        assert (rows(shared), charged(world), charged(world, BOB)) == ([(3, BOB, "plain")], 0, 1)
        assert [(a.holder, a.number) for a in recorded(world).attachments] == [(BOB, 3)]
        assert set(registry.attachments) == {path_of("plain")}

    play(scene)


def test_a_device_that_has_gone_meanwhile(play: Play) -> None:
    """Nobody saw it go. Of another device that has come to the same name this one is told apart by its path."""

    async def scene(world: World) -> None:
        empty, backed, shared = await some(world)
        devices = world.machine.devices
        await world.life.kill()
        devices.go("camera")
        devices.come("another", alignment=3)
        await world.begin()
        empty, backed, shared = (world.buffer(buffer.id) for buffer in (empty, backed, shared))
        assert rows(empty) == [(1, ALICE, "gpu")]
        assert empty.size == 2 * PICTURE
        assert rows(shared) == [(3, BOB, "plain")]
        assert (charged(world), charged(world, BOB)) == (2, 1)
        # What goes later is told.
        told: list[tuple[str, int]] = []
        world.life.service.attaching.detached = lambda b, a, _: told.append((b.id, a.number))
        world.unplug("plain")
        assert told == [(backed.id, 2), (shared.id, 3)]

    play(scene)


def test_the_holders_of_what_went_meanwhile_are_told_when_it_is_noticed(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create(devices=["camera", "plain"])
        told: list[tuple[str, int, str]] = []

        def detached(ended: Buffer, attachment: Attachment, reason: str) -> None:
            told.append((ended.id, attachment.number, reason))

        world.machine.devices.go("camera")
        world.life.service.attaching.detached = detached
        changed = world.told()
        # As at a start: this life has not been told of it.
        await world.life.service.attaching.resume()
        assert told == [(buffer.id, 1, "camera is gone")]
        assert [each for each, _ in changed] == [buffer.id]

    play(scene)


def test_another_bus_takes_all(play: Play) -> None:
    async def scene(world: World) -> None:
        empty, backed, shared = await some(world)
        await world.other_bus()
        for buffer in (empty, backed, shared):
            assert rows(world.buffer(buffer.id)) == []
        assert (charged(world), charged(world, BOB), recorded(world).attachments) == (0, 0, [])
        assert world.buffer(empty.id).size == PICTURE
        # Whoever comes back attaches anew.
        again = await world.life.service.import_ticket(world.holder(ALICE), shared.ticket)
        assert (await world.attach(again, "plain")).number == 4
        await asyncio.sleep(BUS_GRACE + LAST_LOOK)
        assert [buffer.id for buffer in world.life.custody.registry] == [shared.id]

    play(scene)


def test_an_attachment_without_a_share_is_void(play: Play) -> None:
    """Its holder gave the share back; the kill came before the attachment's end was recorded."""

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(devices=["plain", "gpu"])
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.attach(buffer, "camera" if buffer.memory is None else "plain", BOB)
        world.machine.effects.clear()
        # Two writes each: the share is erased, and not yet its attachments.
        world.machine.kill_after = 2
        with pytest.raises(Killed):
            world.life.service.drop(world.holder(ALICE))
        assert len(recorded(world).attachments) == 3
        await world.again()
        assert rows(world.buffer(buffer.id)) == [(3, BOB, "plain")]
        assert (charged(world), charged(world, BOB)) == (0, 1)
        assert [a.number for a in recorded(world).attachments] == [3]
        fd.close()

    play(scene)


def test_attachments_of_a_buffer_that_is_lost_are_void(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(devices=["plain"])
        assert world.stored == {buffer.stored_as}
        for stored in world.machine.stored.pop(buffer.stored_as):
            stored.close()
        await world.again()
        assert (charged(world), recorded(world).attachments, list(world.life.custody.registry)) == (0, [], [])
        fd.close()

    play(scene)


# ---- kills ----------------------------------------------------------------------------------------------------------


Act = Callable[[World, Buffer, Buffer], Awaitable[object]]


async def _attach(world: World, empty: Buffer, backed: Buffer) -> None:
    await world.attach(empty, "gpu")
    await world.attach(backed, "plain", dynamic=True)


async def _detach(world: World, empty: Buffer, backed: Buffer) -> None:
    await world.detach(empty, 1)
    await world.detach(backed, 1)


async def _create(world: World, empty: Buffer, backed: Buffer) -> None:
    await world.create(BOB, devices=["camera", "gpu"])


async def _allocate(world: World, empty: Buffer, backed: Buffer) -> None:
    grants = await world.life.service.allocate(world.holder(BOB), {"size": SIZE, "devices": ["camera", "plain"]}, 2)
    for grant in grants:
        grant.fd.close()


async def _get_fd(world: World, empty: Buffer, backed: Buffer) -> None:
    (await world.life.service.get_fd(world.holder(ALICE), empty.id)).fd.close()


async def _leave(world: World, empty: Buffer, backed: Buffer) -> None:
    world.life.service.drop(world.holder(ALICE))
    world.names.remove(ALICE)


async def _unplug(world: World, empty: Buffer, backed: Buffer) -> None:
    world.machine.devices.go("plain")
    world.life.service.attaching.gone(path_of("plain"))


@pytest.mark.parametrize("act", [_attach, _detach, _create, _allocate, _get_fd, _leave, _unplug])
def test_killed_between_any_two_steps(play: Play, act: Act) -> None:
    """Whoever holds a buffer has all that it attached or was given with it, under the numbers that it knows; charges,
    demands and records are those of what is there.
    """
    for number in range(1, 60):
        done: list[bool] = []

        async def scene(world: World, number: int = number, done: list[bool] = done) -> None:
            empty = await world.create(devices=["plain", "camera"])
            backed, fd = await world.allocate(devices=["plain", "plain"])
            await world.life.service.import_ticket(world.holder(EVE), backed.ticket)
            await world.attach(backed, "gpu", EVE)
            fd.close()
            before = {buffer.id: rows(buffer) for buffer in (empty, backed)}
            world.machine.effects.clear()
            world.machine.kill_after = number
            with contextlib.suppress(Killed):
                await act(world, empty, backed)
                done.append(True)
            if act is _leave and ALICE in world.names:
                world.names.remove(ALICE)
            await world.again()
            # What was handed to nobody, or is held by nobody any more, is freed.
            await asyncio.sleep(LAST_LOOK)
            check(world, before)
            for buffer in tuple(world.life.custody.registry):
                # Its number was given to nobody, or it is another.
                most = max([row[0] for row in rows(buffer)], default=0)
                holder = next(iter(buffer.shares)).name
                assert (await world.attach(buffer, "codec", holder)).number > most
            after = [facts(buffer) for buffer in world.life.custody.registry]
            await world.again()
            assert [facts(buffer) for buffer in world.life.custody.registry] == after

        def check(world: World, before: dict[str, list[tuple[int, str, str]]]) -> None:
            found = list(world.life.custody.registry)
            counts = dict.fromkeys((ALICE, BOB, EVE), 0)
            for buffer in found:
                assert buffer.state is not State.LINGERING
                for attachment in buffer.attachments.values():
                    counts[attachment.holder.name] += 1
                    assert attachment.holder in buffer.shares
                    assert attachment.number <= buffer.attached
                if buffer.id not in before:
                    assert [row[:2] for row in rows(buffer)] == [(1, BOB), (2, BOB)]
                    continue
                there = rows(buffer)
                if act is _detach:
                    assert there in (before[buffer.id], before[buffer.id][1:])
                elif act is _attach:
                    assert there[: len(before[buffer.id])] == before[buffer.id]
                elif act is _leave:
                    assert there == [row for row in before[buffer.id] if row[1] != ALICE]
                elif act is _unplug:
                    assert there == [row for row in before[buffer.id] if row[2] != "plain"]
                else:
                    assert there == before[buffer.id]
                demands = [attachment.wish.demand for attachment in buffer.attachments.values()]
                assert buffer.request.merged == buffer.request.merge(demands)
                if buffer.memory is None:
                    assert buffer.request == buffer.request.under(demands)
                assert buffer.request.misfit(buffer.size, buffer.request.merged) is None
            assert {client: charged(world, client) for client in counts} == counts
            written = [(a.buffer, a.number, a.holder, a.wish) for a in recorded(world).attachments]
            held = [(b.id, a.number, a.holder.name, a.wish) for b in found for a in b.attachments.values()]
            assert sorted(written, key=str) == sorted(held, key=str)

        play(scene)
        if done:
            assert number > 2
            return
    pytest.fail("never through")


# ---- calls that are repeated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["create", "allocate"])
def test_who_asks_again_has_its_own_attachments(play: Play, member: str) -> None:
    async def scene(world: World) -> None:
        async def ask(client: str) -> Buffer:
            # Of one application, as a request_id is.
            world.life.holder(client, 1000, "camera")
            spec: dict[str, Any] = {"size": SIZE, "devices": ["camera", "gpu"], "request_id": ID}
            if member == "create":
                return await world.life.service.create(world.life.holders[client], spec)
            (grant,) = await world.life.service.allocate(world.life.holders[client], spec)
            grant.fd.close()
            return grant.buffer

        buffer = await ask(ALICE)
        told = world.told()
        # The same connection has them already.
        assert await ask(ALICE) is buffer
        assert rows(buffer) == [(1, ALICE, "camera"), (2, ALICE, "gpu")]
        assert told == []
        assert await ask(":1.7") is buffer
        assert rows(buffer)[2:] == [(3, ":1.7", "camera"), (4, ":1.7", "gpu")]
        assert [names for _, names in told] == [("Attachments", "Constraints", "Size")]
        assert charged(world) == 4
        world.life.service.drop(world.holder(ALICE))
        assert rows(buffer) == [(3, ":1.7", "camera"), (4, ":1.7", "gpu")]
        world.names.append(":1.7")
        await world.again()
        assert rows(world.buffer(buffer.id)) == [(3, ":1.7", "camera"), (4, ":1.7", "gpu")]

    play(scene)


def test_who_asks_again_after_a_kill_has_all_of_them(play: Play) -> None:
    """The share is recorded first, then one attachment after the other."""
    counts: set[int] = set()
    for number in range(1, 12):

        async def scene(world: World, number: int = number) -> None:
            spec = {"size": SIZE, "devices": ["camera", "gpu", "camera"], "request_id": ID}
            buffer = await world.life.service.create(world.holder(ALICE), spec)
            world.names.append(":1.7")
            world.machine.effects.clear()
            world.machine.kill_after = number
            with contextlib.suppress(Killed):
                await world.life.service.create(world.life.holder(":1.7", 1000, "camera"), spec)
            await world.again()
            found = world.buffer(buffer.id)
            counts.add(len(found.attachments))
            assert await world.life.service.create(world.life.holder(":1.7", 1000, "camera"), spec) is found
            own = [row for row in rows(found) if row[1] == ":1.7"]
            assert sorted(device for *_, device in own) == ["camera", "camera", "gpu"]
            assert [number for number, *_ in own] == [4, 5, 6]
            assert charged(world) == 6

        play(scene)
    assert counts == {3, 4, 5, 6}


def test_who_asks_again_and_is_refused_has_nothing_more(play: Play) -> None:
    """It had a share by ticket, so that what was attached by half would stay."""

    async def scene(world: World) -> None:
        spec = {"size": SIZE, "devices": ["camera", "gpu"], "request_id": ID}
        service = world.life.service
        other = world.life.holder(":1.7", 1000, "camera")
        buffer = await service.create(world.holder(ALICE), spec)
        await service.import_ticket(other, buffer.ticket)
        before = everything(world)
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user of 3"):
            await service.create(other, spec)
        assert everything(world) == before

        def unplugged(name: str) -> None:
            if name == "gpu":
                world.machine.devices.go(name)

        world.machine.devices.while_found = unplugged
        with pytest.raises(NoSuchDevice):
            await service.create(other, spec)
        assert everything(world) == before

    play(scene, Limits(max_attachments_per_user=3))


def test_who_asks_again_for_several_and_is_refused_one_keeps_none(play: Play) -> None:
    async def scene(world: World) -> None:
        spec = {"size": SIZE, "devices": ["camera"], "request_id": ID}
        service = world.life.service
        other = world.life.holder(":1.7", 1000, "camera")
        grants = await service.allocate(world.holder(ALICE), spec, 2)
        for grant in grants:
            grant.fd.close()
            await service.import_ticket(other, grant.buffer.ticket)
        told = world.told()
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user of 3"):
            await service.allocate(other, spec, 2)
        for grant in grants:
            assert rows(grant.buffer) == [(1, ALICE, "camera")]
            assert grant.buffer.shares[other] == 1
        assert (charged(world), len(recorded(world).attachments)) == (2, 2)
        # It was attached for a moment, and its holders are told that it is not.
        assert [buffer_id for buffer_id, _ in told] == [grants[0].buffer.id] * 2

    play(scene, Limits(max_attachments_per_user=3))


def test_who_asks_again_while_the_memory_is_made_waits_for_it(play: Play) -> None:
    """The one who asked first has detached meanwhile, so that what is made does not suit the device any more."""

    async def scene(world: World) -> None:
        spec = {"size": SIZE, "devices": ["camera"], "request_id": ID}
        service, store, go = world.life.service, world.life.store, asyncio.Event()
        buffer = await service.create(world.holder(ALICE), spec)
        await world.detach(buffer, 1)
        put = store.put

        async def slow(*args: Any) -> None:
            await go.wait()
            await put(*args)

        store.put = slow  # type: ignore[method-assign,assignment]
        making = asyncio.create_task(service.get_fd(world.holder(ALICE), buffer.id))
        await at_rest()
        asking = asyncio.create_task(service.create(world.life.holder(":1.7", 1000, "camera"), spec))
        await at_rest()
        go.set()
        (await making).fd.close()
        with pytest.raises(Busy, match="^tail_padding: "):
            await asking
        assert (buffer.size, rows(buffer), len(buffer.shares)) == (SIZE, [], 1)
        assert buffer.request.misfit(buffer.size, buffer.request.merged) is None

    play(scene)
