# SPDX-License-Identifier: MIT
"""Writes the guest's initrd: busybox, guest/init and the kernel modules that the root file system needs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

GUEST_INIT = Path(__file__).parent.parent / "guest" / "init"
FOLDERS = ("bin", "dev", "proc", "sys", "root", "modules")


def write_initrd(target: Path, root: Path, boot_modules: Path) -> None:
    """Writes a cpio archive (format "newc", see Documentation/driver-api/early-userspace in the kernel) to target."""
    with open(target, "wb") as file:
        archive = _Cpio(file)
        for folder in FOLDERS:
            archive.add(folder, stat.S_IFDIR | 0o755)
        archive.add("init", stat.S_IFREG | 0o755, GUEST_INIT.read_bytes())
        archive.add("bin/busybox", stat.S_IFREG | 0o755, (root / "usr/bin/busybox").read_bytes())
        for module in sorted(boot_modules.iterdir()):
            archive.add(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
        archive.end()


class _Cpio:
    """Writes members one by one; all belong to root, with no time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device and special device (major, minor), name's length, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._pad(header + encoded)
        self._pad(data)

    def end(self) -> None:
        self.add("TRAILER!!!", 0)

    def _pad(self, data: bytes) -> None:
        self._file.write(data + bytes(-len(data) % 4))
