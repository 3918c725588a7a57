# SPDX-License-Identifier: MIT
"""Layouts against sizes computed by hand and by the formulas of other programs; properties of every format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.core.layout import FORMATS, linear


@pytest.mark.parametrize(
    ("fourcc", "width", "height", "strides", "offsets", "size"),
    [
        # 376 x 464 at 4 bytes: 1504 is no multiple of 256, 1536 is (the case that broke on AMD GPUs).
        ("XR24", 376, 464, (1536,), (0,), 1536 * 464),
        ("NV12", 1920, 1080, (2048, 2048), (0, 2048 * 1080), 2048 * 1620),
        # Odd sizes: chroma is rounded up, 961 samples of two bytes a row, 541 rows.
        ("NV12", 1921, 1081, (2048, 2048), (0, 2048 * 1081), 2048 * (1081 + 541)),
        ("YU12", 5, 3, (256, 256, 256), (0, 768, 768 + 512), 768 + 512 + 512),
        # Three pixels of YUYV are two pairs of four bytes.
        ("YUYV", 3, 1, (256,), (0,), 256),
        ("YUYV", 129, 1, (512,), (0,), 512),
        ("P010", 1280, 720, (2560, 2560), (0, 2560 * 720), 2560 * 1080),
        ("YUV9", 1000, 10, (1024, 256, 256), (0, 10240, 10240 + 768), 10240 + 768 * 2),
        ("NV16", 100, 7, (256, 256), (0, 1792), 3584),
        ("NV24", 100, 7, (256, 256), (0, 1792), 3584),
        ("NV24", 200, 7, (256, 512), (0, 1792), 1792 + 3584),
        # Ten bits a sample, packed: 1920 samples are 480 blocks of five bytes.
        ("NV15", 1920, 2, (2560, 2560), (0, 5120), 5120 + 2560),
        ("C8  ", 1, 1, (256,), (0,), 256),
    ],
)
def test_known_layouts(
    fourcc: str, width: int, height: int, strides: tuple[int, ...], offsets: tuple[int, ...], size: int
) -> None:
    layout = linear(fourcc, width, height)
    assert (layout.strides, layout.offsets, layout.size) == (strides, offsets, size)


@pytest.mark.parametrize(
    ("fourcc", "width", "height", "alignment", "offsets", "size"),
    [
        # 1600 x 1068 with rows padded to 1072: 6400 bytes a row, 4 rows are the 24,576 bytes (and 1,024 of the last
        # page) by which radeonsi found such a buffer too small.
        ("XR24", 1600, 1068, 16, (0,), 6400 * 1072),
        # Chroma follows the padded luma and has half of the padded rows.
        ("NV12", 1920, 1080, 16, (0, 2048 * 1088), 2048 * (1088 + 544)),
        ("NV12", 1920, 1088, 16, (0, 2048 * 1088), 2048 * (1088 + 544)),
        ("YU12", 5, 3, 4, (0, 1024, 1024 + 512), 1024 + 512 + 512),
        # No power of two, and no multiple of the subsampling.
        ("NV12", 256, 10, 3, (0, 256 * 12), 256 * (12 + 6)),
        ("NV12", 256, 1, 5, (0, 256 * 5), 256 * (5 + 3)),
        ("YUV9", 256, 1, 2, (0, 512, 768), 1024),
    ],
)
def test_padded_heights(
    fourcc: str, width: int, height: int, alignment: int, offsets: tuple[int, ...], size: int
) -> None:
    layout = linear(fourcc, width, height, height_alignment=alignment)
    assert (layout.offsets, layout.size) == (offsets, size)


@given(
    st.sampled_from(sorted(FORMATS)), st.integers(1, 1 << 32), st.integers(1, 1 << 32), st.integers(1, (1 << 32) - 1)
)
def test_a_padded_height_is_that_of_the_padded_picture(fourcc: str, width: int, height: int, alignment: int) -> None:
    layout = linear(fourcc, width, height, height_alignment=alignment)
    padded = height + -height % alignment
    assert layout == linear(fourcc, width, padded)
    plain = linear(fourcc, width, height)
    assert layout.strides == plain.strides
    assert layout.size >= plain.size
    assert (layout == plain) or padded > height


def test_every_fourcc_has_four_characters() -> None:
    assert {len(fourcc) for fourcc in FORMATS} == {4}
    assert "R8  " in FORMATS


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 1 << 32), st.integers(1, 1 << 32))
def test_planes_hold_their_pixels_and_do_not_overlap(fourcc: str, width: int, height: int) -> None:
    layout = linear(fourcc, width, height)
    end = 0
    for plane, offset, stride in zip(FORMATS[fourcc], layout.offsets, layout.strides, strict=True):
        assert offset == end
        assert stride % 256 == 0
        # Bits: at least what the samples need, at most one alignment more.
        samples = (width + plane.hsub - 1) // plane.hsub
        bits = samples * plane.block_bytes * 8 // plane.block_width
        assert bits <= stride * 8 < bits + 8 * (256 + plane.block_bytes)
        end += stride * ((height + plane.vsub - 1) // plane.vsub)
    assert layout.size == end


def test_an_unknown_fourcc_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        linear("ABCD", 1, 1)
