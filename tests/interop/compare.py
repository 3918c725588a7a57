# SPDX-License-Identifier: MIT
"""Is the picture right: a compositor's screenshot against what the reference program drew, pixel by pixel.

XR24 must be on the screen exactly. The compositor turns NV12 into RGB with arithmetic of its own, so that its values
may differ by rounding: NV12_TOLERANCE. mutants() are screenshots with one thing wrong each, which show that the
comparison can fail. Where pictures come from is left to demo.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
"""Height x width x 3."""

NV12_TOLERANCE = 1
"""Steps of 255 by which red, green or blue of an NV12 pixel may differ: one rounding more than the reference's."""


@dataclass(frozen=True)
class Scene:
    """What must be on the screen: `window` fills it, `inset` lies on it with its corner at (x, y)."""

    window: Rgb
    inset: Rgb
    x: int
    y: int

    def part(self, screen: Rgb) -> Rgb:
        """Return the inset's part of a picture of the whole screen."""
        height, width, _ = self.inset.shape
        return screen[self.y : self.y + height, self.x : self.x + width]

    def whole(self) -> Rgb:
        """Return the picture of the whole screen."""
        screen = self.window.copy()
        self.part(screen)[:] = self.inset
        return screen


@dataclass(frozen=True)
class Verdict:
    """What was compared and how far it is off: counts in pixels, errors in steps of 255."""

    xr24_pixels: int
    xr24_wrong: int
    nv12_pixels: int
    nv12_wrong: int
    nv12_max: int
    nv12_mean: float
    first_wrong: str

    @property
    def ok(self) -> bool:
        """Whether the screen shows the picture."""
        return not (self.xr24_wrong or self.nv12_wrong)


def judge(screen: Rgb, scene: Scene) -> Verdict:
    """Compare a screenshot with the scene. Raises ValueError when they are not of the same size."""
    expected = scene.whole()
    if screen.shape != expected.shape:
        raise ValueError(f"the screenshot is {_size(screen)}, the picture {_size(expected)}")
    error = np.abs(screen.astype(np.int16) - expected).max(axis=2)
    of_inset = error[scene.y :, scene.x :][: scene.inset.shape[0], : scene.inset.shape[1]]
    allowed = np.zeros_like(error)
    allowed[scene.y :, scene.x :][: of_inset.shape[0], : of_inset.shape[1]] = NV12_TOLERANCE
    wrong = error > allowed
    inset_wrong = int((of_inset > NV12_TOLERANCE).sum())
    return Verdict(
        xr24_pixels=error.size - of_inset.size,
        xr24_wrong=int(wrong.sum()) - inset_wrong,
        nv12_pixels=of_inset.size,
        nv12_wrong=inset_wrong,
        nv12_max=int(of_inset.max()),
        nv12_mean=float(np.abs(scene.part(screen).astype(np.int16) - scene.inset).mean()),
        first_wrong=_first(wrong, screen, expected),
    )


def mutants(screen: Rgb, scene: Scene, random: np.random.Generator) -> Iterator[tuple[str, Rgb]]:
    """Yield screenshots that are wrong in one thing each, with its name; which pixel it is, is random."""

    def changed(name: str) -> tuple[str, Rgb, Rgb]:
        mutant = screen.copy()
        return name, mutant, scene.part(mutant)

    outside = np.ones_like(screen)
    scene.part(outside)[:] = 0
    name, mutant, _ = changed("the lowest bit of one colour of one XR24 pixel")
    row, column = random.choice(np.argwhere(outside[..., 0]))
    mutant[row, column, random.integers(3)] ^= 1
    yield name, mutant

    name, mutant, part = changed(f"one colour of one NV12 pixel, {NV12_TOLERANCE + 1} steps off")
    row, column, colour = (random.integers(length) for length in part.shape)
    expected = int(scene.inset[row, column, colour])
    part[row, column, colour] = expected + (NV12_TOLERANCE + 1) * (1 if expected < 128 else -1)
    yield name, mutant

    name, mutant, part = changed("XR24 one pixel to the right")
    mutant[:, 1:] = mutant[:, :-1].copy()
    part[:] = scene.part(screen)
    yield name, mutant

    name, mutant, part = changed("NV12 one row down")
    part[1:] = part[:-1].copy()
    yield name, mutant

    name, mutant, part = changed("NV12 with red and blue exchanged")
    part[:] = part[..., ::-1].copy()
    yield name, mutant

    name, mutant, part = changed("no NV12: the window seen in its place")
    part[:] = scene.part(scene.window)
    yield name, mutant


def read_ppm(data: bytes) -> Rgb:
    """Parse the binary PPM that the reference program writes. Raises ValueError."""
    kind, size, depth, pixels = data.split(b"\n", 3)
    if kind != b"P6" or depth != b"255":
        raise ValueError("not a binary PPM of 8 bits a colour")
    width, height = map(int, size.split())
    return np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)


def read_png(path: Path) -> Rgb:
    """Read a PNG as RGB; what is in an alpha channel is left out. Raises OSError."""
    from PIL import Image  # Debian's python3-pil: where the demo runs it is needed, in the unit tests not

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_png(path: Path, picture: Rgb) -> None:
    """Write a picture as PNG. Raises OSError."""
    from PIL import Image

    Image.fromarray(picture).save(path)


def _first(wrong: NDArray[np.bool_], screen: Rgb, expected: Rgb) -> str:
    places = np.argwhere(wrong)
    if not len(places):
        return ""
    y, x = (int(place) for place in places[0])
    return f"pixel ({x}, {y}) is {_colour(screen[y, x])}, not {_colour(expected[y, x])}"


def _colour(pixel: Rgb) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in pixel)


def _size(picture: Rgb) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"
