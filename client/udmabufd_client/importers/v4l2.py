# SPDX-License-Identifier: MIT
"""V4L2 devices as importers: one buffer is queued as V4L2_MEMORY_DMABUF, and everything undone.

VIDIOC_QBUF attaches and maps the dma-buf before any picture is taken, so no stream is started: a camera's light stays
off. A device's format is everybody's, not only this program's: it is changed only where the buffer demands it, and set
again afterwards. Structures and calls are v4l2_abi.py's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from udmabufd_base.fd import OwnedFd
from udmabufd_client.importers import v4l2_abi as abi
from udmabufd_client.importers.outcome import Outcome, Refused, Step
from udmabufd_client.importers.v4l2_abi import BufType, Cap
from udmabufd_client.info import BufferInfo

_SAME: Final = (
    *("NV12", "NV21", "NV16", "NV61", "NV24", "NV42", "P010", "YU12", "YV12", "YUYV", "YVYU", "UYVY", "VYUY"),
    *("XR24", "AR24", "XB24", "AB24", "RX24", "RA24", "BX24", "BA24", "XR15", "AR15", "XR12", "AR12"),
)
FOURCCS: Final = {**{code: code for code in _SAME}, "RG24": "BGR3", "BG24": "RGB3", "RG16": "RGBP", "R8  ": "GREY"}
"""V4L2's fourcc of each of DRM's (include/uapi/drm/drm_fourcc.h) that stands for the same bytes in memory.

