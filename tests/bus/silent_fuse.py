# SPDX-License-Identifier: MIT
"""A FUSE file system whose one file can be opened and then never answers again: close() of such a descriptor hangs.

Run as a program with a mount point: it mounts, writes a line and serves until it is killed, a minute at most, so
that whoever has fallen into the trap gets out. Needs root. Protocol: include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "silent"
_LIFETIME = 60

_LOOKUP, _GETATTR, _OPEN, _INIT, _ACCESS = 1, 3, 14, 26, 34
_ENOSYS = 38
_ROOT, _NODE = 1, 2
_MNT_DETACH = 2


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o666
    #                   ino  size blocks times     nsec     mode nlink uid gid rdev blksize flags
    return struct.pack("=QQQ QQQ III IIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(operation: int, node: int) -> bytes | int | None:
    """The body of the answer, a negative error, or None for silence."""
    if operation == _INIT:
        return struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0)
    if operation == _LOOKUP:
        # The name is good for a lifetime, the attributes for none: fstat asks again, and waits.
        return struct.pack("=QQQQII", _NODE, 0, _LIFETIME, 0, 0, 0) + _attributes(_NODE)
    if operation == _GETATTR and node == _ROOT:
        return struct.pack("=QII", _LIFETIME, 0, 0) + _attributes(node)
    if operation == _OPEN:
        return struct.pack("=QII", 1, 0, 0)
    return -_ENOSYS if operation == _ACCESS else None


def serve(mountpoint: str) -> None:
    """Mount and answer until killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"silent", mountpoint.encode(), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of a FUSE file system: {os.strerror(ctypes.get_errno())}")
    signal.alarm(_LIFETIME)
    print("mounted", flush=True)
    while True:
        request = os.read(device, 1 << 20)
        _, operation, unique, node = struct.unpack_from("=IIQQ", request)
        answer = _answer(operation, node)
        if isinstance(answer, int):
            os.write(device, struct.pack("=IiQ", 16, answer, unique))
        elif answer is not None:
            os.write(device, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)


@contextmanager
def silent_file(directory: Path) -> Iterator[Path]:
    """Yield the path of the file. At the end the server dies, which lets everybody go who hangs on it."""
    mountpoint = directory / "fuse"
    mountpoint.mkdir()
    server = subprocess.Popen([sys.executable, __file__, str(mountpoint)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        if server.stdout.readline() != b"mounted\n":
            raise RuntimeError("the FUSE server could not mount; its error is above")
        yield mountpoint / FILE
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
        ctypes.CDLL(None).umount2(str(mountpoint).encode(), _MNT_DETACH)


if __name__ == "__main__":
    serve(sys.argv[1])
