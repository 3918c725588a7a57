# SPDX-License-Identifier: MIT
"""verify() against real drivers: that they take and refuse as it says, and that nothing of it is left.

Witnesses are bufinfo (what is attached to a buffer), fdinfo (references), and v4l2-ctl (formats, streams).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import open_fds
from tests.kernel import v4l2
from tests.kernel.buffers import PAGE, exported
from tests.kernel.hugepools import HUGE
from tests.kernel.importing import Vivid, drm_nodes, loaded, one_piece, scattered
from tests.kernel.v4l2 import ctl, queued
from tests.kernel.witness import bufinfo
from tests.unit.headers import layout, values
from udmabufd.linux import dmabuf
from udmabufd_base.fd import OwnedFd
from udmabufd_client.importers import Outcome, drm, verify
from udmabufd_client.importers.outcome import Refused
from udmabufd_client.info import BufferInfo

pytestmark = pytest.mark.guest

DRM_IOCTL_SET_MASTER = 0x0000641E  # include/uapi/drm/drm.h

NV12 = BufferInfo(width=640, height=480, format="NV12", strides=(768, 768), offsets=(0, 768 * 480))


@pytest.fixture
def pieces(device: OwnedFd) -> Iterator[OwnedFd]:
    """A dma-buf of 2 MiB in single pages."""
    with scattered(device, HUGE) as fd:
        yield fd


@pytest.fixture
def whole(device: OwnedFd) -> Iterator[OwnedFd]:
    """A dma-buf of 2 MiB in one piece."""
    with one_piece(device) as fd:
        yield fd


def asked(node: Path, fd: OwnedFd, info: BufferInfo | None = None) -> Outcome:
    """What verify() says, with nothing left of it here or in the kernel."""
    before = open_fds(), bufinfo()[dmabuf.inode(fd.fileno())]
    found = verify(str(node), fd.fileno(), info or BufferInfo())
    assert (open_fds(), bufinfo()[dmabuf.inode(fd.fileno())]) == before
    return found


def attached(fd: OwnedFd) -> tuple[str, ...]:
    """The devices that the kernel lists for a dma-buf."""
    return bufinfo()[dmabuf.inode(fd.fileno())].devices


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the kernel's headers; install gcc")
def test_drm_is_as_in_the_headers(tmp_path: Path) -> None:
    names = ("VERSION", "GEM_CLOSE", "DROP_MASTER", "PRIME_FD_TO_HANDLE")
    ours = {f"DRM_IOCTL_{name}": getattr(drm, f"DRM_IOCTL_{name}") for name in names}
    ours["DRM_IOCTL_SET_MASTER"] = DRM_IOCTL_SET_MASTER
    ours |= layout(
        {"drm_version": drm.DrmVersion, "drm_prime_handle": drm.DrmPrimeHandle, "drm_gem_close": drm.DrmGemClose}
    )
    assert values("drm/drm.h", ours, tmp_path) == ours


# DRM


def test_vgem_takes_a_buffer(pieces: OwnedFd, vgem: Path) -> None:
    """And is listed as attached while it has it, by the same calls."""
    assert asked(vgem, pieces) == Outcome(True, "PRIME import by vgem")
    with OwnedFd(os.open(vgem, os.O_RDWR | os.O_CLOEXEC)) as card:
        handle = drm.prime_fd_to_handle(card, pieces.fileno(), "")
        assert attached(pieces) == ("vgem",)
        drm.gem_close(card, handle)
        assert attached(pieces) == ()


def test_a_device_with_mode_setting_gives_its_own_reason(pieces: OwnedFd, virtio_gpu: list[Path]) -> None:
    """virtio_gpu of this kernel imports nothing from others."""
    for node in virtio_gpu:
        found = asked(node, pieces)
        assert (found.taken, found.tried, found.error) == (False, True, "ENODEV")
        assert found.how == "PRIME import by virtio_gpu"
        assert "does not import other devices' memory" in found.reason


def test_verify_is_nobodys_master(pieces: OwnedFd, virtio_gpu: list[Path]) -> None:
    """Whoever opens a card first is its master. verify() gives that up before it asks: a compositor that starts while
    it is busy with a slow driver becomes master.
    """
    card = virtio_gpu[0]
    with OwnedFd(os.open(card, os.O_RDWR | os.O_CLOEXEC)) as ours:
        with OwnedFd(os.open(card, os.O_RDWR | os.O_CLOEXEC)) as theirs:
            with pytest.raises(OSError, match="busy"):
                fcntl.ioctl(theirs.fileno(), DRM_IOCTL_SET_MASTER)
            with pytest.raises(Refused):
                drm.take(ours, pieces.fileno())
            fcntl.ioctl(theirs.fileno(), DRM_IOCTL_SET_MASTER)


# V4L2


def test_vivid_maps_a_buffer_and_attaches_to_none(pieces: OwnedFd, vivid: Vivid) -> None:
    found = asked(vivid.mapped, pieces)
    assert found.taken, found.reason
    assert found.how.startswith("V4L2 import by vivid: video capture queue (")
    alone = dmabuf.fdinfo(pieces.fileno()).count
    with queued(vivid.mapped, [pieces]):
        assert dmabuf.fdinfo(pieces.fileno()).count > alone
        assert attached(pieces) == ()
    assert dmabuf.fdinfo(pieces.fileno()).count == alone


def test_a_contiguous_importer_refuses_pieces(pieces: OwnedFd, vivid: Vivid) -> None:
    found = asked(vivid.contiguous, pieces)
    assert (found.taken, found.tried, found.error) == (False, True, "EFAULT")
    assert "physically contiguous memory" in found.reason
    assert f"explain --device {vivid.contiguous}" in found.reason
    with pytest.raises(OSError, match="Bad address"), queued(vivid.contiguous, [pieces]):
        pass


def test_a_contiguous_importer_takes_one_piece(whole: OwnedFd, vivid: Vivid) -> None:
    found = asked(vivid.contiguous, whole)
    assert found.taken, found.reason
    with queued(vivid.contiguous, [whole]):
        assert attached(whole) == ("vivid.0",)
    assert attached(whole) == ()


@pytest.mark.parametrize("kind", ["vid-cap", "vid-out"])
def test_capture_and_output_of_one_plane_and_of_several(pieces: OwnedFd, vivid: Vivid, kind: str) -> None:
    for instance in (0, 2):
        found = asked(vivid.node(instance, kind), pieces)
        assert found.taken, found.reason
    # NM12 has two planes in memory: the buffer is in each.
    node = vivid.node(2, kind)
    queue, option = ("capture", "video") if kind == "vid-cap" else ("output", "video-out")
    ctl(node, f"--set-fmt-{option}=width=640,height=360,pixelformat=NM12")
    found = asked(node, pieces)
    assert found.taken, found.reason
    assert f"video {queue} queue (NM12 " in found.how


def test_every_kind_of_queue(pieces: OwnedFd, vivid: Vivid) -> None:
    """VBI, software radio, metadata, touch; a radio has none, and a camera's input has no VBI."""
    answers = {node: asked(node, pieces) for node in vivid.nodes()}
    taken = {kind: answers[vivid.node(0, kind)].taken for kind in ("sdr-cap", "meta-cap", "meta-out", "vbi-out")}
    assert all(taken.values()), answers
    assert answers[vivid.node(0, "touch-cap")].taken
    for kind in ("rad-rx", "rad-tx", "vbi-cap"):
        assert not answers[vivid.node(0, kind)].tried
    assert "no queue of buffers" in answers[vivid.node(0, "rad-rx")].reason
    ctl(vivid.mapped, "--set-input=1")  # TV
    try:
        found = asked(vivid.node(0, "vbi-cap"), pieces)
        assert found.taken, found.reason
        assert "VBI capture queue" in found.how
    finally:
        ctl(vivid.mapped, "--set-input=0")


