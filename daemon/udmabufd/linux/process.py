# SPDX-License-Identifier: MIT
"""What /proc tells of another process, without taking another's word for it: process ids are used again.

What is made of it is left to the caller. Needs a /proc that shows other users' processes (no hidepid=).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from typing import Final

from udmabufd_base.fd import OwnedFd

_PID_LINE: Final = re.compile(rb"^Pid:\t(-?\d+)$", re.MULTILINE)

_MAX_FILE: Final = 64 << 10
"""Bytes of a cgroup file that are looked at; a path has at most 4096, and each v1 hierarchy has one."""


def cgroup_of(pid: int, pidfd: OwnedFd | None, *, uid: int) -> str | None:
    """Return the cgroup v2 path of process `pid`, or None where it cannot be had for certain: the process has gone.

    `pidfd` refers to the process and is borrowed: that it still lives after the reading proves that the number was
    its own. Without one the process with that number must be one of `uid` (its effective user id), so that a number
    used again can lend at most the name of another application of the same user. The path is "/" where the process is
    in no group, and may hold any character but NUL and line ends: users make groups.

    A few reads of /proc, which wait for nothing but the kernel's own locks. Raises OSError for want of descriptors
    or memory only (EMFILE, ENFILE, ENOMEM).
    """
    try:
        # Bound to the process that has the number now, not to the number.
        folder = OwnedFd(os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    with folder:
        # Of a folder of /proc the owner is the effective user, of an undumpable process, too (proc_pid(5)).
        if pidfd is None and os.fstat(folder.fileno()).st_uid != uid:
            return None
        content = _read(b"cgroup", folder.fileno())
    if content is None or (pidfd is not None and not _lives(pid, pidfd)):
        return None
    return _unified(content)


def _lives(pid: int, pidfd: OwnedFd) -> bool:
    """Return whether the process of `pidfd` has this number and has not ended."""
    info = _read(b"/proc/self/fdinfo/%d" % pidfd.fileno())
    # -1 once it was waited for; without such a line it is no pidfd, and must not be polled: that may hang.
    match = _PID_LINE.search(info or b"")
    if match is None or int(match[1]) != pid:
        return False
    ended = select.poll()
    ended.register(pidfd.fileno(), select.POLLIN)
    return not ended.poll(0)


def _read(path: bytes, folder: int | None = None) -> bytes | None:
    """Return what is in a file of /proc; None when the process has gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder))
        with fd:
            return os.read(fd.fileno(), _MAX_FILE)
    return None


def _unified(content: bytes) -> str | None:
    """Return the path in the line of the unified hierarchy, `0::PATH`."""
    for line in content.split(b"\n"):
        if line.startswith(b"0::/"):
            # The kernel says so of a group that was removed below a process that has not been waited for.
            return line[3:].removesuffix(b" (deleted)").decode("utf-8", "surrogateescape")
    return None
