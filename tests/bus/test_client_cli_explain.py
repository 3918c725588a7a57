# SPDX-License-Identifier: MIT
"""udmabufctl explain, devices and allocators, and what alloc shows of devices: as people and programs see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import FakeAllocator, attachments
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_cli_admin import begin
from tests.bus.test_client_restart import answer_all
from udmabufd_base.codec import Variant
from udmabufd_client.contract import ALLOCATOR_TYPES, CONSTRAINT_TYPES, DEVICE_TYPES, VERDICT_TYPES

pytestmark = pytest.mark.host

Ctl = Callable[..., Awaitable[tuple[int, str, str]]]
Row = dict[str, Any]

VERDICTS: list[Row] = [
    {
        "allocator": "udmabuf",
        "ok": False,
        "field": "max_segments",
        "device": "/dev/video0",
        "reason": "3110400 bytes of its memory may be 760 segments, and /dev/video0 takes 8",
        "remedy": "detach /dev/video0",
    },
    {"allocator": "udmabuf-2M", "ok": True, "cache_effective": "cached", "cache_evidence": "default"},
    {"allocator": "udmabuf-1G", "ok": False, "field": "", "device": "", "reason": "no pool of such pages"},
    {"allocator": "heap:cma", "ok": True, "cache_effective": "cached", "cache_evidence": "driver"},
    {"allocator": "heap:system", "ok": False, "reason": "no pool of such pages", "remedy": ""},
    {"allocator": "memfd", "ok": False, "field": "kind", "device": "spec", "reason": "it is a\x1b[2J memfd"},
]

EXPLAINED = """\
1920x1080 NV12, dma-buf, max_segments 8; cache cached, uncached, for /dev/video0

   ALLOCATOR    VERDICT  BECAUSE OF    DEMANDED BY
   udmabuf      no       max_segments  /dev/video0
*  udmabuf-2M   serves
   udmabuf-1G   no       (see below)
   heap:cma     suits
   heap:system  no       (see below)
   memfd        no       kind          spec

udmabuf
    3110400 bytes of its memory may be 760 segments, and /dev/video0 takes 8
    What would help: detach /dev/video0

udmabuf-1G, heap:system
    no pool of such pages

