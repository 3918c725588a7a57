# SPDX-License-Identifier: MIT
"""linux.headroom: on trees that a test has written, and on the machine at hand."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from udmabufd.linux.headroom import Headroom, Room, free_fds

MIB = 1 << 20
TOTAL, AVAILABLE = 1000 * MIB, 600 * MIB


class Tree:
    """A proc and a cgroup tree below a folder."""

    def __init__(self, top: Path, own: str) -> None:
        self.proc, self.root = top / "proc", top / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.root.mkdir()
        self.own(f"0::{own}\n")
        self.meminfo(f"MemTotal: {TOTAL // 1024} kB\nMemFree: 1 kB\nMemAvailable:   {AVAILABLE // 1024} kB\n")

    def own(self, text: str) -> None:
        """Say which groups this process is in."""
        (self.proc / "self/cgroup").write_text(text)

    def meminfo(self, text: str) -> None:
        """Say what memory there is."""
        (self.proc / "meminfo").write_text(text)

    def group(self, path: str, **files: int | str) -> None:
        """Make a control group with files of the memory controller; `max` stands for memory.max."""
        group = self.root / path
        group.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (group / f"memory.{name}").write_text(f"{value}\n")

    def read(self, beside: int = 0) -> Room:
        """Ask the module."""
        return Headroom(self.root, self.proc).read(beside)


OWN = "udmabufd.slice/udmabufd.service"
MACHINE = Room(AVAILABLE, "MemAvailable", TOTAL, TOTAL - AVAILABLE)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A service in a slice of its own, both without limits."""
    tree = Tree(tmp_path, f"/{OWN}")
    tree.group("udmabufd.slice", max="max", high="max", current=90 * MIB)
    tree.group(OWN, max="max", high="max", current=10 * MIB)
    return tree


def test_no_limit_but_the_machines(tree: Tree) -> None:
    """Groups without limits do not count."""
    assert tree.read() == MACHINE


@pytest.mark.parametrize(
    ("path", "file", "present"),
    [
        (OWN, "max", 10 * MIB),
        (OWN, "high", 10 * MIB),
        ("udmabufd.slice", "max", 90 * MIB),
        ("udmabufd.slice", "high", 90 * MIB),
    ],
)
def test_each_limit(tree: Tree, path: str, file: str, present: int) -> None:
    """Each of them, of the own group and of the one above, is found, named, and compared with its group's figure."""
    tree.group(path, **{file: 200 * MIB})
    assert tree.read() == Room(200 * MIB - present, f"memory.{file} of {Path(path).name}", 200 * MIB, present)


def test_the_least_room_counts_not_the_least_limit(tree: Tree) -> None:
    """A larger limit that is nearly reached is stricter than a small one that is not; and so is the machine's."""
    tree.group(OWN, max=95 * MIB)
    tree.group("udmabufd.slice", max=100 * MIB, high=99 * MIB)
    assert tree.read() == Room(9 * MIB, "memory.high of udmabufd.slice", 99 * MIB, 90 * MIB)
    tree.meminfo(f"MemTotal: {TOTAL // 1024} kB\nMemAvailable: 1024 kB\n")
    assert tree.read() == Room(MIB, "MemAvailable", TOTAL, TOTAL - MIB)


def test_beyond_the_limit(tree: Tree) -> None:
    """memory.high can be exceeded; then there is less than nothing."""
    tree.group("udmabufd.slice", high=80 * MIB)
    assert tree.read().available == -10 * MIB


def test_memory_that_is_charged_to_no_group(tree: Tree) -> None:
    """It counts against the limits of the groups, and not twice against the machine, where it shows."""
    tree.group("udmabufd.slice", max=200 * MIB)
    assert tree.read(50 * MIB) == Room(60 * MIB, "memory.max of udmabufd.slice", 200 * MIB, 140 * MIB)
    assert tree.read(120 * MIB).available == -10 * MIB
    tree.group("udmabufd.slice", max="max")
    assert tree.read(50 * MIB) == MACHINE


def test_root_of_a_namespace(tree: Tree) -> None:
    """In a container the outermost group has limits as well."""
    tree.group("", max=150 * MIB, current=149 * MIB)
    assert tree.read() == Room(MIB, "memory.max of the root control group", 150 * MIB, 149 * MIB)
    tree.own("0::/\n")
    assert tree.read().limit_name == "memory.max of the root control group"
    tree.group("../elsewhere", max=MIB, current=MIB)
    tree.own("0::/../elsewhere\n")
    assert tree.read().limit_name == "memory.max of the root control group", "what is outside cannot be seen"


@pytest.mark.parametrize("text", ["", "4:memory:/a\n1:name=systemd:/\n", "0::/gone\n", "0::/gone (deleted)\n"])
def test_without_cgroup_v2(tree: Tree, text: str) -> None:
    """No hierarchy, no such group, or no controller there: what is known of the machine is left."""
    tree.own(text)
    assert tree.read() == MACHINE


def test_hybrid_hierarchy(tree: Tree) -> None:
    """The line of cgroup v2 is found among others."""
    tree.own(f"9:name=systemd:/x\n4:memory:/y\n0::/{OWN}\n")
    tree.group(OWN, max=11 * MIB)
    assert tree.read().limit_name == "memory.max of udmabufd.service"


def test_what_could_be_swapped_out(tree: Tree) -> None:
    """Of what is evicted: not what is out already, of which the pages of the service itself are no part."""
    headroom = Headroom(tree.root, tree.proc)
    tree.meminfo(f"SwapFree: {100 * 1024} kB\n")
    assert headroom.reclaimable(16 * MIB) == 16 * MIB
    tree.group("udmabufd.slice", **{"swap.current": 30 * MIB})
    assert headroom.reclaimable(16 * MIB) == 0
    (tree.proc / "self/status").write_text(f"Name:\tudmabufd\nVmSwap:\t{20 * 1024} kB\nThreads:\t1\n")
    assert headroom.reclaimable(16 * MIB) == 6 * MIB
    assert headroom.reclaimable(8 * MIB) == 0
    # No further than there is swap, for all or for the group.
    assert headroom.reclaimable(1000 * MIB) == 100 * MIB
    tree.group("udmabufd.slice", **{"swap.max": 34 * MIB})
    assert headroom.reclaimable(16 * MIB) == 4 * MIB


def test_without_proc(tmp_path: Path) -> None:
    """Nothing can be said then."""
    with pytest.raises(OSError):
        Headroom(tmp_path, tmp_path).read()


def test_this_machine() -> None:
    """The figures are possible ones, and taking memory changes them."""
    room = Headroom().read()
    assert room.available == room.limit - room.present
    assert 0 < room.available < room.limit


def test_free_descriptors(tmp_path: Path) -> None:
    """Each descriptor that is opened is one less; counting them gives the same as the directory's size."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = free_fds()
    assert before == soft - (len(list(Path("/proc/self/fd").iterdir())) - 1)
    pipe = os.pipe()
    try:
        assert free_fds() == before - 2
    finally:
        for fd in pipe:
            os.close(fd)
    assert free_fds() == before


def test_free_descriptors_before_linux_6_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory's size is 0 there."""
    before, real = free_fds(), Path.stat

    def no_size(path: Path, **options: bool) -> os.stat_result:
        fields = list(real(path, **options))
        fields[6] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", no_size)
    assert free_fds() == before
