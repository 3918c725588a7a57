# SPDX-License-Identifier: MIT
"""What the tests on the real kernel share: devices, and the driver's parameters, put back afterwards."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel import leftovers, unit
from tests.kernel.accord import settled
from tests.kernel.dynamic import ALICE, BOB, Importer, importer
from tests.kernel.importing import Vivid, drm_nodes, loaded
from udmabufd.linux import udmabuf
from udmabufd_base.fd import OwnedFd

_FAILED = pytest.StashKey[bool]()

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(scope="session", autouse=True)
def steady_memory() -> Iterator[None]:
    """Nothing collects a process's own pages into huge ones meanwhile: whoever measures what is charged would find
    2 MiB more while that lasts (khugepaged charges the new page before it frees the old; mm/khugepaged.c).

    What memfds are made of is another setting's.
    """
    (before,) = re.findall(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    _HUGE_PAGES.write_text("never")
    yield
    _HUGE_PAGES.write_text(before)


@pytest.fixture
def device() -> Iterator[OwnedFd]:
    """/dev/udmabuf, opened as the daemon opens it."""
    with udmabuf.open_device() as fd:
        yield fd


@pytest.fixture
def set_parameter() -> Iterator[Callable[[str, int], None]]:
    """A function that sets a parameter of the driver until the end of the test."""
    before = {file: file.read_bytes() for file in Path(udmabuf.PARAMETERS).iterdir()}

    def write(name: str, value: int) -> None:
        Path(udmabuf.PARAMETERS, name).write_text(f"{value}\n", encoding="ascii")

    yield write
    for file, value in before.items():
        file.write_bytes(value)


@pytest.fixture
def vgem() -> Iterator[Path]:
    """The node of the kernel's virtual GPU, which leaves again if it was not there: compositors would render on it."""
    loaded = Path("/sys/module/vgem").exists()
    subprocess.run(["modprobe", "vgem"], check=True)
    try:
        cards = [card for card in Path("/sys/class/drm").glob("card*") if (card / "device").resolve().name == "vgem"]
        assert len(cards) == 1, f"nodes of vgem: {cards}"
        node = Path("/dev/dri", cards[0].name)
        subprocess.run(["udevadm", "wait", "--timeout=30", str(node)], check=True)
        yield node
    finally:
        if not loaded:
            subprocess.run(["modprobe", "--remove", "vgem"], check=True)


@pytest.fixture(scope="module")
def vivid() -> Iterator[Vivid]:
    """The kernel's virtual video devices, for all tests of a file: loading them takes seconds."""
    with loaded("vivid", *Vivid.PARAMETERS):
        yield Vivid()


@pytest.fixture(scope="module")
def virtio_gpu() -> Iterator[list[Path]]:
    """Card and render node of a device with mode setting, for all tests of a file."""
    others = set(drm_nodes())
    with loaded("virtio_gpu"):
        card, render = (node for node in drm_nodes() if node not in others)
        yield [card, render]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which tests fail, for the fixtures that clear up after them."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture
async def root(service: RunningService, request: pytest.FixtureRequest) -> AsyncIterator[Peer]:
    """Who looks on, when nothing is left of the tests before; and nothing is left of this one afterwards."""
    await _nothing_is_left(service)
    before = leftovers.numbers()
    peer = await Peer.connect(service.address)
    try:
        yield peer
    finally:
        peer.close()
    if _FAILED in request.node.stash:
        leftovers.end(before)
    await _nothing_is_left(service)


async def _nothing_is_left(service: RunningService) -> None:
    peer = await Peer.connect(service.address)
    try:
        await unit.serving(peer)
        assert await settled(peer) == {}
    finally:
        peer.close()


@pytest.fixture
async def alice(root: Peer, service: RunningService) -> AsyncIterator[Importer]:
    """An importer of an ordinary user's."""
    # `root` looks on until she has gone.
    async with importer(service.address, ALICE) as one:
        yield one


@pytest.fixture
async def bob(root: Peer, service: RunningService) -> AsyncIterator[Importer]:
    """Another user's."""
    async with importer(service.address, BOB) as one:
        yield one