memfd
    it is a\N{REPLACEMENT CHARACTER}[2J memfd

udmabuf-2M would serve. When it has run out: heap:cma.
"""

EXPLAINED_AT_40 = """\
64 KiB, memfd, uncached (prefer)

   ALLOCATOR    VERDICT  CACHE
   udmabuf      no
*  udmabuf-2M   serves   cached
   udmabuf-1G   no
   heap:cma     suits    cached
   heap:system  no
   memfd        no

udmabuf
    3110400 bytes of its memory may be
    760 segments, and /dev/video0 takes
    8
    What would help: detach /dev/video0

udmabuf-1G, heap:system
    no pool of such pages

memfd
    it is a\N{REPLACEMENT CHARACTER}[2J memfd

udmabuf-2M would serve, with memory that
is mapped cached, not uncached. When it
has run out: heap:cma.
"""

MAPPED: list[Row] = [
    {"allocator": "dumb:card0", "ok": True, "cache_effective": "write-combine", "cache_evidence": "driver"},
    {"allocator": "udmabuf", "ok": True, "cache_effective": "cached", "cache_evidence": "default"},
    VERDICTS[0] | {"allocator": "heap:cma"},
]

MAPPED_SHOWN = """\
   ALLOCATOR   VERDICT  CACHE          EVIDENCE  BECAUSE OF    DEMANDED BY
*  dumb:card0  serves   write-combine  driver
   udmabuf     suits    cached         default
   heap:cma    no                                max_segments  /dev/video0
"""

DEVICES: list[Row] = [
    {
        "device": "/dev/video4",
        "subsystem": "video4linux",
        "label": "vivid-001-vid-cap",
        "driver": "vivid",
        "dma_device": "platform:vivid.1",
        "dma_mask_bits": 32,
        "iommu_type": "DMA",
        "numa_node": 1,
        "constraints": {"address_bits": 32, "max_segments": 1, "contiguous": True},
        "sources": {"address_bits": "sysfs", "contiguous": "vb2-dma-contig", "max_segments": "vb2-dma-contig"},
    },
    {"device": "drm:card0"},
    {"device": "mem:null", "constraints": {"tail_padding": 64, "alignment": 64}},
    {"device": "mem:zero", "constraints": {"alignment": 64, "tail_padding": 64}},
]

DEVICES_SHOWN = """\
DEVICE       LABEL              DRIVER  DMA DEVICE        IOMMU  REACHES  NUMA  MEMORY
/dev/video4  vivid-001-vid-cap  vivid   platform:vivid.1  DMA    32 bits     1  address_bits 32 bits; contiguous
drm:card0    -                  -       -                 -            -     -  any
mem:null     -                  -       -                 -            -     -  alignment 64 B; tail_padding 64 B
mem:zero     -                  -       -                 -            -     -  alignment 64 B; tail_padding 64 B

/dev/video4
    address_bits 32 bits: sysfs
    contiguous: vb2-dma-contig

mem:null, mem:zero
    alignment 64 B; tail_padding 64 B
"""

ALLOCATORS: list[Row] = [
    {
        "allocator": "udmabuf",
        "kind": "dma-buf",
        "available": True,
        "max_size": 64 << 20,
        "granule": 4096,
        "contiguous": False,
        "cache": "cached",
        "caches": ["cached", "uncached", "write-combine"],
        "cache_evidence": "probe",
        "accounting": "service",
        "sources": {"max_size": "size_limit_mb"},
    },
    {"allocator": "udmabuf-2M", "available": False, "reason": "no huge pages: vm.nr_hugepages=64", "free": 0},
    {"allocator": "heap:cma", "available": True, "contiguous": True, "granule": 4096, "address_bits": 32},
    {"allocator": "dumb:card0", "available": True, "cache": "write-combine", "caches": ["write-combine"]},
    {"allocator": "memfd", "available": True, "cache": "cached", "cache_evidence": "default"},
]

ALLOCATORS_SHOWN = """\
ALLOCATOR   SERVES  KIND     LARGEST   PIECES  ADDRESSES  CACHE                            EVIDENCE  CHARGED  FREE
udmabuf     yes     dma-buf   64 MiB    4 KiB          -  cached, uncached, write-combine  probe     service     -
udmabuf-2M  no      -              -        -          -  -                                -         -         0 B
heap:cma    yes     -              -  one run    32 bits  -                                -         -           -
dumb:card0  yes     -              -        -          -  write-combine                    -         -           -
memfd       yes     -              -        -          -  cached                           default   -           -

udmabuf-2M
    no huge pages: vm.nr_hugepages=64
"""


def marshalled(rows: list[Row], types: dict[str, str]) -> list[dict[str, Variant]]:
    """Return rows with the types of the contract, those of the constraints in them too."""

    def value(key: str, plain: Any) -> Any:
        if key != "constraints":
            return plain
        return {name: Variant(CONSTRAINT_TYPES[name], inner) for name, inner in plain.items()}

    return [{key: Variant(types[key], value(key, plain)) for key, plain in row.items()} for row in rows]


def tells(fake: FakeAllocator) -> FakeAllocator:
    told = {
        "Explain": marshalled(VERDICTS, VERDICT_TYPES),
        "ListDevices": marshalled(DEVICES, DEVICE_TYPES),
        "ListAllocators": marshalled(ALLOCATORS, ALLOCATOR_TYPES),
    }
    answer_all(fake).answers |= {
        member: lambda incoming, rows=rows: fake.reply(incoming.header, "aa{sv}", rows)  # type: ignore[misc]
        for member, rows in told.items()
    }
    return fake


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    fake = await FakeAllocator.start(open_bus.address, tells)
    yield fake
    fake.close()


@pytest.fixture
def ctl(open_bus: PrivateBus, fake: FakeAllocator) -> Ctl:
    """Run udmabufctl; return its status and what it said."""

    async def run(*verb: str, columns: int | None = None) -> tuple[int, str, str]:
        process = await begin(open_bus.address, *verb, columns=columns)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    return run


async def test_explain_shows_who_serves_and_why_others_do_not(fake: FakeAllocator, ctl: Ctl) -> None:
    words = ["--device", "/dev/video0", "--format", "NV12", "1920x1080"]
    constraints = ["--constraint", "max_segments=8", "--constraint", "cache=cached,uncached"]
    assert await ctl("explain", *words, *constraints) == (0, EXPLAINED, "")
    (spec,) = next(body for header, body in fake.calls if header.member == "Explain")
    assert {key: value.value for key, value in spec.items() if key != "constraints"} == {
        "width": 1920,
        "height": 1080,
        "format": "NV12",
        "devices": ["/dev/video0"],
    }
    assert {key: value.value for key, value in spec["constraints"].value.items()} == {
        "max_segments": 8,
        "cache": ["cached", "uncached"],
    }
    words = ["--size", "64K", "--kind", "memfd", "--cache", "uncached", "--cache-policy", "prefer"]
    assert await ctl("explain", *words, columns=40) == (0, EXPLAINED_AT_40, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cache", "write-combine"], "dumb:card0 would serve."),
        (["--cache", "cached"], "dumb:card0 would serve, with memory that is mapped write-combine, not cached."),
        # Nothing asked for is cached asked for.
        ([], "dumb:card0 would serve, with memory that is mapped write-combine, not cached."),
    ],
)
async def test_explain_shows_how_memory_would_be_mapped(
    fake: FakeAllocator, ctl: Ctl, words: list[str], said: str
) -> None:
    rows = marshalled(MAPPED, VERDICT_TYPES)
    fake.answers["Explain"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", rows)
    status, out, err = await ctl("explain", "--size", "64K", *words)
    assert (status, err) == (0, "")
    assert MAPPED_SHOWN in out
    assert out.endswith(f"\n\n{said} When it has run out: udmabuf.\n")
    status, out, err = await ctl("explain", "--size", "64K", *words, "--json")
    assert (status, err, json.loads(out)) == (0, "", MAPPED)


async def test_explain_shows_that_mappings_are_as_asked(fake: FakeAllocator, ctl: Ctl) -> None:
    rows = marshalled(MAPPED[:1], VERDICT_TYPES)
    fake.answers["Explain"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", rows)
    _, out, _ = await ctl("explain", "--size", "64K", "--cache", "write-combine")
    assert "*  dumb:card0  serves   write-combine  driver\n" in out
    assert out.endswith("\n\ndumb:card0 would serve.\n")


async def test_a_service_that_tells_nothing_of_mappings_has_no_column_for_them(fake: FakeAllocator, ctl: Ctl) -> None:
    rows = marshalled([{"allocator": "memfd", "ok": True}], VERDICT_TYPES)
    fake.answers["Explain"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", rows)
    _, out, _ = await ctl("explain", "--size", "64K", "--cache", "uncached")
    assert out == (
        "64 KiB, dma-buf, uncached (prefer)\n\n   ALLOCATOR  VERDICT  BECAUSE OF  DEMANDED BY\n*  memfd      serves\n"
        "\nmemfd would serve.\n"
    )


async def test_explain_for_programs_is_what_the_service_says(ctl: Ctl) -> None:
    status, out, err = await ctl("explain", "--size", "64K", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == [{key: value for key, value in row.items() if value != ""} for row in VERDICTS]


async def test_explain_is_status_1_when_nobody_serves(fake: FakeAllocator, ctl: Ctl) -> None:
    rows = marshalled([row for row in VERDICTS if not row["ok"]], VERDICT_TYPES)
    fake.answers["Explain"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", rows)
    status, out, err = await ctl("explain", "--size", "64K")
    assert (status, err) == (1, "")
    assert "*" not in out
    assert out.endswith("\n\nNo allocator suits.\n")
    status, out, _ = await ctl("explain", "--size", "64K", "--json")
    assert (status, len(json.loads(out))) == (1, 4)
    fake.answers["Explain"] = lambda incoming: fake.fail(
        incoming.header, "org.udmabufd.Error.IncompatibleConstraints", "max_stride: /dev/video0 and drm:card0 differ"
    )
    said = (1, "", "udmabufctl: max_stride: /dev/video0 and drm:card0 differ\n")
    assert await ctl("explain", "--size", "64K", "--device", "/dev/video0", "--device", "drm:card0") == said


async def test_devices_show_what_they_need_and_how_that_is_known(ctl: Ctl) -> None:
    assert await ctl("devices") == (0, DEVICES_SHOWN, "")
    status, out, _ = await ctl("devices", "--json")
    assert (status, json.loads(out)) == (0, DEVICES)
    _, narrow, _ = await ctl("devices", columns=40)
    assert narrow.splitlines()[0].split() == ["DEVICE", "DRIVER", "MEMORY"]
    assert max(map(len, narrow.splitlines())) <= 40


async def test_allocators_show_what_they_give_and_why_they_do_not(ctl: Ctl) -> None:
    assert await ctl("allocators") == (0, ALLOCATORS_SHOWN, "")
    status, out, _ = await ctl("allocators", "--json")
    assert (status, json.loads(out)) == (0, ALLOCATORS)
    _, narrow, _ = await ctl("allocators", columns=40)
    assert narrow.splitlines()[0].split() == ["ALLOCATOR", "SERVES", "PIECES", "CACHE"]


async def test_alloc_takes_devices_and_shows_what_is_attached(fake: FakeAllocator, ctl: Ctl) -> None:
    merged = {"max_segments": Variant("u", 1), "contiguous": Variant("b", True), "alignment": Variant("t", 3 << 20)}
    known = {
        "Constraints": Variant("a{sv}", merged),
        "Attachments": attachments((1, "drm:card0", True), (2, "/dev/video0", True)),
    }
    fake.answers["GetAll"] = lambda incoming: fake.reply(incoming.header, "a{sv}", known)
    words = ["alloc", "--size", "4K", "--device", "drm:card0", "--device", "/dev/video0", "--constraint", "contiguous"]
    status, out, _ = await ctl(*words)
    assert status == 0
    assert "constraints  alignment 3 MiB; contiguous\n" in out
    assert "attachments  1: drm:card0, 2: /dev/video0\n" in out
    (spec,) = next(body for header, body in fake.calls if header.member == "Allocate")
    assert (spec["devices"].value, spec["constraints"].value["contiguous"].value) == (
        ["drm:card0", "/dev/video0"],
        True,
    )
    status, out, _ = await ctl(*words, "--json")
    shown = json.loads(out)
    assert shown["constraints"] == {"alignment": 3 << 20, "max_segments": 1, "contiguous": True}
    assert [row["device"] for row in shown["attachments"]] == ["drm:card0", "/dev/video0"]
    status, out, _ = await ctl("alloc", "--size", "4K", "--json")
    assert not {"constraints", "attachments"} & set(json.loads(out))


async def test_a_holder_says_that_a_device_is_gone(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    process = await begin(open_bus.address, "alloc", "--size", "4K", "--device", "/dev/video0", "--hold")
    assert process.stderr is not None
    assert process.stdout is not None
    async with asyncio.timeout(60):
        (header,) = await fake.called("Allocate")
        assert b"Holding it" in await process.stderr.readline()
        fake.detached(header.sender, 1, "it was unplugged\x1b[2J")
        assert (await process.stderr.readline()).decode() == (
            "udmabufctl: /dev/video0 is detached: it was unplugged\N{REPLACEMENT CHARACTER}[2J\n"
        )
        process.terminate()
        await process.communicate()
    assert process.returncode == 0
