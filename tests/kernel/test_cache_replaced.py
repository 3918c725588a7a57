# SPDX-License-Identifier: MIT
"""A udmabuf device that another takes the place of, as when a driver is replaced: what the service says and sends.

The flags are those that its process hands to the kernel (tests/kernel/recording.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer
from tests.bus.private_bus import PrivateBus
from tests.bus.service import own_service
from tests.kernel import modules
from tests.kernel.buffers import PAGE
from tests.kernel.demands import allocators, get_fd, refused, release
from tests.kernel.pagetables import PageTables
from tests.kernel.recording import CREATE
from tests.kernel.truth import ATTRIBUTES, CONFIG, HAD, announce, assert_true, connected
from tests.kernel.witness import bufinfo

pytestmark = [pytest.mark.guest, pytest.mark.root]

RECORDING = Path(__file__).with_name("recording.py")
STOCK = Path("/dev/udmabuf")

FLAGS = {"cached": 0x02, "uncached": 0x04, "write-combine": 0x08}
UNKNOWN = 1 << 31
CLOEXEC = 0x01


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[None]:
    """The module, of whose use the kernel may not warn."""
    watch = modules.Watch()
    with modules.udmabuf_cache():
        yield
    watch.assert_silent()


@pytest.fixture(scope="module")
def tables() -> Iterator[PageTables]:
    """The witness."""
    with PageTables() as tables:
        yield tables


@contextmanager
def in_the_place_of_the_module(other: Path) -> Iterator[None]:
    """Have its node lead to another device, as if the driver had been replaced, and udev tell of it."""
    aside = modules.NODE.with_name(f"{modules.NODE.name}-aside")
    modules.NODE.rename(aside)
    try:
        os.mknod(modules.NODE, 0o660 | stat.S_IFCHR, other.stat().st_rdev)
        announce(Path("/sys/class/misc", modules.NAME))
        yield
    finally:
        aside.rename(modules.NODE)
        announce(Path("/sys/class/misc", modules.NAME))


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a service that is started with recording.py writes down what it asks udmabuf for."""
    monkeypatch.setenv("UDMABUFD_RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


async def test_flags_are_sent_for_as_long_as_the_device_is_known_to_honour_them(
    tables: PageTables, record: Path
) -> None:
    """The module, the kernel's own in its place, and the module again: nothing stale is claimed, or sent."""
    probed = f"{CREATE:#x} {UNKNOWN | CLOEXEC:#x}"

    def sent() -> list[str]:
        calls = record.read_text().splitlines()
        return calls[len(calls) - calls[::-1].index(probed) :]

    async def probes(count: int) -> None:
        async def so_many() -> bool:
            return record.read_text().splitlines().count(probed) >= count

        await until(so_many)

    async def had(peer: Peer, attribute: str) -> tuple[str, str, str]:
        path, fd, info = await peer.allocate(size=PAGE, cache=attribute, allocator="udmabuf")
        assert_true(tables, fd, info)
        exporter = bufinfo()[info["inode"]].exporter
        await release(peer, path, fd)
        return info["cache_effective"], info["cache_evidence"], exporter

    async def has(peer: Peer, *caches: str) -> None:
        async def listed() -> bool:
            (row,) = [row for row in await allocators(peer) if row["allocator"] == "udmabuf"]
            return bool(row["available"]) and set(row["caches"]) == set(caches)

        await until(listed)

    program = ("-P", str(RECORDING))
    with PrivateBus() as bus, own_service(bus.address, config=CONFIG, program=program):
        async with connected(bus.address) as peer:
            await has(peer, *HAD.values())
            for attribute in ATTRIBUTES:
                assert await had(peer, attribute) == (HAD[attribute], "probe", modules.NAME)
                assert sent()[-1] == f"{CREATE:#x} {FLAGS[HAD[attribute]] | CLOEXEC:#x}"
            path, fd, _ = await peer.allocate(size=PAGE, cache="uncached")
            with in_the_place_of_the_module(STOCK):
                await probes(2)
                await has(peer, "cached")
                for attribute in ATTRIBUTES:
                    assert await had(peer, attribute) == ("cached", "default", "udmabuf")
                assert set(sent()) == {f"{CREATE:#x} {CLOEXEC:#x}"}
                with refused("CacheUnavailable", field="cache"):
                    await peer.allocate(size=PAGE, cache="uncached", cache_policy="require", allocator="udmabuf")
                # What was made before is still what it was made as.
                again, later = await get_fd(peer, path)
                assert (later["cache_effective"], later["cache_evidence"]) == ("uncached", "probe")
                assert_true(tables, again, later)
            await has(peer, *HAD.values())
            for attribute in ATTRIBUTES:
                assert await had(peer, attribute) == (HAD[attribute], "probe", modules.NAME)
                assert sent()[-1] == f"{CREATE:#x} {FLAGS[HAD[attribute]] | CLOEXEC:#x}"
            await release(peer, path, fd, again)


async def test_a_device_behind_which_is_another_is_not_trusted_by_its_name(record: Path) -> None:
    """The kernel's own, by the configured path from the beginning."""
    with in_the_place_of_the_module(STOCK):
        with PrivateBus() as bus, own_service(bus.address, config=CONFIG, program=("-P", str(RECORDING))):
            async with connected(bus.address) as peer:
                path, fd, info = await peer.allocate(size=PAGE, cache="uncached")
                assert (info["cache_effective"], info["cache_evidence"]) == ("cached", "default")
                await release(peer, path, fd)
    assert set(record.read_text().splitlines()) == {
        f"{CREATE:#x} {CLOEXEC:#x}",
        f"{CREATE:#x} {CLOEXEC | UNKNOWN:#x}",
    }
