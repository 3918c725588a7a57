# SPDX-License-Identifier: MIT
"""The part of V4L2's interface that importing needs: structures and calls (include/uapi/linux/videodev2.h).

Thin: each call is one ioctl and raises OSError. Which are made, and in what order, is left to v4l2.py.
"""

from __future__ import annotations

import ctypes
import fcntl
from enum import IntEnum, IntFlag
from typing import Final, TypeVar

VIDEO_MAX_PLANES: Final = 8
V4L2_MEMORY_MMAP: Final = 1
V4L2_MEMORY_DMABUF: Final = 4
V4L2_CAP_DEVICE_CAPS: Final = 0x80000000
V4L2_CAP_STREAMING: Final = 0x04000000
V4L2_FIELD_ANY: Final = 0


class BufType(IntEnum):
    """enum v4l2_buf_type: the queues that a device may have, but for overlays, which have no buffers."""

    VIDEO_CAPTURE = 1
    VIDEO_OUTPUT = 2
    VBI_CAPTURE = 4
    VBI_OUTPUT = 5
    SLICED_VBI_CAPTURE = 6
    SLICED_VBI_OUTPUT = 7
    VIDEO_CAPTURE_MPLANE = 9
    VIDEO_OUTPUT_MPLANE = 10
    SDR_CAPTURE = 11
    SDR_OUTPUT = 12
    META_CAPTURE = 13
    META_OUTPUT = 14

    @property
    def multiplanar(self) -> bool:
        """Whether its buffers are arrays of planes."""
        return self in (BufType.VIDEO_CAPTURE_MPLANE, BufType.VIDEO_OUTPUT_MPLANE)

    @property
    def picture(self) -> bool:
        """Whether its buffers hold pictures, so that there is a width, a height and a fourcc to be set."""
        return self.multiplanar or self in (BufType.VIDEO_CAPTURE, BufType.VIDEO_OUTPUT)

    @property
    def output(self) -> bool:
        """Whether the device reads its buffers."""
        return "OUTPUT" in self.name

    @property
    def label(self) -> str:
        """The queue for people: "video capture"."""
        return self.name.removesuffix("_MPLANE").replace("_", " ").lower().replace("vbi", "VBI").replace("sdr", "SDR")


class Cap(IntFlag):
    """V4L2_CAP_*: those that say which queues a device has."""

    VIDEO_CAPTURE = 0x00000001
    VIDEO_OUTPUT = 0x00000002
    VBI_CAPTURE = 0x00000010
    VBI_OUTPUT = 0x00000020
    SLICED_VBI_CAPTURE = 0x00000040
    SLICED_VBI_OUTPUT = 0x00000080
    VIDEO_CAPTURE_MPLANE = 0x00001000
    VIDEO_OUTPUT_MPLANE = 0x00002000
    VIDEO_M2M_MPLANE = 0x00004000
    VIDEO_M2M = 0x00008000
    SDR_CAPTURE = 0x00100000
    SDR_OUTPUT = 0x00400000
    META_CAPTURE = 0x00800000
    META_OUTPUT = 0x08000000


class Capability(ctypes.Structure):
    """struct v4l2_capability."""

    _fields_ = (
        ("driver", ctypes.c_char * 16),
        ("card", ctypes.c_char * 32),
        ("bus_info", ctypes.c_char * 32),
        ("version", ctypes.c_uint32),
        ("capabilities", ctypes.c_uint32),
        ("device_caps", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 3),
    )


