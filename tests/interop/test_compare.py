# SPDX-License-Identifier: MIT
"""The demo's comparison: it passes what is right, and notices everything that is wrong by a single step."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.interop.compare import NV12_TOLERANCE, Rgb, Scene, judge, mutants, read_ppm
from tests.interop.picture import Bytes, Picture, draw

HERE = Path(__file__).parent
WINDOW = (250, 100)
INSET = (80, 60)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference program, compiled."""
    program = tmp_path_factory.mktemp("reference") / "reference"
    subprocess.run(
        ["cc", "-std=c17", "-O2", "-Wall", "-Werror", "-o", program, HERE / "reference.c", "-lm"], check=True
    )
    return program


def run_reference(program: Path, fourcc: str, seed: str, size: tuple[int, int]) -> Rgb:
    """Return the reference's drawing."""
    command = [str(program), fourcc, seed, *map(str, size)]
    return read_ppm(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.fixture
def seed() -> str:
    """A seed, different in every run, and printed when the test fails."""
    seed = os.urandom(8).hex()
    print("seed", seed)
    return seed


@pytest.fixture
def scene(reference: Path, seed: str) -> Scene:
    """A window with an inset, as the reference draws them."""
    return Scene(
        run_reference(reference, "xr24", seed, WINDOW), run_reference(reference, "nv12", seed, INSET), x=41, y=17
    )


def convert(luma: Bytes, chroma: Bytes) -> Rgb:
    """BT.601, limited range, with the coefficients as graphics drivers have them written out."""
    height, width = luma.shape
    samples = chroma.reshape(height // 2, width // 2, 2).repeat(2, axis=0).repeat(2, axis=1).astype(np.float32) - 128
    grey = 1.16438356 * (luma.astype(np.float32) - 16)
    cb, cr = samples[..., 0], samples[..., 1]
    colours = [grey + 1.59602678 * cr, grey - 0.39176229 * cb - 0.81296764 * cr, grey + 2.01723214 * cb]
    rounded: Rgb = np.clip(np.rint(np.stack(colours, axis=-1)), 0, 255).astype(np.uint8)
    return rounded


def test_both_drawings_are_one_picture(scene: Scene, seed: str) -> None:
    """The client's drawing, laid out with strides and read back by plain indexing, is the reference's."""

    class Plane:
        """Where a plane lies, in bytes."""

        def __init__(self, offset: int, stride: int) -> None:
            self.offset, self.stride = offset, stride

    picture = Picture.from_seed(seed)
    random = np.random.default_rng()
    width, height = WINDOW
    memory = np.zeros((height, 1024), dtype=np.uint8)
    draw(memory.reshape(-1).data, [Plane(0, 1024)], picture.planes("XR24", *WINDOW), random)
    assert (memory[:, : 4 * width].reshape(height, width, 4)[:, :, 2::-1] == scene.window).all()
    assert memory[:, 4 * width :].any(), "the rest of the rows holds noise"

    width, height = INSET
    memory = np.zeros((height * 3 // 2, 256), dtype=np.uint8)
    planes = [Plane(0, 256), Plane(256 * height, 256)]
    draw(memory.reshape(-1).data, planes, picture.planes("NV12", *INSET), random)
    shown = convert(memory[:height, :width], memory[height:, :width])
    assert np.abs(shown.astype(int) - scene.inset).max() <= NV12_TOLERANCE


def test_every_seed_is_another_picture(reference: Path) -> None:
    """Seeds that differ in one bit give pictures that have little in common."""
    one, other = (run_reference(reference, "xr24", seed, WINDOW) for seed in ("0" * 16, "0" * 15 + "1"))
    assert (one != other).any(axis=2).mean() > 0.9


def test_right_picture_passes(scene: Scene) -> None:
    """The scene itself passes, and so does NV12 within its tolerance."""
    screen = scene.whole()
    assert judge(screen, scene).ok
    part = scene.part(screen)
    part[:] = np.where(scene.inset < 128, scene.inset + NV12_TOLERANCE, scene.inset - NV12_TOLERANCE)
    verdict = judge(screen, scene)
    assert verdict.ok
    assert verdict.nv12_max == NV12_TOLERANCE
    assert verdict.xr24_pixels + verdict.nv12_pixels == WINDOW[0] * WINDOW[1]


def test_every_mutant_is_noticed(scene: Scene) -> None:
    """One bit of one pixel is enough, and the verdict says where it is."""
    screen = scene.whole()
    names = []
    for name, mutant in mutants(screen, scene, np.random.default_rng()):
        verdict = judge(mutant, scene)
        assert not verdict.ok, name
        assert verdict.first_wrong.startswith("pixel ("), name
        names.append(name)
    assert len(names) == 6
    assert judge(screen, scene).ok, "the mutants are copies"


def test_other_matrix_is_noticed(scene: Scene, seed: str) -> None:
    """NV12 shown as BT.709, the usual mistake, is not within the tolerance."""
    luma, chroma = Picture.from_seed(seed).planes("NV12", *INSET)
    height, width = luma.shape
    samples = chroma.reshape(height // 2, width // 2, 2).repeat(2, axis=0).repeat(2, axis=1).astype(np.float32) - 128
    grey = 255 / 219 * (luma.astype(np.float32) - 16)
    cb, cr = 255 / 224 * samples[..., 0], 255 / 224 * samples[..., 1]
    colours = [grey + 1.5748 * cr, grey - 0.1873 * cb - 0.4681 * cr, grey + 1.8556 * cb]
    screen = scene.whole()
    scene.part(screen)[:] = np.clip(np.rint(np.stack(colours, axis=-1)), 0, 255).astype(np.uint8)
    assert not judge(screen, scene).ok


def test_sizes_are_compared(scene: Scene) -> None:
    """A screenshot of another size is an error, not a difference."""
    with pytest.raises(ValueError, match="250 x 99"):
        judge(scene.whole()[1:], scene)
