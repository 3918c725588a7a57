# SPDX-License-Identifier: MIT
"""A camera as its programs use it: frames captured into dma-bufs, and v4l2-ctl, which is not ours, for all the rest.

What the frames must be is left to the tests.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from udmabufd_base.fd import OwnedFd
from udmabufd_client.importers import v4l2_abi as abi
from udmabufd_client.importers.v4l2_abi import BufType

_PATIENCE = 60.0
_ERROR = 0x40  # V4L2_BUF_FLAG_ERROR


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture that was captured: into which of the buffers, and how many bytes of it."""

    index: int
    size: int
    sequence: int


def ctl(node: Path, *arguments: str) -> str:
    """Run v4l2-ctl on a device; return what it printed."""
    command = ["v4l2-ctl", f"--device={node}", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def still(node: Path, width: int, height: int, fourcc: str, stride: int = 0, pattern: int = 0) -> None:
    """Set format and picture: vivid's test pattern, without its clock and all that moves."""
    ctl(node, f"--set-fmt-video=width={width},height={height},pixelformat={fourcc},bytesperline={stride}")
    ctl(node, f"--set-ctrl=test_pattern={pattern},osd_text_mode=2,horizontal_movement=3,vertical_movement=3")


def reference(node: Path, folder: Path) -> bytes:
    """Return a frame as v4l2-ctl gets it in memory of the driver's own."""
    file = folder / "reference"
    ctl(node, "--stream-mmap=3", "--stream-count=1", f"--stream-to={file}")
    return file.read_bytes()


@contextmanager
def queued(node: Path, buffers: Sequence[OwnedFd], queue: BufType = BufType.VIDEO_CAPTURE) -> Iterator[OwnedFd]:
    """The device, opened, with dma-bufs in its queue, in this order."""
    with OwnedFd(os.open(node, os.O_RDWR | os.O_CLOEXEC)) as device:
        request = abi.RequestBuffers(count=len(buffers), type=queue, memory=abi.V4L2_MEMORY_DMABUF)
        abi.call(device.fileno(), abi.VIDIOC_REQBUFS, request)
        for index, fd in enumerate(buffers):
            buffer = abi.Buffer(index=index, type=queue, memory=abi.V4L2_MEMORY_DMABUF)
            buffer.m.fd = fd.fileno()
            abi.call(device.fileno(), abi.VIDIOC_QBUF, buffer)
        yield device


def frames(device: OwnedFd, count: int, queue: BufType = BufType.VIDEO_CAPTURE) -> list[Frame]:
    """Have the device fill `count` of the buffers that are queued."""
    found = []
    fcntl.ioctl(device.fileno(), abi.VIDIOC_STREAMON, struct.pack("=i", queue))
    for _ in range(count):
        ready = select.poll()
        ready.register(device.fileno(), select.POLLIN)
        assert ready.poll(_PATIENCE * 1000) == [(device.fileno(), select.POLLIN)]
        buffer = abi.Buffer(type=queue, memory=abi.V4L2_MEMORY_DMABUF)
        abi.call(device.fileno(), abi.VIDIOC_DQBUF, buffer)
        assert not buffer.flags & _ERROR
        found.append(Frame(buffer.index, buffer.bytesused, buffer.sequence))
    fcntl.ioctl(device.fileno(), abi.VIDIOC_STREAMOFF, struct.pack("=i", queue))
    return found