def test_a_picture_is_asked_for_and_the_format_set_back(pieces: OwnedFd, whole: OwnedFd, vivid: Vivid) -> None:
    """Also when the import is refused."""
    for node, fd, taken in (
        (vivid.mapped, pieces, True),
        (vivid.contiguous, whole, True),
        (vivid.contiguous, pieces, False),
        (vivid.planes, pieces, True),
    ):
        ctl(node, "--set-fmt-video=width=1280,height=720,pixelformat=UYVY")
        before = ctl(node, "--get-fmt-video")
        found = asked(node, fd, NV12)
        assert found.taken is taken, found.reason
        assert "video capture queue (NV12 640x480, rows 768 bytes apart)" in found.how
        assert ctl(node, "--get-fmt-video") == before


def test_a_buffer_smaller_than_the_format(device: OwnedFd, vivid: Vivid) -> None:
    """The device is set to smaller pictures for the test; what is too small for all is said with the figures."""
    ctl(vivid.mapped, "--set-fmt-video=width=1280,height=720,pixelformat=UYVY")
    before = ctl(vivid.mapped, "--get-fmt-video")
    with exported(device, 64 * PAGE) as (_, fd):
        found = asked(vivid.mapped, fd)
        assert found.taken, found.reason
        assert "UYVY 320x180" in found.how
    with exported(device, PAGE) as (_, fd):
        found = asked(vivid.mapped, fd)
        assert not found.tried
        assert (
            f"it needs 1843200 bytes for UYVY 1280x720, rows 2560 bytes apart, and the buffer has {PAGE}"
            in found.reason
        )
    assert ctl(vivid.mapped, "--get-fmt-video") == before


