# SPDX-License-Identifier: MIT
"""What the service says of devices, against the kernel's own answer: every device of the guest, and real pictures."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bus.peer import Peer, plain, spec
from tests.bus.service import RunningService
from tests.kernel import frames, v4l2
from tests.kernel.buffers import MIB, mapped
from tests.kernel.demands import demands
from tests.kernel.hugepools import HUGE, huge_pages
from tests.kernel.importing import Vivid, drm_nodes, loaded
from tests.kernel.v4l2 import ctl, queued
from tests.kernel.witness import bufinfo
from udmabufd_base.fd import OwnedFd
from udmabufd_client import cli
from udmabufd_client.importers import Outcome, verify
from udmabufd_client.info import BufferInfo

pytestmark = pytest.mark.guest

WIDTH, HEIGHT = 640, 360
PATTERN = 0xA5


@pytest.fixture(scope="module")
def bochs() -> Iterator[list[Path]]:
    """The card of another device with mode setting."""
    others = set(drm_nodes())
    with loaded("bochs"):
        yield [node for node in drm_nodes() if node not in others]


@pytest.fixture
def pool() -> Iterator[None]:
    """Huge pages for udmabuf-2M. Before `peer`, so that its buffers are gone when they are to be back."""
    with huge_pages(4):
        yield


@dataclass(frozen=True)
class Made:
    """A buffer of the service: its allocator, its descriptor, and what its memory is like."""

    allocator: str
    fd: OwnedFd
    runs: int


@pytest.fixture
async def made(pool: None, service: RunningService, peer: Peer) -> list[Made]:
    """2 MiB in many pieces, and 2 MiB in one, which pagemap tells of the memfd that the service has for each."""
    buffers = []
    with frames.scattered(16 * MIB):
        for allocator in ("udmabuf", "udmabuf-2M"):
            name = f"verdict-{allocator}"
            _, fd, info = await peer.allocate(size=HUGE, allocator=allocator, name=name)
            assert (info["allocator"], info["size"]) == (allocator, HUGE)
            buffers.append(Made(allocator, fd, frames.runs(frames.of_buffer(service.pid, name, HUGE))))
    assert buffers[0].runs > 1
    assert buffers[1].runs == 1
    return buffers


async def explained(peer: Peer, allocator: str, **values: Any) -> dict[str, Any]:
    """The service's verdict on an allocator."""
    (rows,) = await peer.call("Explain", "a{sv}", spec(**values))
    (row,) = [row for row in map(plain, rows) if row["allocator"] == allocator]
    return row


async def test_the_service_and_the_kernel_agree_on_every_device(
    pool: None, peer: Peer, vivid: Vivid, vgem: Path, virtio_gpu: list[Path], bochs: list[Path], made: list[Made]
) -> None:
    """Both verdicts occur. Where the service refuses what the driver takes, pictures get lost in it."""
    (rows,) = await peer.call("ListDevices")
    listed = {row["device"]: row for row in map(plain, rows)}
    assert {str(node) for node in (vgem, *virtio_gpu, *bochs, *vivid.nodes())} <= set(listed)
    agreed: Counter[bool] = Counter()
    wrong = []
    untried, refused_though_taken = set(), set()
    for device, row in listed.items():
        if row["subsystem"] not in ("drm", "video4linux"):
            continue
        for buffer in made:
            outcome = asked(device, buffer.fd, vivid)
            verdict = await explained(peer, buffer.allocator, size=HUGE, devices=[device])
            if not outcome.tried:
                untried.add(device)
            elif verdict["ok"] == outcome.taken:
                agreed[outcome.taken] += 1
            elif outcome.taken and verdict["field"] == "allocators":
                refused_though_taken.add((device, buffer.allocator))
            else:
                wrong.append((verdict, outcome))
    assert not wrong
    # A radio has no buffers.
    assert untried == {str(node) for node in vivid.nodes() if node.name.startswith("radio")}
    assert agreed[True] >= 10
    assert agreed[False] >= 10
    # The third instance maps as the first does.
    explained_by_pictures = {
        (str(node), buffer.allocator)
        for instance in (0, 1)
        for buffer in made
        if verify(str(vivid.node(instance)), buffer.fd.fileno(), BufferInfo()).taken
        and picture_is_lost(vivid.node(instance), buffer.fd)
        for node in vivid.nodes()
        if vivid.instance(node) % 2 == instance
    }
    assert refused_though_taken <= explained_by_pictures


def asked(device: str, fd: OwnedFd, vivid: Vivid) -> Outcome:
    """The kernel's verdict, from whichever input lets it be asked."""
    outcome = verify(device, fd.fileno(), BufferInfo())
    if outcome.tried:
        return outcome
    with television(vivid):
        return verify(device, fd.fileno(), BufferInfo())


@contextmanager
def television(vivid: Vivid) -> Iterator[None]:
    """Have the cameras' input be TV, without which there is no VBI; with it there is no metadata."""
    for instance in range(3):
        ctl(vivid.node(instance), "--set-input=1")
    try:
        yield
    finally:
        for instance in range(3):
            ctl(vivid.node(instance), "--set-input=0")


