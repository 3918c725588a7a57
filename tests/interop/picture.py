# SPDX-License-Identifier: MIT
"""The client's drawing: the picture that README.md defines, put into the planes of a mapped buffer by numpy.

The other drawing of the same picture, in C and as RGB, is reference.c; neither knows the other. Where the planes lie
(offsets, strides) is what the service answered; what shows them is left to wayland_client.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

TILE = 20


class PlaneLike(Protocol):
    """What is asked of a plane: bytes from the start of the buffer, and from row to row."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the buffer."""

    @property
    def stride(self) -> int:
        """Bytes from row to row."""


@dataclass(frozen=True)
class Picture:
    """The picture of one seed; every method draws `width` x `height` samples."""

    s0: int
    s1: int

    @classmethod
    def from_seed(cls, seed: str) -> Picture:
        """Return the picture of a seed of 16 hexadecimal digits. Raises ValueError."""
        if len(seed) != 16:
            raise ValueError(f"a seed has 16 hexadecimal digits, not {len(seed)}")
        return cls(int(seed[:8], 16), int(seed[8:], 16))

    def xr24(self, width: int, height: int) -> Bytes:
        """Rows of blue, green, red and one byte that nobody may look at."""
        x, y = _samples(width, height)
        words = (self._texture(10, x, y) & 0xFFFFFF) | (self._pick(13, x, y) & 0xFF000000)
        return words.astype("<u4").view(np.uint8).reshape(height, 4 * width)

    def luma(self, width: int, height: int) -> Bytes:
        """Rows of Y, 16 to 235."""
        words = self._texture(20, *_samples(width, height))
        return (16 + (words & 255) * np.uint32(219) // 255).astype(np.uint8)

    def chroma(self, width: int, height: int) -> Bytes:
        """Rows of Cb and Cr in turn, 16 to 240; `width` and `height` in chroma samples."""
        words = self._texture(30, *_samples(width, height))
        pairs = np.stack([words & 255, (words >> 8) & 255], axis=-1)
        return (16 + pairs * np.uint32(224) // 255).astype(np.uint8).reshape(height, 2 * width)

    def planes(self, fourcc: str, width: int, height: int) -> list[Bytes]:
        """The planes of the picture in XR24 or NV12, in the fourcc's order, one array of rows each."""
        if fourcc == "XR24":
            return [self.xr24(width, height)]
        if fourcc == "NV12" and width % 2 == 0 and height % 2 == 0:
            return [self.luma(width, height), self.chroma(width // 2, height // 2)]
        raise ValueError(f"no drawing for {fourcc} of {width} x {height}")

    def _pick(self, k: int, a: Words, b: Words) -> Words:
        start = _mix(_mix(np.array([self.s0 ^ k], dtype=np.uint32)) ^ np.uint32(self.s1))
        return _mix(_mix(start ^ a) ^ b)

    def _texture(self, k: int, x: Words, y: Words) -> Words:
        colour = self._pick(k, x // TILE, y // TILE)
        kind = self._pick(k + 1, x // TILE, y // TILE) & 3
        in_x, in_y = x % TILE, y % TILE
        gradient = (
            ((colour & 255) + 12 * in_x & 255)
            | ((colour >> 8 & 255) + 12 * in_y & 255) << 8
            | ((colour >> 16 & 255) + 6 * (in_x + in_y) & 255) << 16
            | colour & 0xFF000000
        )
        checks = np.where((x // 2 + y // 2) % 2 == 0, colour, ~colour)
        return np.choose(kind, [colour, gradient, self._pick(k + 2, x, y), checks])


def draw(view: memoryview, planes: Sequence[PlaneLike], rows: Sequence[Bytes], noise: np.random.Generator) -> None:
    """Write each plane's rows where it lies in `view`, and noise into what is left of each row's stride."""
    for plane, content in zip(planes, rows, strict=True):
        height, length = content.shape
        room = view[plane.offset : plane.offset + height * plane.stride]
        target = np.frombuffer(room, dtype=np.uint8).reshape(height, plane.stride)
        target[:, :length] = content
        target[:, length:] = noise.integers(0, 256, (height, plane.stride - length), dtype=np.uint8)


def _mix(h: Words) -> Words:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def _samples(width: int, height: int) -> tuple[Words, Words]:
    y, x = np.indices((height, width), dtype=np.uint32)
    return x, y
