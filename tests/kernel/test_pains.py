# SPDX-License-Identifier: MIT
"""What programs suffer from that guess which memory a device wants, a test for each pain, named after it.

Each has a check of what the pain is about: it passes with the service, and fails with blind.py, the same service
without an eye for constraints. Devices that this machine does not have are made up, with what the issue trackers of
those that suffered from them say, and act here as they do there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from tests.bus.peer import Peer, error
from tests.bus.private_bus import PrivateBus
from tests.bus.service import RunningService, own_service
from tests.kernel import frames, unit
from tests.kernel.buffers import MIB, PAGE, mapped
from tests.kernel.demands import allocators, demands, made_up, modprobe, release
from tests.kernel.hugepools import huge_pages
from tests.kernel.witness import bufinfo
from udmabufd_base.errors import RemoteError
from udmabufd_client.importers import verify
from udmabufd_client.info import BufferInfo

pytestmark = [pytest.mark.guest, pytest.mark.root]

BLIND: Final = Path(__file__).with_name("blind.py")

DEVICES: Final[dict[str, dict[str, object]]] = {
    "null": {"stride_alignment": 1024},
    "zero": {"stride_alignment": 768},
    # radeonsi reckons with pictures of whole blocks of 16 rows.
    "full": {"height_alignment": 16},
    # V3DV wants align64(size + 64, 4096).
    "random": {"tail_padding": 64},
    "urandom": {"allocators": ["heap:*"]},
    "kmsg": {"contiguous": True},
}
"""What the database is made to say, by name in the subsystem mem."""

PICTURE: Final[dict[str, Any]] = {"width": 640, "height": 360, "format": "YUYV"}

SYSTEM_HEAP_IS_CONTIGUOUS: Final = '[heaps]\ncontiguous = ["sys*"]\n'
"""What an administrator says whose contiguous heap has a name that nobody could know. (Here it is not true.)"""


@pytest.fixture(scope="module", autouse=True)
def devices(service: RunningService) -> Iterator[None]:
    """A service that knows the made-up devices; afterwards one that does not."""
    with made_up(DEVICES):
        unit.systemctl("restart", unit.UNIT)
        yield
    unit.systemctl("restart", unit.UNIT)


@contextmanager
def another_service(*program: str) -> Iterator[RunningService]:
    with PrivateBus() as bus, own_service(bus.address, config=SYSTEM_HEAP_IS_CONTIGUOUS, program=program) as running:
        yield running


@pytest.fixture(scope="module")
def blind_service(devices: None) -> Iterator[RunningService]:
    """One that ignores constraints."""
    with another_service("-P", str(BLIND)) as running:
        yield running


@pytest.fixture
async def blind(blind_service: RunningService) -> AsyncIterator[Peer]:
    """A connection to it."""
    peer = await Peer.connect(blind_service.address)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def vivid() -> Iterator[list[str]]:
    """Two of the kernel's virtual cameras: the first takes any memory, the second contiguous memory alone."""
    modprobe("vivid", "n_devs=2", "allocators=0,1", "node_types=0x1,0x1")
    try:
        # One platform device for both: only the names tell them apart.
        nodes = Path("/sys/class/video4linux").iterdir()
        found = {(node / "name").read_text().strip(): f"/dev/{node.name}" for node in nodes}
        yield [found[f"vivid-{number:03}-vid-cap"] for number in (0, 1)]
    finally:
        modprobe("--remove", "vivid")


def exporter(info: dict[str, Any]) -> str:
    """Return who exported a buffer, by the kernel."""
    return bufinfo()[info["inode"]].exporter


# ---- 7 --------------------------------------------------------------------------------------------------------------


