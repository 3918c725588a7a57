# SPDX-License-Identifier: MIT
"""A client by GDBus, through python3-gi: allocates one buffer, uses its descriptor, releases it, reports as JSON.

Knows nothing of udmabufd's own client: only the names on the bus and the kernel's ioctl.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct

from gi.repository import Gio, GLib

SERVICE = "org.udmabufd.Allocator1"
PATH = "/org/udmabufd/Allocator1"

DMA_BUF_IOCTL_SYNC = 0x40086200
START, END, READ_WRITE = 0, 4, 3

SIZE = 3 * mmap.PAGESIZE


def sync(fd: int, flags: int) -> None:
    """Begin or end CPU access."""
    fcntl.ioctl(fd, DMA_BUF_IOCTL_SYNC, struct.pack("=Q", flags))


def main() -> None:
    """Allocate, use, release, report."""
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
    spec = {"size": GLib.Variant("t", SIZE), "name": GLib.Variant("s", "gdbus")}
    reply, fds = bus.call_with_unix_fd_list_sync(
        SERVICE,
        PATH,
        SERVICE,
        "Allocate",
        GLib.Variant("(a{sv})", (spec,)),
        GLib.VariantType("(oha{sv})"),
        Gio.DBusCallFlags.NONE,
        -1,
        None,
        None,
    )
    path, index, info = reply.unpack()
    fd = fds.get(index)
    with mmap.mmap(fd, SIZE) as memory:
        sync(fd, START | READ_WRITE)
        zero = not any(memory[:])
        memory[:] = bytes(i * 5 + 1 & 255 for i in range(SIZE))
        sync(fd, END | READ_WRITE)
    with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
        sync(fd, START | READ_WRITE)
        kept = memory[:] == bytes(i * 5 + 1 & 255 for i in range(SIZE))
        sync(fd, END | READ_WRITE)
    bus.call_sync(SERVICE, path, "org.udmabufd.Buffer1", "Release", None, None, Gio.DBusCallFlags.NONE, -1, None)
    facts = {"descriptors": fds.get_length(), "size": os.lseek(fd, 0, os.SEEK_END), "inode": os.fstat(fd).st_ino}
    cloexec = bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)
    os.close(fd)
    print(json.dumps({**facts, "info": info, "cloexec": cloexec, "zero": zero, "kept": kept}))


if __name__ == "__main__":
    main()
