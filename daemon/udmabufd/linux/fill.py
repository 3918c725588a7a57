# SPDX-License-Identifier: MIT
"""Populates a memfd in a child process, which the kernel's OOM killer takes in the place of this one.

Allocation beyond memory.max of the control group ends not in ENOMEM, but in the death of a process of the group. The
child asks for that with an oom_score_adj of 1000, does the allocation, and what it has allocated stays with the memfd.
A service needs OOMPolicy=continue, or systemd ends it when the child dies. When that is worth a process, some 20 ms,
is left to the caller; so is the room for the child itself, some 10 MiB.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Final

from udmabufd.linux.errors import HintedOSError

_CALL: Final = "fallocate in a child process"

_TIMEOUT: Final = 60.0
"""Seconds; only a machine that does nothing but swap, or a group far above memory.high, needs more."""

# The shell makes itself the victim before the interpreter, which takes some MiB by itself, is started.
_VICTIM: Final = 'echo 1000 >/proc/self/oom_score_adj && exec "$0" "$@"'

# memfd.populate, whose reasons hold here too, for a process that imports nothing of ours.
_FILL: Final = """
import os, sys
fd = int(sys.argv[1])
try:
    for line in sys.stdin:
        offset, size = map(int, line.split())
        os.posix_fallocate(fd, offset, size)
        os.posix_fallocate(fd, offset, size)
except OSError as error:
    print(error.errno)
else:
    print(0)
"""


class FillKilled(HintedOSError):
    """ENOMEM: the child was killed, most likely by the OOM killer."""


def populate_in_child(fd: int, size: int) -> None:
    """Do what memfd.populate does to the first `size` bytes of the memfd `fd`, in a child process.

    Blocks until the child has ended: for a worker thread. Raises FillKilled; OSError: ENOMEM if the child could not be
    started, else what the kernel answered it, as memfd.populate. What was allocated by then stays with the memfd.
    """
    populate_ranges_in_child(fd, [(0, size)])


def populate_ranges_in_child(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Do what memfd.populate_ranges does to `ranges`, pairs of offset and size in bytes, in one child process. Raises
    OSError as populate_in_child() does.
    """
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _VICTIM, sys.executable, "-I", "-S", "-c", _FILL, str(fd)],
            input="".join(f"{offset} {size}\n" for offset, size in ranges),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(fd,),
            env={},
            encoding="ascii",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _no_memory(f"the process that was to fill the memfd did not end within {_TIMEOUT:.0f} s") from error
    except OSError as error:
        hint = f"the process that was to fill the memfd could not be started ({error.strerror}); check TasksMax="
        raise _no_memory(hint) from error
    if done.returncode < 0:
        hint = f"the process that filled the memfd was killed by signal {-done.returncode}; see MemoryMax="
        raise FillKilled(errno.ENOMEM, _CALL, hint)
    answer = done.stdout.strip()
    if not answer.isdecimal():
        raise _no_memory(f"the process that was to fill the memfd ended with status {done.returncode}")
    if code := int(answer):
        hint = "no memory for it" if code in (errno.ENOMEM, errno.ENOSPC) else os.strerror(code)
        raise HintedOSError(code, _CALL, hint)


def _no_memory(hint: str) -> OSError:
    return HintedOSError(errno.ENOMEM, _CALL, hint)
