# SPDX-License-Identifier: MIT
"""Where the planes of a linear picture lie in one buffer: offsets and strides from fourcc, width and height.

Covers linear layouts of the formats below; tiled modifiers belong to the devices that know them. Names and plane
orders are those of include/uapi/drm/drm_fourcc.h, where the meaning of each fourcc is written down.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIDE_ALIGNMENT = 256
"""Bytes. What radv and most other importers accept: the value that GStreamer, Smithay and jay settled on."""


@dataclass(frozen=True, slots=True)
class PlaneFormat:
    """One plane: `block_bytes` bytes hold `block_width` samples in a row; subsampled by `hsub` and `vsub`."""

    block_bytes: int
    block_width: int = 1
    hsub: int = 1
    vsub: int = 1

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of a picture `width` pixels wide; part samples and part blocks count whole."""
        samples = -(-width // self.hsub)
        return -(-samples // self.block_width) * self.block_bytes

    def rows(self, height: int) -> int:
        """Rows of a picture `height` pixels high."""
        return -(-height // self.vsub)


@dataclass(frozen=True, slots=True)
class Layout:
    """Planes in the order of the fourcc: offsets and strides in bytes; `size` is the end of the last plane."""

    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    size: int


def _packed(block_bytes: int, block_width: int = 1) -> tuple[PlaneFormat, ...]:
    return (PlaneFormat(block_bytes, block_width),)


def _semi_planar(sample: int, hsub: int, vsub: int, samples_per_block: int = 1) -> tuple[PlaneFormat, ...]:
    """One plane of Y, one of Cb and Cr in turn; `sample` bytes hold `samples_per_block` samples."""
    luma = PlaneFormat(sample, samples_per_block)
    return (luma, PlaneFormat(2 * sample, samples_per_block, hsub, vsub))


def _planar(sample: int, hsub: int, vsub: int) -> tuple[PlaneFormat, ...]:
    chroma = PlaneFormat(sample, 1, hsub, vsub)
    return (PlaneFormat(sample), chroma, chroma)


def _table(*groups: tuple[str, tuple[PlaneFormat, ...]]) -> dict[str, tuple[PlaneFormat, ...]]:
    return {fourcc.ljust(4): planes for names, planes in groups for fourcc in names.split()}


FORMATS: dict[str, tuple[PlaneFormat, ...]] = _table(
    # RGB, one plane.
    ("C8 R8", _packed(1)),
    ("R16 RG88 GR88", _packed(2)),
    ("RG32 GR32", _packed(4)),
    ("XR12 XB12 RX12 BX12 AR12 AB12 RA12 BA12", _packed(2)),
    ("XR15 XB15 RX15 BX15 AR15 AB15 RA15 BA15", _packed(2)),
    ("RG16 BG16", _packed(2)),
    ("RG24 BG24", _packed(3)),
    ("XR24 XB24 RX24 BX24 AR24 AB24 RA24 BA24", _packed(4)),
    ("XR30 XB30 RX30 BX30 AR30 AB30 RA30 BA30", _packed(4)),
    ("XR48 XB48 AR48 AB48 XR4H XB4H AR4H AB4H", _packed(8)),
    # YUV, one plane; 4:2:2 shares Cb and Cr between two pixels.
    ("YUYV YVYU UYVY VYUY", _packed(4, 2)),
    ("Y210 Y212 Y216", _packed(8, 2)),
    ("VU24", _packed(3)),
    ("AYUV XYUV AVUY XVUY Y410", _packed(4)),
    ("Y412 Y416 XV36 XV48", _packed(8)),
    # Y, then CbCr or CrCb in turn.
    ("NV12 NV21", _semi_planar(1, 2, 2)),
    ("NV16 NV61", _semi_planar(1, 2, 1)),
    ("NV24 NV42", _semi_planar(1, 1, 1)),
    ("P010 P012 P016", _semi_planar(2, 2, 2)),
    ("P210", _semi_planar(2, 2, 1)),
    # 10 bits a sample without padding: four samples in five bytes.
    ("NV15", _semi_planar(5, 2, 2, 4)),
    ("NV20", _semi_planar(5, 2, 1, 4)),
    ("NV30", _semi_planar(5, 1, 1, 4)),
    # Y, Cb and Cr, a plane each (the YV formats: Cr first; the sizes are the same).
    ("YU12 YV12", _planar(1, 2, 2)),
    ("YU16 YV16", _planar(1, 2, 1)),
    ("YU24 YV24", _planar(1, 1, 1)),
    ("YU11 YV11", _planar(1, 4, 1)),
    ("YUV9 YVU9", _planar(1, 4, 4)),
    ("Q410 Q401", _planar(2, 1, 1)),
)
"""Plane formats by fourcc (four characters, padded with spaces)."""


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def linear(
    fourcc: str, width: int, height: int, *, stride_alignment: int = STRIDE_ALIGNMENT, height_alignment: int = 1
) -> Layout:
    """Lay out a picture of `width` x `height` pixels, all planes in one buffer, each stride a multiple of
    `stride_alignment` bytes, and each plane with the rows of a height that is a multiple of `height_alignment` rows of
    pixels. Raises KeyError: unknown fourcc.
    """
    rows = _align(height, height_alignment)
    offsets: list[int] = []
    strides: list[int] = []
    end = 0
    for plane in FORMATS[fourcc]:
        stride = _align(plane.row_bytes(width), stride_alignment)
        offsets.append(end)
        strides.append(stride)
        end += stride * plane.rows(rows)
    return Layout(tuple(offsets), tuple(strides), end)
