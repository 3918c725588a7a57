# SPDX-License-Identifier: MIT
"""The examples of the README do what it says, word for word, for an unprivileged user."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.users import User
from tests.kernel.demands import modprobe

pytestmark = pytest.mark.guest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_client_in_python() -> None:
    ran = User("alice").run([sys.executable, "-c", PROGRAMS[0]])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[:2] == ["1228800", "udmabuf"]


@pytest.fixture
def camera_and_card() -> Iterator[None]:
    """/dev/video0 and /dev/dri/card0, which leave again: compositors would render on the card."""
    modprobe("vgem")
    modprobe("vivid", "n_devs=1", "allocators=0", "node_types=0x1")
    try:
        yield
    finally:
        modprobe("--remove", "vivid")
        modprobe("--remove", "vgem")


@pytest.mark.usefixtures("camera_and_card")
def test_two_devices_of_two_programs() -> None:
    # alice may open neither of the devices: that is the importers' affair.
    ran = User("alice").run([sys.executable, "-c", PROGRAMS[1]])
    assert ran.returncode == 0, ran.stderr
    *_, last = ran.stdout.splitlines()
    assert last == "udmabuf (2560,)"


def test_the_same_by_busctl() -> None:
    (command,) = re.findall(r"^    \$ (busctl call (?:.*\\\n)*.*)$", README, re.MULTILINE)
    ran = User("alice").run(["sh", "-c", command])
    assert ran.returncode == 0, ran.stderr
    assert re.match(r'oha\{sv\} "/org/udmabufd/Allocator1/buffer/[0-9a-f]{16}" \d+ 17 "size" t 1228800 ', ran.stdout)
