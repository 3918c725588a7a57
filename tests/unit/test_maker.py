# SPDX-License-Identifier: MIT
"""core.maker and core.billing: a source that has run out is followed by the next, each charged for what it would take;
and what the kernel charges to nobody is counted.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit import scenes
from tests.unit.heaps import MadeUpAllocator
from tests.unit.scenes import ALICE, BOB, SIZE, World
from tests.unit.time_loop import at_rest
from udmabufd.core import maker
from udmabufd.core.admission import RESERVE
from udmabufd.core.errors import (
    Busy,
    KernelLimit,
    NoAllocator,
    NoSuchBuffer,
    NotSupported,
    OutOfMemory,
    QuotaExceeded,
    UdmabufUnavailable,
)
from udmabufd.core.events import Event
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import fill, memfd
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import State

MIB = 1 << 20

Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene, perhaps with other limits."""
    return lambda scene, limits=None: scenes.play(scene, monkeypatch, limits)


def huge(world: World, *failures: Exception | None) -> MadeUpAllocator:
    """An allocator before all others, of 2 MiB pages."""
    made = MadeUpAllocator(world.life, "udmabuf-2M", granule=2 * MIB, size_step=2 * MIB, accounting=Accounting.POOL)
    made.failures = list(failures)
    return made


def heap(world: World, *failures: Exception | None, **capabilities: Any) -> MadeUpAllocator:
    """One after udmabuf, that nobody's control group is charged for."""
    made = MadeUpAllocator(world.life, "heap:system", accounting=Accounting.SYSTEM, **capabilities)
    made.failures = list(failures)
    return made


def udmabuf_fails(world: World, patch: pytest.MonkeyPatch, *failures: Exception | None) -> None:
    """Have udmabuf, of the present life, raise these in turn."""
    left, allocate = list(failures), world.life.udmabuf.allocate

    def failing(*args: Any) -> Any:
        if left and (failure := left.pop(0)) is not None:
            raise failure
        return allocate(*args)

    patch.setattr(world.life.udmabuf, "allocate", failing)


FULL = OSError(errno.ENOSPC, "")


# ---- from one source to the next ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        FULL,
        OSError(errno.ENOMEM, ""),
        OutOfMemory("none"),
        KernelLimit("size: no"),
        UdmabufUnavailable("no"),
        NoAllocator("it was closed"),
        NotSupported("no"),
        OSError(errno.EINVAL, ""),
        OSError(errno.ENODEV, ""),
        OSError(errno.EIO, ""),
    ],
)
def test_the_next_serves_what_the_first_has_run_out_of(
    play: Play, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Event, dict[str, Any]]] = []
    monkeypatch.setattr(maker, "emit", lambda _, event, **fields: told.append((event, fields)))

    async def scene(world: World) -> None:
        first = huge(world, failure)
        buffer, fd = await world.allocate(name="one")
        assert first.asked == ["one"]
        assert buffer.memory is not None
        assert (buffer.memory.allocator, buffer.size, buffer.charged) == ("udmabuf", SIZE, SIZE)
        assert world.books() == {ALICE: (SIZE, 1, 1)}
        other, other_fd = await world.allocate(name="two")
        assert other.memory is not None
        assert (other.memory.allocator, other.size, other.charged) == ("udmabuf-2M", 2 * MIB, 2 * MIB)
        assert world.books() == {ALICE: (SIZE + 2 * MIB, 2, 2)}
        before = scenes.facts(other)
        await world.again()
        huge(world)
        assert scenes.facts(world.buffer(other.id)) == before
        fd.close()
        other_fd.close()
        await world.life.service.release(world.holder(ALICE), other.id)
        assert world.books() == {ALICE: (SIZE, 1, 1)}

    play(scene)
    ((event, fields),) = told
    assert (event, fields["allocator"], fields["uid"]) == (Event.ALLOCATOR_SHORT, "udmabuf-2M", 1000)


def test_what_is_no_shortage_is_told_at_once(play: Play) -> None:
    async def scene(world: World) -> None:
        huge(world, Busy("not now"))
        later = heap(world)
        with pytest.raises(Busy, match="^not now$"):
            await world.allocate()
        assert (later.asked, world.books(), world.stored) == ([], {}, set())

    play(scene)