async def check_7(peer: Peer) -> None:
    """A program writes a picture as the service lays it out; each device reads it right.

    A device counts rows in units of its own, and what is left over of a stride is lost: it does not refuse, it shows
    garbage.
    """
    width, height = 376, 464
    picture = np.frombuffer(secrets.token_bytes(4 * width * height), dtype=np.uint8).reshape(height, 4 * width)
    for named, units in ((["mem:null"], [1024]), (["mem:zero"], [768]), (["mem:null", "mem:zero"], [1024, 768])):
        path, fd, info = await peer.allocate(width=width, height=height, format="XR24", devices=named)
        (stride,) = info["strides"]
        with mapped(fd, info["size"]) as view:
            _rows(view, picture.shape, stride)[:] = picture
            right = [np.array_equal(_rows(view, picture.shape, stride // unit * unit), picture) for unit in units]
        assert all(right), f"of the devices {named} some see a corrupt picture in rows of {stride}"
        await release(peer, path, fd)


def _rows(view: memoryview, shape: tuple[int, ...], stride: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    memory = np.frombuffer(view, dtype=np.uint8)
    return np.lib.stride_tricks.as_strided(memory, shape, (stride, 1))


async def test_pain_7_stride_guessed(peer: Peer, blind: Peer) -> None:
    """xbmc/xbmc#27895, Smithay/smithay#2084, pop-os/cosmic-comp#151: alignments are constants in as many programs."""
    await check_7(peer)
    with pytest.raises(AssertionError, match="corrupt picture in rows of 1536"):
        await check_7(blind)


# ---- 8 --------------------------------------------------------------------------------------------------------------


async def check_8(peer: Peer) -> None:
    """The kernel says how large the buffers are, and two drivers what they want: more than the picture needs."""
    path, fd, info = await peer.allocate(width=1600, height=1068, format="XR24", devices=["mem:full"])
    wanted = info["strides"][0] * 1072
    present = os.lseek(fd.fileno(), 0, os.SEEK_END)
    assert info["size"] == present
    assert present >= wanted, f"the driver pads the height, and misses {wanted - present} bytes"
    await release(peer, path, fd)

    path, fd, info = await peer.allocate(width=256, height=256, format="XR24", devices=["mem:random"])
    wanted = -(-(256 * 256 * 4 + 64) // PAGE) * PAGE
    present = os.lseek(fd.fileno(), 0, os.SEEK_END)
    assert info["size"] == present
    assert present >= wanted, f"the driver wants 64 bytes behind the picture, and misses {wanted - present} bytes"
    with mapped(fd, present) as view:
        view[wanted - 1] = 1
    await release(peer, path, fd)


async def test_pain_8_hidden_tail_padding(peer: Peer, blind: Peer) -> None:
    """MrOz59/Apollo-Linux#22 (1600 x 1068 fell 24,576 bytes short), toyota-connected/ivi-homescreen#598."""
    await check_8(peer)
    with pytest.raises(AssertionError, match="misses 24576 bytes"):
        await check_8(blind)


# ---- 9 --------------------------------------------------------------------------------------------------------------


def takes(node: str, fd: int, info: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the kernel's driver imports the buffer, and its reason."""
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in info.items()}
    outcome = verify(node, fd, BufferInfo(**known))
    assert outcome.tried or outcome.taken, outcome.reason
    return outcome.taken, outcome.reason


async def check_9(peer: Peer, service: RunningService, camera: str, easy: str) -> None:
    """Contiguous memory is what the camera's driver takes; and for the camera by name there is nothing else."""
    for number in range(3):
        name = f"for-a-camera-{number}"
        path, fd, info = await peer.allocate(**PICTURE, constraints=demands(contiguous=True), name=name)
        pieces = frames.runs(frames.of_buffer(service.pid, name, info["size"]))
        assert takes(easy, fd.fileno(), info)[0], "a camera that takes anything does not take this"
        taken, reason = takes(camera, fd.fileno(), info)
        assert taken, f"the camera does not take {pieces} pieces of memory: {reason}"
        assert pieces == 1
        await release(peer, path, fd)


async def check_9_by_name(peer: Peer, camera: str) -> None:
    """There may be none that suits the camera; then no memory is made, and the answer says what of it is missing."""
    before = bufinfo().keys()
    try:
        path, fd, info = await peer.allocate(**PICTURE, devices=[camera])
    except RemoteError as refusal:
        assert refusal.name == error("NoAllocator")
        assert camera in str(refusal)
        assert "contiguous" in str(refusal)
        assert bufinfo().keys() == before
    else:
        taken, reason = takes(camera, fd.fileno(), info)
        assert taken, f"the camera does not take what was meant for it: {reason}"
        await release(peer, path, fd)


async def test_pain_9_non_contiguous_memory(
    service: RunningService, peer: Peer, blind_service: RunningService, blind: Peer, vivid: list[str]
) -> None:
    """raspberrypi/linux#6706, toyota-connected/ivi-homescreen#219: found out at import, and only sometimes."""
    easy, camera = vivid
    # From above, what is scattered would be copied to adjacent places for a device of 32 bits.
    assert frames.highest_address() < 1 << 32, "this needs a machine without memory above 4 GiB, as --memory 3G"
    with huge_pages(4), frames.scattered(64 * MIB):
        await check_9(peer, service, camera, easy)
        await check_9_by_name(peer, camera)
        with pytest.raises(AssertionError, match="the camera does not take [0-9]{2,} pieces of memory"):
            await check_9(blind, blind_service, camera, easy)
        with pytest.raises(AssertionError, match="the camera does not take what was meant for it"):
            await check_9_by_name(blind, camera)


# ---- 10 -------------------------------------------------------------------------------------------------------------


async def check_10(peer: Peer, service: RunningService) -> None:
    """The program names its device and nothing else; which heap that means is said in the database."""
    path, fd, info = await peer.allocate(size=64 * PAGE, devices=["mem:urandom"])
    assert exporter(info) == "system", f"the heap was to serve this device, and {exporter(info)} did"
    await release(peer, path, fd)
    path, fd, info = await peer.allocate(size=64 * PAGE, devices=["mem:kmsg"], name="for-another")
    assert frames.runs(frames.of_buffer(service.pid, "for-another", info["size"])) == 1
    await release(peer, path, fd)
    path, fd, info = await peer.allocate(size=64 * PAGE)
    assert exporter(info) == "udmabuf", "what no device says anything of is the first allocator's"
    await release(peer, path, fd)


async def test_pain_10_no_heap_per_device(
    service: RunningService, peer: Peer, blind_service: RunningService, blind: Peer
) -> None:
    """analogdevicesinc/libiio#1260, qualcomm-linux/meta-qcom#3100: environment variables, and patches."""
    with huge_pages(2):
        await check_10(peer, service)
        with pytest.raises(AssertionError, match="and udmabuf did"):
            await check_10(blind, blind_service)


# ---- 11 -------------------------------------------------------------------------------------------------------------


async def check_any_heap(peer: Peer) -> None:
    """The program wants a heap, whatever this kernel calls it."""
    path, fd, info = await peer.allocate(size=64 * PAGE, constraints=demands(allocators=["heap:*"]))
    heaps = {f"heap:{node.name}": node.name for node in Path("/dev/dma_heap").iterdir()}
    assert exporter(info) in heaps.values(), f"no heap served, but {exporter(info)}"
    assert heaps[info["allocator"]] == exporter(info)
    await release(peer, path, fd)


async def check_role(peer: Peer) -> None:
    """The program wants contiguous memory, and gets it of the heap that is said to have it."""
    path, fd, info = await peer.allocate(size=64 * PAGE, constraints=demands(contiguous=True))
    (serving,) = [row for row in await allocators(peer) if row["allocator"] == info["allocator"]]
    assert serving["contiguous"], f"{serving['allocator']} served, which gives no contiguous memory"
    assert exporter(info) == "system"
    await release(peer, path, fd)


async def test_pain_11_heap_names_differ(peer: Peer, blind: Peer) -> None:
    """raspberrypi/linux#3571 ("a pain to manage"), libiio#1329: by kernel, command line, boot. None is said here."""
    await check_any_heap(peer)
    with pytest.raises(AssertionError, match="no heap served, but udmabuf"):
        await check_any_heap(blind)
    with another_service() as running:
        seeing = await Peer.connect(running.address)
        await check_role(seeing)
        seeing.close()
    with pytest.raises(AssertionError, match="udmabuf served, which gives no contiguous memory"):
        await check_role(blind)