def test_a_camera_in_use(pieces: OwnedFd, vivid: Vivid, device: OwnedFd) -> None:
    """Says so, and does not disturb the stream, whose frames go on to come."""
    v4l2.still(vivid.mapped, 640, 360, "YUYV")
    with scattered(device, HUGE) as other, queued(vivid.mapped, [other, other, other]) as camera:
        before = ctl(vivid.mapped, "--get-fmt-video")
        for info in (BufferInfo(), NV12):
            found = asked(vivid.mapped, pieces, info)
            assert (found.taken, found.tried, found.error) == (False, False, "EBUSY")
            assert f"fuser -v {vivid.mapped}" in found.reason
        assert ctl(vivid.mapped, "--get-fmt-video") == before
        assert len(v4l2.frames(camera, 2)) == 2


# Whoever asks


AS_ANOTHER = """
import sys
from udmabufd_client.importers import verify
from udmabufd_client.info import BufferInfo
print(verify(sys.argv[1], int(sys.argv[2]), BufferInfo()).reason)
"""


def test_the_callers_rights_decide(pieces: OwnedFd, vivid: Vivid, vgem: Path) -> None:
    """Alice has the buffer and is not in the group video."""
    for node in (vgem, vivid.mapped):
        said = subprocess.run(
            [sys.executable, "-c", AS_ANOTHER, str(node), str(pieces.fileno())],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[pieces.fileno()],
            env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
            user="alice",
            group="alice",
            extra_groups=[],
        ).stdout
        assert said.startswith(
            f"{node} cannot be opened: this user may not open it: it is for root and the group video"
        )
        assert said.endswith("(EACCES).\n")


def test_a_device_that_went(pieces: OwnedFd) -> None:
    """A node outlives its device where nobody removes it, as in a container."""
    copy = Path("/dev/udmabufd-test")
    others = drm_nodes()
    try:
        with loaded("vgem"):
            number = next(node for node in drm_nodes() if node not in others).stat()
            os.mknod(copy, number.st_mode, number.st_rdev)
            assert asked(copy, pieces).taken
        found = asked(copy, pieces)
    finally:
        copy.unlink(missing_ok=True)
    assert not found.tried
    assert "which the kernel does not have now" in found.reason


def test_many_times(pieces: OwnedFd, vivid: Vivid, vgem: Path, long_run: bool) -> None:
    for _ in range(200 if long_run else 20):
        assert asked(vgem, pieces).taken
        assert asked(vivid.mapped, pieces, NV12).taken
        assert not asked(vivid.contiguous, pieces, NV12).taken


def test_outputs_are_told_how_much_there_is(pieces: OwnedFd, vivid: Vivid) -> None:
    """An output buffer without bytes would be a warning in the kernel's log, of a use that is deprecated."""

    def warned() -> int:
        log = subprocess.run(["dmesg"], check=True, stdout=subprocess.PIPE, text=True).stdout
        return log.count("use of bytesused == 0")

    before = warned()
    assert asked(vivid.node(0, "vid-out"), pieces).taken
    assert warned() == before