class PixFormat(ctypes.Structure):
    """struct v4l2_pix_format."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in (
            "width",
            "height",
            "pixelformat",
            "field",
            "bytesperline",
            "sizeimage",
            "colorspace",
            "priv",
            "flags",
            "ycbcr_enc",
            "quantization",
            "xfer_func",
        )
    )


class PlanePixFormat(ctypes.Structure):
    """struct v4l2_plane_pix_format."""

    _pack_ = 1
    _fields_ = (
        ("sizeimage", ctypes.c_uint32),
        ("bytesperline", ctypes.c_uint32),
        ("reserved", ctypes.c_uint16 * 6),
    )


class PixFormatMplane(ctypes.Structure):
    """struct v4l2_pix_format_mplane."""

    _pack_ = 1
    _fields_ = (
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("pixelformat", ctypes.c_uint32),
        ("field", ctypes.c_uint32),
        ("colorspace", ctypes.c_uint32),
        ("plane_fmt", PlanePixFormat * VIDEO_MAX_PLANES),
        ("num_planes", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("ycbcr_enc", ctypes.c_uint8),
        ("quantization", ctypes.c_uint8),
        ("xfer_func", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 7),
    )


class _FormatUnion(ctypes.Union):
    # `window` has pointers in it, which give the union its alignment.
    _fields_ = (
        ("pix", PixFormat),
        ("pix_mp", PixFormatMplane),
        ("raw_data", ctypes.c_uint8 * 200),
        ("aligned", ctypes.c_void_p),
    )


class Format(ctypes.Structure):
    """struct v4l2_format."""

    _fields_ = (("type", ctypes.c_uint32), ("fmt", _FormatUnion))


class FmtDesc(ctypes.Structure):
    """struct v4l2_fmtdesc."""

    _fields_ = (
        ("index", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("description", ctypes.c_char * 32),
        ("pixelformat", ctypes.c_uint32),
        ("mbus_code", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 3),
    )


class RequestBuffers(ctypes.Structure):
    """struct v4l2_requestbuffers."""

    _fields_ = (
        ("count", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("memory", ctypes.c_uint32),
        ("capabilities", ctypes.c_uint32),
        ("flags", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 3),
    )


class _PlaneMemory(ctypes.Union):
    _fields_ = (("mem_offset", ctypes.c_uint32), ("userptr", ctypes.c_ulong), ("fd", ctypes.c_int32))


class Plane(ctypes.Structure):
    """struct v4l2_plane."""

    _fields_ = (
        ("bytesused", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("m", _PlaneMemory),
        ("data_offset", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32 * 11),
    )


class _Timeval(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_usec", ctypes.c_long))


class _Timecode(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("frames_seconds_minutes_hours_userbits", ctypes.c_uint8 * 8),
    )


class _BufferMemory(ctypes.Union):
    _fields_ = (
        ("offset", ctypes.c_uint32),
        ("userptr", ctypes.c_ulong),
        ("planes", ctypes.POINTER(Plane)),
        ("fd", ctypes.c_int32),
    )


class Buffer(ctypes.Structure):
    """struct v4l2_buffer."""

    _fields_ = (
        ("index", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("bytesused", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("field", ctypes.c_uint32),
        ("timestamp", _Timeval),
        ("timecode", _Timecode),
        ("sequence", ctypes.c_uint32),
        ("memory", ctypes.c_uint32),
        ("m", _BufferMemory),
        ("length", ctypes.c_uint32),
        ("reserved2", ctypes.c_uint32),
        ("request_fd", ctypes.c_int32),
    )


def _number(direction: int, number: int, argument: type[ctypes.Structure] | type[ctypes._SimpleCData[int]]) -> int:
    """Encode as include/uapi/asm-generic/ioctl.h does; alpha, mips, powerpc and sparc differ."""
    return direction << 30 | ctypes.sizeof(argument) << 16 | ord("V") << 8 | number


_WRITE: Final = 1
_READ: Final = 2

VIDIOC_QUERYCAP: Final = _number(_READ, 0, Capability)
VIDIOC_ENUM_FMT: Final = _number(_READ | _WRITE, 2, FmtDesc)
VIDIOC_G_FMT: Final = _number(_READ | _WRITE, 4, Format)
VIDIOC_S_FMT: Final = _number(_READ | _WRITE, 5, Format)
VIDIOC_REQBUFS: Final = _number(_READ | _WRITE, 8, RequestBuffers)
VIDIOC_QUERYBUF: Final = _number(_READ | _WRITE, 9, Buffer)
VIDIOC_QBUF: Final = _number(_READ | _WRITE, 15, Buffer)
VIDIOC_DQBUF: Final = _number(_READ | _WRITE, 17, Buffer)
VIDIOC_STREAMON: Final = _number(_WRITE, 18, ctypes.c_int)
VIDIOC_STREAMOFF: Final = _number(_WRITE, 19, ctypes.c_int)
VIDIOC_TRY_FMT: Final = _number(_READ | _WRITE, 64, Format)

Argument = TypeVar("Argument", bound=ctypes.Structure)


def call(fd: int, request: int, argument: Argument) -> Argument:
    """Make one of the calls above; return its argument as the driver left it. Raises OSError."""
    fcntl.ioctl(fd, request, argument)
    return argument


def fourcc(code: int) -> str:
    """Return a pixel format's four letters, without what is no letter."""
    letters = (code & 0x7FFFFFFF).to_bytes(4, "little")  # the highest bit says big-endian
    return "".join(chr(letter) if 0x20 <= letter < 0x7F else "?" for letter in letters).rstrip()


def code_of(letters: str) -> int:
    """Return the pixel format of four letters. Raises ValueError."""
    return int.from_bytes(letters.ljust(4).encode("ascii"), "little")