Of others the same letters may mean another order of bytes, as AYUV does, or a Bayer pattern, as BG16 would.
"""

_SMALLEST: Final = (160, 120)
"""Pixels to which a device is set whose pictures do not fit; it takes the next that it can."""

_QUEUES: Final = (
    (Cap.VIDEO_CAPTURE, BufType.VIDEO_CAPTURE),
    (Cap.VIDEO_OUTPUT, BufType.VIDEO_OUTPUT),
    (Cap.VIDEO_M2M, BufType.VIDEO_OUTPUT),
    (Cap.VIDEO_M2M, BufType.VIDEO_CAPTURE),
    (Cap.VIDEO_CAPTURE_MPLANE, BufType.VIDEO_CAPTURE_MPLANE),
    (Cap.VIDEO_OUTPUT_MPLANE, BufType.VIDEO_OUTPUT_MPLANE),
    (Cap.VIDEO_M2M_MPLANE, BufType.VIDEO_OUTPUT_MPLANE),
    (Cap.VIDEO_M2M_MPLANE, BufType.VIDEO_CAPTURE_MPLANE),
    (Cap.VBI_CAPTURE, BufType.VBI_CAPTURE),
    (Cap.VBI_OUTPUT, BufType.VBI_OUTPUT),
    (Cap.SLICED_VBI_CAPTURE, BufType.SLICED_VBI_CAPTURE),
    (Cap.SLICED_VBI_OUTPUT, BufType.SLICED_VBI_OUTPUT),
    (Cap.SDR_CAPTURE, BufType.SDR_CAPTURE),
    (Cap.SDR_OUTPUT, BufType.SDR_OUTPUT),
    (Cap.META_CAPTURE, BufType.META_CAPTURE),
    (Cap.META_OUTPUT, BufType.META_OUTPUT),
)


@dataclass
class _Trial:
    """One buffer, one open device; `done` collects what was found, queue by queue."""

    device: int
    fd: int
    size: int
    info: BufferInfo
    driver: str
    done: list[str] = field(default_factory=list)

    def how(self, queue: BufType | None = None, what: str = "") -> str:
        """Return what was asked of which driver, `queue` being the one that is asked now."""
        asked = [*self.done, *([_named(queue, what)] if queue else [])]
        return f"V4L2 import by {self.driver}{': ' if asked else ''}{', '.join(asked)}"


def take(device: OwnedFd, fd: int, info: BufferInfo) -> Outcome:
    """Queue the dma-buf `fd` in each queue that the V4L2 device has, one after the other. Raises Refused."""
    capability = abi.Capability()
    try:
        abi.call(device.fileno(), abi.VIDIOC_QUERYCAP, capability)
    except OSError as error:
        raise Refused(Step.USE, error, "VIDIOC_QUERYCAP") from error
    driver = capability.driver.decode(errors="backslashreplace")
    trial = _Trial(device.fileno(), fd, os.lseek(fd, 0, os.SEEK_END), info, driver)
    queues = queues_of(capability)
    if not queues:
        hint = "it has no queue of buffers: it is a tuner, or is written to and read from only"
        raise Refused(Step.USE, OSError(errno.ENOTTY, os.strerror(errno.ENOTTY)), trial.how(), hint)
    untaken = None
    for queue in queues:
        try:
            trial.done.append(_named(queue, _try_queue(trial, queue)))
        except Refused as refused:
            # A sliced-VBI queue shares its node with the raw one, and a device may have one queue that imports.
            if refused.step is Step.IMPORT or refused.error.errno != errno.EINVAL:
                raise
            untaken = refused
    if not trial.done:
        assert untaken is not None
        raise untaken
    return Outcome(True, trial.how())


def queues_of(capability: abi.Capability) -> list[BufType]:
    """Return the queues that a device has which streams; those of this very node, not of all that belong to it."""
    every: int = capability.capabilities
    caps: int = capability.device_caps if every & abi.V4L2_CAP_DEVICE_CAPS else every
    if not caps & abi.V4L2_CAP_STREAMING:
        return []
    return list(dict.fromkeys(queue for cap, queue in _QUEUES if caps & cap))


def _named(queue: BufType, what: str) -> str:
    return f"{queue.label} queue{f' ({what})' if what else ''}"


def _try_queue(trial: _Trial, queue: BufType) -> str:
    """Queue the buffer; return with what format. Raises Refused."""
    with _format(trial, queue) as what, _requested(trial, queue, what):
        _queue(trial, queue, what)
        return what


@contextmanager
def _format(trial: _Trial, queue: BufType) -> Iterator[str]:
    """Give the device a format that fits the buffer for as long as the block; yield it, for people."""
    if not queue.picture:
        yield ""
        return
    with _asking(trial, queue):
        before = _format_call(trial, abi.VIDIOC_G_FMT, abi.Format(type=queue))
    wanted = next((one for one in _candidates(trial, before) if _fits(one, trial.size)), None)
    if wanted is None or _describe(wanted) == _describe(before):
        # What is too small for every picture is the kernel's to refuse.
        yield _describe(before)
        return
    try:
        with _asking(trial, queue):
            now = _format_call(trial, abi.VIDIOC_S_FMT, wanted)
        yield _describe(now)
    finally:
        # Whoever took the device over meanwhile has set another.
        with suppress(OSError):
            _format_call(trial, abi.VIDIOC_S_FMT, before)


def _candidates(trial: _Trial, before: abi.Format) -> Iterator[abi.Format]:
    """Yield formats as the device would take them: the picture's, what is set now, a small one, a small one of one
    plane in memory.
    """
    info = trial.info
    letters = FOURCCS.get(info.format or "")
    if letters and info.width and info.height and info.strides:
        tried = _tried(trial, before, info.width, info.height, abi.code_of(letters), info.strides[0])
        if tried is not None and _describe(tried).startswith(f"{letters.rstrip()} {info.width}x{info.height}, "):
            yield tried
    yield before
    for code in (_picture(before).pixelformat, *_pixel_formats(trial, before.type)):
        small = _tried(trial, before, *_SMALLEST, code)
        if small is not None:
            yield small


def _tried(
    trial: _Trial, before: abi.Format, width: int, height: int, code: int, stride: int = 0
) -> abi.Format | None:
    """Return what the device makes of a format, without setting it; None if it refuses to say."""
    wanted = abi.Format.from_buffer_copy(before)
    picture = _picture(wanted)
    picture.width, picture.height, picture.pixelformat = width, height, code
    picture.field = abi.V4L2_FIELD_ANY
    if BufType(before.type).multiplanar:
        for plane in picture.plane_fmt:
            plane.sizeimage = plane.bytesperline = 0
        picture.plane_fmt[0].bytesperline = stride
    else:
        picture.bytesperline, picture.sizeimage = stride, 0
    try:
        return _format_call(trial, abi.VIDIOC_TRY_FMT, wanted)
    except OSError:
        return None


def _pixel_formats(trial: _Trial, queue: int) -> Iterator[int]:
    """Yield what the queue offers."""
    with suppress(OSError):  # EINVAL after the last.
        for index in range(1024):
            yield abi.call(trial.device, abi.VIDIOC_ENUM_FMT, abi.FmtDesc(index=index, type=queue)).pixelformat


@contextmanager
def _requested(trial: _Trial, queue: BufType, what: str) -> Iterator[None]:
    """Have a queue of one imported buffer for as long as the block."""
    with _asking(trial, queue, what):
        request = abi.RequestBuffers(count=1, type=queue, memory=abi.V4L2_MEMORY_DMABUF)
        abi.call(trial.device, abi.VIDIOC_REQBUFS, request)
    try:
        yield
    finally:
        # Takes the buffer out of the queue, unmaps and detaches it; a kernel that would not does so on close.
        with suppress(OSError):
            request = abi.RequestBuffers(count=0, type=queue, memory=abi.V4L2_MEMORY_DMABUF)
            abi.call(trial.device, abi.VIDIOC_REQBUFS, request)


def _queue(trial: _Trial, queue: BufType, what: str) -> None:
    """Queue the buffer, in each of its planes. Raises Refused."""
    planes = (abi.Plane * abi.VIDEO_MAX_PLANES)()
    buffer = abi.Buffer(type=queue, memory=abi.V4L2_MEMORY_DMABUF)
    if queue.multiplanar:
        buffer.m.planes = planes
        buffer.length = abi.VIDEO_MAX_PLANES
    with _asking(trial, queue, what):
        abi.call(trial.device, abi.VIDIOC_QUERYBUF, buffer)
    # What the driver needs, plane by plane; for a queue of imported buffers that is known before there is one.
    count = buffer.length if queue.multiplanar else 1
    needed = max(plane.length for plane in planes[:count]) if queue.multiplanar else buffer.length
    if needed > trial.size:
        hint = f"it needs {needed} bytes{f' for {what}' if what else ''}, and the buffer has {trial.size}"
        raise Refused(Step.USE, OSError(errno.EINVAL, os.strerror(errno.EINVAL)), trial.how(queue, what), hint)
    if queue.multiplanar:
        for plane in planes[:count]:
            plane.m.fd, plane.bytesused, plane.data_offset = trial.fd, plane.length if queue.output else 0, 0
            plane.length = trial.size
    else:
        buffer.m.fd, buffer.bytesused = trial.fd, buffer.length if queue.output else 0
        buffer.length = trial.size
    buffer.flags = buffer.field = 0
    try:
        abi.call(trial.device, abi.VIDIOC_QBUF, buffer)
    except OSError as error:
        raise Refused(Step.IMPORT, error, trial.how(queue, what), _hint(error)) from error


def _hint(error: OSError) -> str:
    """Return what EFAULT means here: videobuf2 has it for memory that it could attach to and not use."""
    if error.errno != errno.EFAULT:
        return ""
    return (
        "it needs physically contiguous memory, or memory that the CPU maps for it where this one's exporter cannot. "
        "'udmabufctl explain --device {path}' says which allocator suits it"
    )


@contextmanager
def _asking(trial: _Trial, queue: BufType, what: str = "") -> Iterator[None]:
    """Make the refusal of a call before the buffer is seen one of Step.USE."""
    try:
        yield
    except OSError as error:
        raise Refused(Step.USE, error, trial.how(queue, what)) from error


def _format_call(trial: _Trial, request: int, wanted: abi.Format) -> abi.Format:
    """Make a call with a copy of `wanted`: the driver writes into it. Raises OSError."""
    return abi.call(trial.device, request, abi.Format.from_buffer_copy(wanted))


def _picture(given: abi.Format) -> abi.PixFormatMplane | abi.PixFormat:
    """Return the part of `given` that its type makes valid, whose common fields have the same names."""
    picture: abi.PixFormatMplane | abi.PixFormat
    picture = given.fmt.pix_mp if BufType(given.type).multiplanar else given.fmt.pix
    return picture


def _fits(given: abi.Format, size: int) -> bool:
    """Whether a buffer of `size` bytes is large enough, for each plane by itself."""
    picture = _picture(given)
    if isinstance(picture, abi.PixFormat):
        return bool(picture.sizeimage <= size)
    return all(plane.sizeimage <= size for plane in picture.plane_fmt[: picture.num_planes])


def _describe(given: abi.Format) -> str:
    """Return fourcc, pixels and the bytes from row to row, for people and for comparing."""
    picture = _picture(given)
    stride = picture.bytesperline if isinstance(picture, abi.PixFormat) else picture.plane_fmt[0].bytesperline
    return f"{abi.fourcc(picture.pixelformat)} {picture.width}x{picture.height}, rows {stride} bytes apart"
