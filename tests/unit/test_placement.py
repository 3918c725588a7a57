# SPDX-License-Identifier: MIT
"""core.placement: what a caller names becomes a wish, what an allocator gives a source; explained as it is decided.

What of memory that is there suits which device is in test_attaching.py.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest

from tests.unit.devices import MadeUpDevices, path_of
from tests.unit.time_loop import run
from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.attachments import Wish
from udmabufd.core.constraints import MAX_ALLOCATORS, NONE, Constraints, Demand
from udmabufd.core.device import Device, NoDevices
from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec, NoAllocator, NoSuchDevice
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.placement import DEVICE_NAME_MAX, Placement
from udmabufd.core.pool import Pool
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import fill, memfd
from udmabufd_client.contract import MAX_ATTACHMENTS, Cache, Kind

MIB = 1 << 20
UID = 1000


class Allocator:
    """Judges as all do, and notes what it is asked to make."""

    unavailable: Refusal | None = None
    max_size = 1 << 40
    free: int | None = None

    def __init__(self, name: str, **capabilities: Any) -> None:
        self.name = name
        self.capabilities = Capabilities(**{"kind": Kind.DMA_BUF, **capabilities})
        self.asked: list[tuple[Request, str, Populate]] = []

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        return refusals(self.name, capabilities or self.capabilities, request, lambda: None)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        self.asked.append((request, name, populate))
        raise NoAllocator("seen")

    def close(self) -> None:
        pass


@pytest.fixture
def devices() -> MadeUpDevices:
    """A camera and a GPU."""
    devices = MadeUpDevices()
    devices.come("camera", alignment=64, tail_padding=PAGE_SIZE)
    devices.come("gpu", contiguous=True)
    return devices


@pytest.fixture
def pool() -> Pool:
    """Scattered, huge and contiguous memory, and memfds."""
    return Pool(
        ["udmabuf", "udmabuf-2M", "heap:*", "memfd"],
        [
            Allocator("udmabuf"),
            Allocator("udmabuf-2M", granule=2 * MIB, size_step=2 * MIB, accounting=Accounting.POOL),
            Allocator("heap:cma", contiguous=True, accounting=Accounting.SYSTEM),
            Allocator("memfd", kind=Kind.MEMFD, accounting=Accounting.CLIENT),
        ],
    )


@pytest.fixture
def placement(pool: Pool, devices: MadeUpDevices) -> Placement:
    return Placement(pool, devices)


# ---- wishes ---------------------------------------------------------------------------------------------------------


def test_a_wish_is_what_is_known_and_what_is_asked(placement: Placement, devices: MadeUpDevices) -> None:
    async def main() -> None:
        wish = await placement.wish(UID, "device", "camera", {"alignment": 48, "max_segments": 2}, dynamic=True)
        assert wish == Wish(
            "camera", path_of("camera"), Constraints(alignment=192, tail_padding=PAGE_SIZE, max_segments=2), True
        )
        assert wish.found is not None
        assert wish.found.label == "the camera"
        assert wish.demand == Demand("camera", wish.constraints)
        plain = await placement.wish(UID, "device", path_of("gpu"))
        # In the words of who asked.
        assert (plain.device, plain.path, plain.dynamic) == (path_of("gpu"), path_of("gpu"), False)
        assert devices.watched == []

    run(main())


def test_wishes_of_a_spec_come_in_its_order(placement: Placement) -> None:
    async def main() -> None:
        wishes = await placement.wishes(UID, {"devices": ["gpu", "camera", "gpu"], "size": 1})
        assert [wish.device for wish in wishes] == ["gpu", "camera", "gpu"]
        assert await placement.wishes(UID, {"size": 1}) == await placement.wishes(UID, {"devices": []}) == []
        # A memfd is for no device, and needs none looked up.
        assert await placement.wishes(UID, {"kind": "memfd", "devices": []}) == []
        assert len(await placement.wishes(UID, {"devices": ["gpu"] * MAX_ATTACHMENTS})) == MAX_ATTACHMENTS

    run(main())


def test_what_cannot_be_wished_for(placement: Placement, devices: MadeUpDevices) -> None:
    many = [f"heap:{n}" for n in range(MAX_ALLOCATORS)]
    devices.come("picky", allocators=[*many[1:], "heap:x"])
    devices.come("wide", allocators=["heap:*", "udmabuf"])
    devices.come("only", allocators=["dumb:card0"])

    async def main() -> None:
        for spec, error, text in (
            ({"devices": ["gpu", "none"]}, NoSuchDevice, "^none: "),
            ({"devices": [""]}, InvalidSpec, "^devices: is empty$"),
            ({"devices": ["gpu"], "kind": "memfd"}, InvalidSpec, "^devices: contradicts kind memfd"),
            ({"devices": ["gpu"] * 65}, InvalidSpec, "^devices: names 65 devices; a buffer has at most 64"),
        ):
            with pytest.raises(error, match=text):
                await placement.wishes(UID, spec)
        with pytest.raises(InvalidSpec, match="^device: is empty$"):
            await placement.wish(UID, "device", "")
        asked = len(devices.asked)
        for constraints, text in (
            ({"alignment": 0}, r"^constraints\.alignment: "),
            ({"align": 1}, r"^constraints\.align: "),
            ({"cache": []}, r"^constraints\.cache: "),
        ):
            with pytest.raises(InvalidSpec, match=text):
                await placement.wish(UID, "device", "gpu", constraints)
        # Nothing was looked up for them.
        assert len(devices.asked) == asked
        with pytest.raises(IncompatibleConstraints, match="^allocators: .*only.*the options for only"):
            await placement.wish(UID, "device", "only", {"allocators": ["udmabuf"]})
        wide = await placement.wish(UID, "device", "wide", {"allocators": many})
        assert wide.constraints.allocators == frozenset(many)
        picky = await placement.wish(UID, "device", "picky", {"allocators": many})
        assert picky.constraints.allocators == frozenset(many[1:])

    run(main())


def test_where_there_are_no_devices(pool: Pool) -> None:
    async def main() -> None:
        placement = Placement(pool, NoDevices())
        assert await placement.wishes(UID, {}) == []
        assert await placement.devices.all() == []
        with pytest.raises(NoSuchDevice, match="^gpu: there is no such device$"):
            await placement.wishes(UID, {"devices": ["gpu"]})

    run(main())


def test_each_name_is_looked_up_once(placement: Placement, devices: MadeUpDevices) -> None:
    async def main() -> None:
        names = ["gpu", "camera"] * (MAX_ATTACHMENTS // 2)
        wishes = await placement.wishes(UID, {"devices": names})
        assert [wish.device for wish in wishes] == names
        assert devices.asked == ["gpu", "camera"]

    run(main())


def test_a_name_that_does_not_fit_a_record_is_not_looked_up(placement: Placement, devices: MadeUpDevices) -> None:
    async def main() -> None:
        name = "x" * DEVICE_NAME_MAX
        devices.come(name)
        assert (await placement.wish(UID, "device", name)).device == name
        devices.come(name + "x")
        for key, looking in (
            ("device", placement.wish(UID, "device", name + "x")),
            ("devices", placement.wishes(UID, {"devices": [name + "x"]})),
        ):
            with pytest.raises(InvalidSpec, match=f"^{key}: may have at most 256 characters$"):
                await looking
        assert devices.asked == [name]

    run(main())


class OneByOne(MadeUpDevices):
    """Looked up one at a time, first come first served, each as long as a turn of the clock."""

    def __init__(self) -> None:
        super().__init__()
        self._worker = asyncio.Lock()

    async def find(self, name: str) -> Device:
        async with self._worker:
            await asyncio.sleep(1)
            return await super().find(name)


def test_users_take_turns_at_looking_up(pool: Pool) -> None:
    """One with many calls, each for many devices, keeps another waiting for one look-up."""

    async def main() -> None:
        devices = OneByOne()
        placement = Placement(pool, devices)
        greedy = [[f"{call}-{number}" for number in range(MAX_ATTACHMENTS)] for call in range(16)]
        for name in ("modest", "last", *(name for names in greedy for name in names)):
            devices.come(name)
        calls = [asyncio.create_task(placement.wishes(UID, {"devices": names})) for names in greedy]
        await asyncio.sleep(10.5)
        under_way = len(devices.asked)
        await placement.wish(UID + 1, "device", "modest")
        # What was under way, at most one more that waited before, and its own.
        assert len(devices.asked) - under_way <= 3
        assert devices.asked[-1] == "modest"
        # Also of another call of the first user's: each of its own comes in its turn.
        await placement.wish(UID, "device", "last")
        assert len(devices.asked) - under_way <= 3 + len(greedy) + 1
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        # Nothing is left of a turn that was given up.
        assert (await placement.wish(UID, "device", "last")).device == "last"

    run(main())


def test_look_ups_of_many_callers_do_not_mix(placement: Placement) -> None:
    async def main() -> None:
        found = await asyncio.gather(*(placement.wish(UID, "device", name) for name in ("gpu", "camera") * 3))
        assert [wish.device for wish in found] == ["gpu", "camera"] * 3

    run(main())


# ---- sources --------------------------------------------------------------------------------------------------------


def test_a_source_for_each_allocator_that_suits(placement: Placement) -> None:
    request = Request.from_spec({"size": 3 * MIB})
    sources = list(placement.sources(request)(["a", "b"]))
    assert [(source.name, source.size, source.accounting) for source in sources] == [
        ("udmabuf", 3 * MIB, Accounting.SERVICE),
        ("udmabuf-2M", 4 * MIB, Accounting.POOL),
        ("heap:cma", 3 * MIB, Accounting.SYSTEM),
    ]
    alone = request.under([Demand("gpu", Constraints(max_segments=1))])
    assert [source.name for source in placement.sources(alone)(["a"])] == ["heap:cma"]
    with pytest.raises(NoAllocator, match="heap:cma: alignment"):
        placement.sources(request.under([Demand("gpu", Constraints(max_segments=1, alignment=MIB))]))
    (memfd_source,) = placement.sources(Request.from_spec({"size": 1, "kind": "memfd"}))(["a"])
    assert (memfd_source.name, memfd_source.accounting) == ("memfd", Accounting.CLIENT)


def test_a_source_fills_as_the_machine_has_room(placement: Placement, pool: Pool) -> None:
    request = Request.from_spec({"size": 1})
    source = next(iter(placement.sources(request)(["one", "two"])))
    for close, populate in ((False, memfd.populate), (True, fill.populate_in_child)):
        with pytest.raises(NoAllocator, match="seen"):
            source.fill(close)
        allocator = pool.find("udmabuf")
        assert isinstance(allocator, Allocator)
        assert allocator.asked.pop() == (request, "one", populate)


def test_what_is_checked_is_what_has_sources(placement: Placement) -> None:
    """CreateBuffer, Attach, GetFd and Explain decide alike."""
    for size in (1, 2 * MIB, 5 * MIB):
        for constraints in (
            {},
            {"contiguous": True},
            {"max_segments": 3},
            {"alignment": 2 * MIB},
            {"alignment": 4 * MIB},
            {"allocators": ["udmabuf-2M"]},
            {"allocators": ["dumb:*"]},
            {"cache": ["uncached"]},
            {"max_segment_size": PAGE_SIZE, "max_segments": 256},
        ):
            request = Request.from_spec({"size": size, "constraints": constraints})
            explained = placement.pool.explain(lambda request=request: request)  # type: ignore[misc]
            suitable = [row.allocator.name for row in explained if not row.refusals]
            if suitable:
                placement.check(request)
                assert [source.name for source in placement.sources(request)([])] == suitable
            else:
                with pytest.raises(NoAllocator) as checked:
                    placement.check(request)
                with pytest.raises(NoAllocator) as asked:
                    placement.sources(request)
                assert str(checked.value) == str(asked.value)


# ---- what a client brings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ({}, None),
        ({"max_segments": 4, "alignment": PAGE_SIZE, "size_alignment": 2 * PAGE_SIZE}, None),
        ({"allocators": ["wrapped"]}, None),
        ({"max_segments": 3}, "^max_segments: .*caller's own cannot be chosen"),
        ({"contiguous": True}, "^contiguous: "),
        ({"alignment": 2 * PAGE_SIZE}, "^alignment: "),
        ({"allocators": ["udmabuf"]}, "^allocators: "),
        ({"cache": ["write-combine"]}, "^cache: "),
        ({"tail_padding": 1}, f"^ranges: {4 * PAGE_SIZE} bytes are given, .* takes {5 * PAGE_SIZE}"),
        ({"size_alignment": 3 * PAGE_SIZE}, f"^ranges: .* takes {6 * PAGE_SIZE}"),
    ],
)
def test_memory_of_the_callers_own(placement: Placement, constraints: dict[str, Any], text: str | None) -> None:
    size = 4 * PAGE_SIZE
    request = Request.from_spec({"size": size, "constraints": constraints}).wrapping()
    assert request.constraints != NONE or not constraints
    if text is None:
        placement.check_wrapped(request, size)
        return
    with pytest.raises(NoAllocator, match=text):
        placement.check_wrapped(request, size)


@pytest.mark.parametrize("known", [True, False])
def test_how_the_callers_own_is_mapped(pool: Pool, devices: MadeUpDevices, known: bool) -> None:
    """Cached, if the device that exports it is one of which that is known."""
    if not known:
        pool.add(Allocator("udmabuf", cache=None, evidence=None))
    placement = Placement(pool, devices)
    placement.check_wrapped(Request.from_spec({"size": PAGE_SIZE}).wrapping(), PAGE_SIZE)
    for cache in Cache:
        request = Request.from_spec({"size": PAGE_SIZE, "constraints": {"cache": [str(cache)]}}).wrapping()
        with nullcontext() if known and cache is Cache.CACHED else pytest.raises(NoAllocator, match="^cache: "):
            placement.check_wrapped(request, PAGE_SIZE)
