# SPDX-License-Identifier: MIT
"""Clients that are not ours: sd-bus in C, busctl, gdbus and GDBus allocate, use the descriptor, and introspect."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.users import User
from tests.kernel.witness import bufinfo, descriptors, main_pid

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SERVICE = "org.udmabufd.Allocator1"
PATH = "/org/udmabufd/Allocator1"
UNIT = "udmabufd.service"

COUNT = 200
"""Buffers that the sd-bus client holds at the same time."""

pytestmark = [pytest.mark.guest, pytest.mark.root]

Compile = Callable[[str], Path]


def run(command: list[str], user: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as root or as an unprivileged user."""
    if user != "root":
        return User(user).run(command, environment=environment)
    wanted = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} | (environment or {})
    return subprocess.run(command, env=wanted, capture_output=True, text=True, timeout=120)


@pytest.fixture
def nothing_left(eventually: Callable[[Callable[[], object]], None]) -> object:
    """The service's descriptors and the kernel's dma-bufs after the test are those of before."""
    before = descriptors(main_pid(UNIT)), bufinfo().keys()

    def check() -> None:
        assert (descriptors(main_pid(UNIT)), bufinfo().keys()) == before

    yield
    eventually(check)


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.usefixtures("nothing_left")
def test_sd_bus(compiled: Compile, user: str) -> None:
    """A C program with blocking calls makes 200 Allocates in a row and uses each descriptor."""
    done = run([str(compiled("sdbus_client")), str(COUNT)], user)
    assert (done.returncode, done.stderr) == (0, "")
    page_count = sum(1 + number % 5 for number in range(COUNT))
    assert done.stdout.startswith(f"{COUNT} by Allocate with {page_count * 4096} bytes, 16 by AllocateMany")


BUSCTL = [
    "busctl",
    "call",
    SERVICE,
    PATH,
    SERVICE,
    "Allocate",
    "a{sv}",
    "2",
    "size",
    "t",
    "12288",
    "name",
    "s",
    "foreign",
]
GDBUS = ["gdbus", "call", "--system", "--dest", SERVICE, "--object-path", PATH, "--method", f"{SERVICE}.Allocate"]
GDBUS += ["{'size': <uint64 12288>, 'name': <'foreign'>}"]


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.parametrize("command", [BUSCTL, GDBUS], ids=["busctl", "gdbus"])
@pytest.mark.usefixtures("nothing_left")
def test_tools_get_a_good_descriptor(compiled: Compile, tmp_path: Path, command: list[str], user: str) -> None:
    """The descriptor that busctl and gdbus receive is used in their own process, and closed at exec."""
    report = Path(str(compiled("fd_probe.so")) + f".{command[0]}.{user}")
    report.touch()
    report.chmod(0o666)
    environment = {"LD_PRELOAD": str(compiled("fd_probe.so")), "FD_PROBE_REPORT": str(report)}
    done = run(command, user, environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'foreign'" in done.stdout.replace('"', "'")
    assert re.search(r"/org/udmabufd/Allocator1/buffer/[0-9a-f]{16}\b", done.stdout)
    inode = re.search(r"inode['\"]:? (?:t |<uint64 )([0-9]+)", done.stdout)
    assert inode, done.stdout
    expected = f"program={command[0]} inode={inode[1]} size=12288 cloexec=1 used\n"
    assert report.read_text() == expected


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.usefixtures("nothing_left")
def test_busctl_shows_a_dma_buf(user: str) -> None:
    """busctl describes the descriptor that it received: a dma-buf with the name and the size asked for."""
    done = run(["busctl", "--json=short", *BUSCTL[1:]], user)
    assert (done.returncode, done.stderr) == (0, "")
    _, fd, info = json.loads(done.stdout)["data"]
    assert fd["path"] == "/dmabuf:foreign"
    assert fd["stat"]["size"] == info["size"]["data"] == 12288
    assert fd["stat"]["inode"] == info["inode"]["data"]


@pytest.mark.parametrize("user", ["root", "alice"])
@pytest.mark.usefixtures("nothing_left")
def test_gdbus_library(user: str) -> None:
    """A GDBus program takes the descriptor out of the reply's list and uses it."""
    done = run([sys.executable, "-B", str(HERE / "gdbus_client.py")], user)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["descriptors"] == 1
    assert said["size"] == said["info"]["size"] == 3 * 4096
    assert said["inode"] == said["info"]["inode"]
    assert said["info"]["name"] == "gdbus"
    assert (said["cloexec"], said["zero"], said["kept"]) == (True, True, True)


def described(interface: ET.Element) -> dict[str, tuple[str, str]]:
    """Return members of an interface with their signatures, in and out."""
    found = {}
    for method in interface.iter("method"):
        of = {
            way: "".join(a.get("type", "") for a in method.iter("arg") if a.get("direction") == way)
            for way in ("in", "out")
        }
        found[method.get("name", "")] = of["in"], of["out"]
    for prop in interface.iter("property"):
        found[prop.get("name", "")] = "", prop.get("type", "")
    return found


def interface_file() -> ET.Element:
    """The interface as the project writes it down."""
    interface = ET.parse(ROOT / "systemd" / "interfaces" / f"{SERVICE}.xml").getroot().find("interface")
    assert interface is not None
    return interface


def test_busctl_introspects() -> None:
    """busctl, as an unprivileged user, lists every member of the interface with its signature."""
    done = run(["busctl", "introspect", SERVICE, PATH, SERVICE], "alice")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row[0].lstrip("."): row for row in map(str.split, done.stdout.splitlines()) if row[0].startswith(".")}
    expected = described(interface_file())
    assert rows.keys() == expected.keys()
    for name, (taken, given) in expected.items():
        if rows[name][1] == "method":
            assert rows[name][2:4] == [taken or "-", given or "-"]
        else:
            assert rows[name][1:3] == ["property", given]


def test_gdbus_introspects() -> None:
    """gdbus gets the interface as it is written down, annotations included."""
    done = run(["gdbus", "introspect", "--system", "--dest", SERVICE, "--object-path", PATH, "--xml"], "alice")
    assert (done.returncode, done.stderr) == (0, "")
    served = ET.fromstring(done.stdout).find(f"interface[@name='{SERVICE}']")
    assert served is not None
    written = interface_file()
    assert described(served) == described(written)

    def annotations(interface: ET.Element) -> list[tuple[str | None, str | None]]:
        return [(note.get("name"), note.get("value")) for note in interface.iter("annotation")]

    assert annotations(served) == annotations(written)
    assert ("org.gtk.GDBus.C.UnixFD", "true") in annotations(served)