def test_all_buffers_of_a_call_come_from_one_source(play: Play) -> None:
    async def scene(world: World) -> None:
        first = huge(world, None, None, FULL)
        grants = await world.life.service.allocate(world.holder(ALICE), {"size": 1}, 4)
        assert len(first.asked) == 3
        assert {grant.buffer.memory and grant.buffer.memory.allocator for grant in grants} == {"udmabuf"}
        assert world.books() == {ALICE: (4 * PAGE_SIZE, 4, 4)}
        for grant in grants:
            grant.fd.close()

    play(scene)


def test_the_first_failure_is_told_when_nobody_has_any(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        first, last = huge(world, OutOfMemory("no huge page")), heap(world, FULL)
        udmabuf_fails(world, monkeypatch, KernelLimit("size: too much"))
        empty = await world.create()
        with pytest.raises(OutOfMemory, match="^no huge page$"):
            await world.life.service.get_fd(world.holder(ALICE), empty.id)
        assert (len(first.asked), len(last.asked)) == (1, 1)
        assert (world.books(), empty.state, empty.charged) == ({ALICE: (0, 1, 1)}, State.EMPTY, 0)
        # It can be asked for again.
        (await world.life.service.get_fd(world.holder(ALICE), empty.id)).fd.close()
        assert world.books() == {ALICE: (2 * MIB, 1, 1)}

    play(scene)


def test_each_source_is_charged_for_what_it_takes(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is asked, and not for what another would have taken."""

    async def scene(world: World) -> None:
        seen: list[int] = []

        def look(*_: Any) -> None:
            seen.append(sum(amount for amount, _, _ in world.books().values()))
            raise FULL

        for allocator in (huge(world), heap(world, size_step=MIB)):
            monkeypatch.setattr(allocator, "allocate", look)
        monkeypatch.setattr(world.life.udmabuf, "allocate", look)
        with pytest.raises(OutOfMemory):
            await world.life.service.allocate(world.holder(ALICE), {"size": SIZE}, 2)
        assert seen == [4 * MIB, 2 * SIZE, 2 * MIB]
        assert world.books() == {}

    play(scene)


def test_a_quota_that_a_source_would_exceed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        first = huge(world)
        # The preferred source, with its whole pages, gives way to one that takes what was asked for.
        buffer, fd = await world.allocate()
        assert buffer.memory is not None
        assert (buffer.memory.allocator, first.asked, world.books()) == ("udmabuf", [], {ALICE: (SIZE, 1, 1)})
        fd.close()
        await world.life.service.release(world.holder(ALICE), buffer.id)
        # If there is none, its refusal is told.
        for spec in ({"allocator": "udmabuf-2M"}, {"constraints": {"contiguous": True, "alignment": 2 * MIB}}):
            with pytest.raises(
                QuotaExceeded, match=f"{2 * MIB} more bytes would exceed .* max_bytes_per_user of {MIB}"
            ):
                await world.allocate(**spec)
        assert (first.asked, world.books()) == ([], {})
        world.life.pool.remove("udmabuf-2M")
        # A later one that rounds up to more than the first: why that had none.
        heap(world, size_step=2 * MIB)
        udmabuf_fails(world, monkeypatch, OutOfMemory("the first has none"))
        with pytest.raises(OutOfMemory, match="^the first has none$"):
            await world.allocate()
        assert world.books() == {}
        _, fd = await world.allocate()
        fd.close()
        assert world.books() == {ALICE: (SIZE, 1, 1)}

    play(scene, Limits(max_bytes_per_user=MIB))


def test_one_that_rounds_up_over_the_quota_hides_none(play: Play) -> None:
    """Whether it comes first or between one that has run out and one that has what is asked for."""

    async def scene(world: World) -> None:
        giga = MadeUpAllocator(world.life, "heap:giga", granule=1 << 30, size_step=1 << 30, accounting=Accounting.POOL)
        reserved = heap(world, contiguous=True)
        contiguous = {"size": 2 * MIB, "constraints": {"contiguous": True}}
        request = Request.from_spec(contiguous)
        for first in ([], ["udmabuf-2M"]):
            empty = [huge(world, FULL) for _ in first]
            assert [each.name for each in world.life.pool.select(request)] == [*first, "heap:giga", "heap:system"]
            buffer, fd = await world.allocate(**contiguous)
            assert buffer.memory is not None
            assert (buffer.memory.allocator, buffer.charged, giga.asked) == ("heap:system", 2 * MIB, [])
            assert [len(each.asked) for each in empty] == [1 for _ in first]
            fd.close()
            await world.life.service.release(world.holder(ALICE), buffer.id)
        assert len(reserved.asked) == 2

    play(scene, Limits(max_bytes_per_user=4 * MIB))


def test_what_was_let_go_of_is_looked_at_before_a_quota_refuses(play: Play) -> None:
    async def scene(world: World) -> None:
        huge(world)
        buffer, fd = await world.allocate()
        await world.life.service.release(world.holder(ALICE), buffer.id)
        assert world.books() == {ALICE: (2 * MIB, 1, 0)}
        fd.close()
        _, fd = await world.allocate()
        assert world.books() == {ALICE: (2 * MIB, 1, 1)}
        fd.close()

    play(scene, Limits(max_bytes_per_user=3 * MIB))


def test_a_buffer_that_ends_between_two_sources(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        buffer = await world.create()
        first = huge(world)
        last = heap(world)

        def leave(*_: Any) -> None:
            world.life.service.drop(world.holder(ALICE))
            raise FULL

        monkeypatch.setattr(first, "allocate", leave)
        with pytest.raises(NoSuchBuffer):
            await world.life.service.get_fd(world.holder(ALICE), buffer.id)
        assert (last.asked, world.books()) == ([], {})

    play(scene)


# ---- what the machine has -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accounting", "admitted"),
    [(Accounting.SERVICE, False), (Accounting.SYSTEM, False), (Accounting.POOL, True), (Accounting.CLIENT, True)],
)
def test_memory_that_the_service_takes_is_admitted(play: Play, accounting: Accounting, admitted: bool) -> None:
    async def scene(world: World) -> None:
        world.life.pool.remove("udmabuf")
        allocator = MadeUpAllocator(world.life, "heap:a", accounting=accounting)
        world.machine.available = RESERVE + SIZE - 1
        if admitted:
            (await world.allocate())[1].close()
        else:
            with pytest.raises(OutOfMemory, match=f"size: {SIZE} more bytes would exceed memory.max"):
                await world.allocate()
            assert (allocator.asked, world.books()) == ([], {})
            world.machine.available += 1
            (await world.allocate())[1].close()

    play(scene)


def test_a_source_that_takes_none_of_it_serves_where_there_is_none_left(play: Play) -> None:
    async def scene(world: World) -> None:
        MadeUpAllocator(world.life, "heap:pool", accounting=Accounting.POOL)
        world.machine.available = 0
        buffer, fd = await world.allocate()
        assert buffer.memory is not None
        assert buffer.memory.allocator == "heap:pool"
        fd.close()

    play(scene)


def test_near_the_limit_a_child_fills_what_is_filled(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        used: list[str] = []
        monkeypatch.setattr(memfd, "populate", lambda fd, size: used.append("itself"))
        monkeypatch.setattr(fill, "populate_in_child", lambda fd, size: used.append("a child"))
        (await world.allocate())[1].close()
        world.machine.available = RESERVE + SIZE
        (await world.allocate())[1].close()
        assert used == ["itself", "a child"]

    play(scene)


# ---- what nobody's control group is charged for ---------------------------------------------------------------------


def unaccounted(world: World) -> int:
    return world.life.custody.registry.billing.unaccounted


async def heap_buffer(world: World, client: str = ALICE, /, **spec: Any) -> tuple[str, OwnedFd]:
    buffer, fd = await world.allocate(client, allocator="heap:system", **spec)
    return buffer.id, fd


def test_what_nobody_is_charged_for_is_counted_while_it_is_there(play: Play) -> None:
    async def scene(world: World) -> None:
        heap(world, size_step=MIB)
        one, first = await heap_buffer(world)
        two, second = await heap_buffer(world, size=MIB + 1)
        # Of other memory the kernel's own figures tell.
        (await world.allocate())[1].close()
        (await world.allocate(ALICE, kind="memfd"))[1].close()
        assert unaccounted(world) == 3 * MIB
        service = world.life.service
        first.close()
        await service.release(world.holder(ALICE), one)
        assert unaccounted(world) == 2 * MIB
        # It lingers, and comes back to life.
        await service.release(world.holder(ALICE), two)
        assert world.buffer(two).state is State.LINGERING
        assert unaccounted(world) == 2 * MIB
        await service.import_fd(world.holder(BOB), second)
        assert unaccounted(world) == 2 * MIB
        service.drop(world.holder(BOB))
        second.close()
        await _until_free()
        assert unaccounted(world) == 0

    play(scene)


async def _until_free() -> None:
    await asyncio.sleep(LAST_LOOK)


@pytest.mark.parametrize("orderly", [False, True], ids=["killed", "stopped"])
def test_it_is_counted_after_a_restart(play: Play, orderly: bool) -> None:
    async def scene(world: World) -> None:
        heap(world)
        _, first = await heap_buffer(world)
        ended, second = await heap_buffer(world)
        await world.life.service.release(world.holder(ALICE), ended)
        for _ in range(2):
            if orderly:
                await world.life.end()
            await world.again()
            # Whether its allocator is there or not.
            assert unaccounted(world) == 2 * SIZE
        second.close()
        await _until_free()
        assert unaccounted(world) == SIZE
        await world.again(without=ALICE)
        first.close()
        await _until_free()
        assert (unaccounted(world), world.books()) == (0, {})

    play(scene)


def test_what_was_not_made_is_not_counted(play: Play) -> None:
    async def scene(world: World) -> None:
        heap(world, FULL)
        with pytest.raises(OutOfMemory, match="ENOSPC"):
            await heap_buffer(world)
        assert unaccounted(world) == 0
        # Made, and not kept.
        world.machine.store_errors = [OSError(errno.ENOBUFS, "")]
        with pytest.raises(OutOfMemory, match="service manager"):
            await heap_buffer(world)
        # It is there until it is closed.
        await world.life.custody.settled()
        assert unaccounted(world) == 0
        _, fd = await heap_buffer(world)
        assert unaccounted(world) == SIZE
        fd.close()

    play(scene)


def test_it_is_counted_before_the_store_has_it(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's figures never have it, and the reservation ends when it is made."""

    async def scene(world: World) -> None:
        made = heap(world)
        world.machine.available = RESERVE + 3 * SIZE
        answered = asyncio.Event()
        put = world.life.store.put

        async def put_late(*what: Any) -> None:
            await answered.wait()
            await put(*what)

        monkeypatch.setattr(world.life.store, "put", put_late)
        first = asyncio.create_task(heap_buffer(world, size=2 * SIZE))
        await at_rest()
        assert (len(made.asked), unaccounted(world)) == (1, 2 * SIZE)
        with pytest.raises(OutOfMemory, match=f"{2 * SIZE} more bytes would exceed"):
            await heap_buffer(world, BOB, size=2 * SIZE)
        # Nor is there more when nobody waits for it any more, before it is closed.
        world.life.service.drop(world.holder(ALICE))
        assert unaccounted(world) == 2 * SIZE
        answered.set()
        with pytest.raises(NoSuchBuffer):
            await first
        await _until_free()
        assert (unaccounted(world), world.books()) == (0, {})
        _, fd = await heap_buffer(world, BOB, size=2 * SIZE)
        fd.close()

    play(scene)


def test_it_leaves_less_for_others(play: Play) -> None:
    async def scene(world: World) -> None:
        heap(world)
        world.machine.available = RESERVE + 3 * SIZE
        _, fd = await heap_buffer(world)
        # The machine's figure says 3 still.
        with pytest.raises(OutOfMemory, match=f"{SIZE} are in use"):
            await world.allocate(size=3 * SIZE)
        (await world.allocate(size=2 * SIZE))[1].close()
        fd.close()

    play(scene)
