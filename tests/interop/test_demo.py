# SPDX-License-Identifier: MIT
"""The demo as a test: a random picture in dma-bufs of the service, on a real compositor's screen, pixel by pixel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.interop.compare import NV12_TOLERANCE, Scene, judge, read_png, read_ppm
from tests.interop.demo import INSET, SCREEN

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.guest, pytest.mark.root]

Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo left its results."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-B", "-m", "tests.interop.demo", "--output", str(folder), "--keep"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    """What the demo found."""
    found: Report = json.loads((folder / "report.json").read_text())
    return found


def test_client_cannot_open_the_device(report: Report) -> None:
    """The client's user gets EACCES from the device itself."""
    assert report["refused"]["errno"] == "EACCES"
    assert report["refused"]["uid"] >= 1000


def test_screen_shows_the_picture(folder: Path, report: Report) -> None:
    """Judged here once more, from the files: XR24 is exact, NV12 within its rounding."""
    pictures = []
    for fourcc, size in (("xr24", SCREEN), ("nv12", INSET)):
        command = [str(folder / "reference"), fourcc, report["seed"], *map(str, size)]
        pictures.append(read_ppm(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    scene = Scene(pictures[0], pictures[1], *report["place"])
    verdict = judge(read_png(folder / "screenshot.png"), scene)
    assert verdict.ok
    assert verdict.nv12_max <= NV12_TOLERANCE
    assert verdict.nv12_pixels == INSET[0] * INSET[1]
    assert verdict.xr24_pixels + verdict.nv12_pixels == SCREEN[0] * SCREEN[1]
    assert not judge(read_png(folder / "screenshot.png")[::-1], scene).ok


def test_comparison_noticed_every_mutant(report: Report) -> None:
    """The very screenshot, spoilt in one thing, did not pass."""
    assert len(report["mutants"]) == 6
    assert all(report["mutants"].values())


def test_strides_are_wider_than_rows(report: Report) -> None:
    """A program that takes the stride for granted would not have passed."""
    xr24, nv12 = report["buffers"]
    assert (xr24["format"], xr24["width"], xr24["height"]) == ("XR24", *SCREEN)
    assert (nv12["format"], nv12["width"], nv12["height"]) == ("NV12", *INSET)
    assert xr24["strides"][0] > 4 * SCREEN[0]
    assert nv12["strides"][0] > INSET[0]
    assert nv12["offsets"][1] == nv12["strides"][0] * INSET[1]


def test_kernel_names_the_buffers(report: Report) -> None:
    """bufinfo has both by the names that the client gave, with the service's figures, held by all and the store."""
    for said, kernel in zip(report["buffers"], report["kernel"], strict=True):
        assert said["name"] == f"demo-{said['format'].lower()}-{report['seed'][:8]}"
        assert (kernel["name"], kernel["size"], kernel["inode"]) == (said["name"], said["size"], said["inode"])
        assert kernel["exporter"] == "udmabuf"
        # The service's descriptor, the client's, and the compositor's.
        assert kernel["count"] >= 3
        users = [holder.rpartition("(")[2].rstrip(")") for holder in kernel["holders"]]
        # root: the service manager's store.
        assert sorted(users) == ["alice", "bob", "root", "udmabufd"]


def test_command_on_a_host(report: Report, tmp_path: Path) -> None:
    """`tests/demo --host` runs on this machine, with other users, another picture, and says where it is."""
    command = [str(ROOT / "tests" / "demo"), "--host", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd="/", stdout=subprocess.PIPE, text=True, env=os.environ | {"HOME": "/nonexistent"}
    )
    assert done.returncode == 0
    assert str(tmp_path / "out" / "screenshot.png") in done.stdout
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["seed"] != report["seed"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "expected.png",
        "report.json",
        "screenshot.png",
    ]


def test_command_says_what_is_missing(tmp_path: Path) -> None:
    """Without the service, --host ends with 1 and names the next step."""
    subprocess.run(["systemctl", "stop", "udmabufd.service"], check=True)
    try:
        command = [str(ROOT / "tests" / "demo"), "--host", "--output", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        subprocess.run(["systemctl", "start", "udmabufd.service"], check=True)
    assert done.returncode == 1
    assert "a running udmabufd" in done.stderr
    assert "systemctl status udmabufd" in done.stderr
    assert "screenshot" not in done.stdout
