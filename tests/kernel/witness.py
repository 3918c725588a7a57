# SPDX-License-Identifier: MIT
"""What the kernel and systemd say, read without any code of the daemon: the witnesses that tests appeal to.

- bufinfo(): all dma-bufs of the machine, from /sys/kernel/debug/dma_buf/bufinfo (root; debugfs mounted).
- dma_bufs(), descriptors(): what a process holds open, from /proc/PID/fd and /proc/PID/fdinfo (root, or one's own).
- memory_current(), main_pid(): of a unit of systemd.

Names of dma-bufs come from whoever holds one and may be any 31 bytes. Here they are text: what is not UTF-8 is shown
as \\xNN; spaces, tabs and newlines are as they are, and none of them makes the rest of an answer wrong.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BUFINFO: Final = Path("/sys/kernel/debug/dma_buf/bufinfo")
CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class DmaBuf:
    """One dma-buf of the machine.

    `size` in bytes; `count` references to its file, as fdinfo has them; `exporter` such as `udmabuf`;
    `inode` its number until the next boot; `name` "" if it has none; `devices` those attached to it, as dev_name().
    """

    size: int
    count: int
    exporter: str
    inode: int
    name: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeldDmaBuf:
    """A dma-buf as a descriptor `fd` of a process shows it; `count` is of references in the whole machine."""

    fd: int
    inode: int
    size: int
    count: int
    exporter: str
    name: str


# dma_buf_debug_show, drivers/dma-buf/dma-buf.c: size, flags, mode, count, exporter, inode, name. The name has 31 bytes
# at most, the columns before it take 36 and more: a name cannot forge the beginning of an entry.
_ENTRY: Final = re.compile(
    rb"^(?P<size>[0-9]{8,})\t[0-9a-f]{8}\t[0-9a-f]{8}\t(?P<count>[0-9]{8,})\t(?P<exporter>[^\t\n]*)\t(?P<inode>[0-9]{8,})\t",
    re.MULTILINE,
)
_FENCES: Final = re.compile(rb"(\n\t(kernel|write|read|bookkeep) fence:[^\n]*)+\Z")
_DEVICES: Final = b"\n\tAttached Devices:\n"
_TOTAL: Final = re.compile(rb"^Total [0-9]+ devices attached\n", re.MULTILINE)


def bufinfo() -> dict[int, DmaBuf]:
    """Return all dma-bufs of the machine by inode number. Raises OSError: root and a mounted debugfs are needed."""
    return parse_bufinfo(BUFINFO.read_bytes())


def parse_bufinfo(text: bytes) -> dict[int, DmaBuf]:
    """Parse the contents of bufinfo. Raises ValueError if an entry is not as the kernel writes them."""
    # One end for each beginning; without any, there is the end of the text alone.
    beginnings = list(_ENTRY.finditer(text))
    ends = [beginning.start() for beginning in beginnings[1:]] + [len(text)]
    entries = [
        _parse_entry(beginning, text[beginning.end() : end]) for beginning, end in zip(beginnings, ends, strict=False)
    ]
    return {entry.inode: entry for entry in entries}


def dma_bufs(pid: int | str = "self") -> list[HeldDmaBuf]:
    """Return the dma-bufs that process `pid` holds descriptors of, one entry for each descriptor.

    Mappings and descriptors in flight are not listed, but are in `count`. Raises OSError: EACCES for the processes of
    others and undumpable ones, unless root; ENOENT when there is no such process.
    """
    held = []
    for fd, text in _fdinfos(pid).items():
        exporter = re.search(rb"^exp_name:\t(.*)\n", text, re.MULTILINE)
        if exporter is None:
            continue
        # A name can forge lines, but only after this one.
        fields = dict(line.split(b":\t", 1) for line in text[: exporter.start()].splitlines() if b":\t" in line)
        name = text[exporter.end() :].removeprefix(b"name:\t").removesuffix(b"\n")
        held.append(
            HeldDmaBuf(
                fd=fd,
                inode=int(fields[b"ino"]),
                size=int(fields[b"size"]),
                count=int(fields[b"count"]),
                exporter=_text(exporter[1]),
                name=_text(name),
            )
        )
    return held


def descriptors(pid: int | str = "self") -> Counter[str]:
    """Count the descriptors of process `pid` by what they lead to.

    Keys: `dma-buf`, `memfd`, `socket`, `pipe`, `anon_inode:[eventpoll]` and the like as they are, and a path for the
    rest. Raises OSError as dma_bufs() does.
    """
    counts: Counter[str] = Counter()
    fdinfos = _fdinfos(pid)
    for fd, target in _targets(pid).items():
        if re.search(rb"^exp_name:\t", fdinfos.get(fd, b""), re.MULTILINE):
            counts["dma-buf"] += 1
        elif target.startswith("/memfd:"):
            counts["memfd"] += 1
        else:
            counts[re.sub(r"^(socket|pipe):\[[0-9]+\]$", r"\1", target)] += 1
    return counts


def main_pid(unit: str) -> int:
    """Return the process id of the unit's main process. Raises LookupError if it has none, being stopped or failed."""
    pid = int(_show(unit, "MainPID"))
    if pid == 0:
        raise LookupError(f"{unit} has no main process; see systemctl status {unit}")
    return pid


def memory_current(unit: str) -> int:
    """Return the bytes that are charged to the unit's cgroup (a service or slice): pages pinned by dma-bufs are.

    Raises LookupError if the unit is not running, or memory is not accounted for it.
    """
    group = _show(unit, "ControlGroup")
    file = CGROUP / group.lstrip("/") / "memory.current"
    if not group or not file.exists():
        raise LookupError(f"{unit} has no cgroup with memory accounting; is it running, with MemoryAccounting=yes?")
    return int(file.read_bytes())


def _parse_entry(beginning: re.Match[bytes], rest: bytes) -> DmaBuf:
    # What a name may forge of these comes before the true ones: the last of each counts.
    totals = list(_TOTAL.finditer(rest))
    name, separator, devices = rest[: totals[-1].start() if totals else 0].rpartition(_DEVICES)
    if not separator:
        raise ValueError(f"no list of devices in the entry {beginning[0] + rest!r}")
    name = _FENCES.sub(b"", name)
    return DmaBuf(
        size=int(beginning["size"]),
        count=int(beginning["count"]),
        exporter=_text(beginning["exporter"]),
        inode=int(beginning["inode"]),
        name="" if name == b"<none>" else _text(name),
        devices=tuple(_text(line.strip(b"\t")) for line in devices.splitlines()),
    )


def _fdinfos(pid: int | str) -> dict[int, bytes]:
    return {
        int(file.name): text for file in Path(f"/proc/{pid}/fdinfo").iterdir() if (text := _read(file)) is not None
    }


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None  # Closed meanwhile, as the descriptor of the very listing is.


def _targets(pid: int | str) -> dict[int, str]:
    targets = {}
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets[int(file.name)] = str(file.readlink())
        except FileNotFoundError:
            continue
    return targets


def _show(unit: str, key: str) -> str:
    command = ["systemctl", "show", "--property", key, "--value", unit]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