def picture_is_lost(node: Path, fd: OwnedFd) -> bool:
    """Whether a frame that the driver says to have captured into a buffer is not there."""
    v4l2.still(node, WIDTH, HEIGHT, "YUYV")
    with mapped(fd, HUGE) as view:
        view[:] = bytes([PATTERN]) * HUGE
    with queued(node, [fd, fd]) as camera:
        frame, *_ = v4l2.frames(camera, 2)
    with mapped(fd, HUGE) as view:
        return bytes(view[frame.size // 2 : frame.size]) == bytes([PATTERN]) * (frame.size - frame.size // 2)


@pytest.mark.parametrize(("drm", "fourcc"), [("NV12", "NV12"), ("XR24", "XR24"), ("YUYV", "YUYV")])
async def test_a_buffer_for_two_devices_is_imported_and_captured_into(
    peer: Peer, vivid: Vivid, vgem: Path, drm: str, fourcc: str, tmp_path: Path
) -> None:
    """Asked for by devices: vgem attaches to it, and vivid's frames lie where the service says that planes are."""
    devices = [str(vgem), str(vivid.mapped)]
    keys = {"width": WIDTH, "height": HEIGHT, "format": drm, "devices": devices}
    path, first, info = await peer.allocate(**keys)
    buffers = [first, *[(await peer.allocate(**keys))[1] for _ in range(3)]]
    rows = [plain(row) for row in await peer.get("Attachments", path=path)]
    assert [row["device"] for row in rows] == devices
    layout = BufferInfo(
        width=WIDTH,
        height=HEIGHT,
        format=drm,
        strides=tuple(info["strides"]),
        offsets=tuple(info["offsets"]),
    )
    for device in devices:
        outcome = verify(device, first.fileno(), layout)
        assert outcome.taken, outcome.reason
    # The same picture by a foreign program, without padding.
    v4l2.still(vivid.mapped, WIDTH, HEIGHT, fourcc)
    expected = v4l2.reference(vivid.mapped, tmp_path)
    v4l2.still(vivid.mapped, WIDTH, HEIGHT, fourcc, info["strides"][0])
    with queued(vivid.mapped, buffers) as camera:
        captured = v4l2.frames(camera, len(buffers))
    assert [frame.index for frame in captured] == [0, 1, 2, 3]
    visible = {"NV12": [(WIDTH, HEIGHT), (WIDTH, HEIGHT // 2)], "XR24": [(4 * WIDTH, HEIGHT)]}
    for buffer in buffers:
        with mapped(buffer, info["size"]) as view:
            found = b"".join(
                bytes(view[offset + row * stride : offset + row * stride + width])
                for offset, stride, (width, rows_) in zip(
                    info["offsets"], info["strides"], visible.get(drm, [(2 * WIDTH, HEIGHT)]), strict=True
                )
                for row in range(rows_)
            )
        assert found == expected


async def test_one_piece_that_was_asked_for_is_attached(pool: None, peer: Peer, vivid: Vivid) -> None:
    """By constraints: huge pages, which the importer that wants one piece attaches to."""
    wanted = {"contiguous": True, "address_bits": 32}
    _, fd, info = await peer.allocate(size=HUGE, constraints=demands(**wanted))
    assert info["allocator"] == "udmabuf-2M"
    outcome = verify(str(vivid.contiguous), fd.fileno(), BufferInfo())
    assert outcome.taken, outcome.reason
    with queued(vivid.contiguous, [fd]):
        assert bufinfo()[info["inode"]].devices == ("vivid.0",)


# udmabufctl


def udmabufctl(*words: str, user: str) -> subprocess.CompletedProcess[str]:
    """Run the installed udmabufctl as a user."""
    return subprocess.run(
        ["runuser", "-u", user, "--", "udmabufctl", *words], capture_output=True, text=True, timeout=300
    )


def test_udmabufctl_verify(
    vivid: Vivid, vgem: Path, virtio_gpu: list[Path], pool: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken and refused, the service's word beside it."""

    def said(*words: str) -> tuple[int, str, str]:
        return (cli.main(["verify", *words]), *capsys.readouterr())

    status, out, err = said("--size", "1M", str(vgem))
    assert (status, err) == (0, "")
    assert "kernel   taken: PRIME import by vgem\n" in out
    assert "service  suitable\n" in out
    assert "agree    yes\n" in out
    status, out, err = said("--size", "1M", str(virtio_gpu[1]), "--json")
    assert (status, err) == (1, "")
    shown = json.loads(out)
    assert (shown["taken"], shown["error"], shown["agree"]) == (False, "ENODEV", True)
    assert shown["service"]["suits"] is False
    status, out, err = said("--format", "NV12", "640x360", str(vivid.mapped), "--json")
    assert (status, err) == (0, "")
    assert "NV12 640x360, rows 768 bytes apart" in json.loads(out)["how"]
    status, out, err = said("--size", "1M", "--constraint", "contiguous", str(vivid.contiguous))
    assert (status, err) == (0, "")
    assert "udmabuf-2M" in out


def test_udmabufctl_verify_as_a_user(vivid: Vivid, vgem: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the user's own rights: alice holds a buffer and may not open devices, bob does not get it, root does."""
    held = json.loads(udmabufctl("alloc", "--size", "1M", "--background", "--json", user="alice").stdout)
    try:
        run = udmabufctl("verify", held["id"], str(vgem), user="alice")
        assert run.returncode == 1
        assert "this user may not open it" in run.stderr
        assert "agree    -\n" in run.stdout
        run = udmabufctl("verify", held["id"], str(vgem), user="bob")
        assert run.returncode == 1
        assert "another user's" in run.stderr
        assert cli.main(["verify", held["id"], str(vgem), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["buffer"], shown["taken"]) == (held["buffer"], True)
    finally:
        assert cli.main(["release", held["id"]]) == 0
