# SPDX-License-Identifier: MIT
"""For programs that hand buffers on: the arguments of linux-dmabuf, and planes as numpy arrays.

Imports none of those programs' libraries but numpy, and that only when it is asked for an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from udmabufd_client.buffer import BufferBase
from udmabufd_client.info import Plane

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class DmabufPlane(NamedTuple):
    """The arguments of zwp_linux_buffer_params_v1.add, in its order; offset and stride in bytes."""

    fd: int
    plane_index: int
    offset: int
    stride: int
    modifier_hi: int
    modifier_lo: int


def linux_dmabuf_planes(buffer: BufferBase) -> tuple[DmabufPlane, ...]:
    """Return one tuple per plane: `for plane in linux_dmabuf_planes(buffer): params.add(*plane)`.

    The descriptor is borrowed: libwayland makes its own copy of it when it queues the request. Raises ValueError for
    a buffer without planes (asked for by size) or without a descriptor.
    """
    info = buffer.info
    if not info.planes:
        raise ValueError(f"{buffer!r} has no planes: allocate it with width, height and format")
    modifier = info.modifier or 0
    return tuple(
        DmabufPlane(buffer.fileno(), plane.index, plane.offset, plane.stride, modifier >> 32, modifier & 0xFFFFFFFF)
        for plane in info.planes
    )


def plane_array(
    view: memoryview, plane: Plane, shape: Sequence[int], dtype: npt.DTypeLike = "u1"
) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a plane of the buffer that `view` shows as a numpy array over the same memory.

    `shape` is (rows, columns) or (rows, columns, values per pixel) in items of `dtype`: (480, 640, 4) of bytes for the
    one plane of XR24, (240, 320, 2) for the chroma plane of NV12 at 640x480. Rows are `plane.stride` bytes apart.
    Raises ValueError when the shape does not fit into the plane.
    """
    import numpy

    item = numpy.dtype(dtype)
    rows, *row = shape
    row_bytes = item.itemsize * int(numpy.prod(row, dtype=object))
    if row_bytes > plane.stride or (rows and (rows - 1) * plane.stride + row_bytes > plane.size):
        raise ValueError(f"{tuple(shape)} of {item} does not fit into {plane}")
    inner = numpy.cumprod([item.itemsize, *reversed(row[1:])])[::-1].tolist() if row else []
    return numpy.ndarray(tuple(shape), item, buffer=plane.of(view), strides=(plane.stride, *inner))
