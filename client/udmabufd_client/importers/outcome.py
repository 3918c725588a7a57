# SPDX-License-Identifier: MIT
"""What came of an import, and the sentences that say why one failed, by errno and by what was being done."""

from __future__ import annotations

import errno
import grp
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a device took a buffer, by the kernel's own answer.

    `how` says what was asked of which driver, as far as it came. If the buffer was not `taken`, `reason` is a sentence
    with cause and next step, and `error` the kernel's answer, such as EINVAL (empty where it was not asked).
    `tried` says whether the kernel judged this buffer at all: it did not where the device could not be opened or used.
    """

    taken: bool
    how: str
    reason: str = ""
    error: str = ""
    tried: bool = True


class Step(StrEnum):
    """What was being done when the kernel refused."""

    LOOK = "look"
    OPEN = "open"
    USE = "use"
    """Talking to a device that is open, before it saw the buffer."""
    IMPORT = "import"


class Refused(Exception):
    """The kernel refused a step with `error`; `how` as in Outcome, `hint` the cause where it is known better."""

    def __init__(self, step: Step, error: OSError, how: str, hint: str = "") -> None:
        super().__init__(str(error))
        self.step = step
        self.error = error
        self.how = how
        self.hint = hint


_GONE: Final = "the device is gone, or no driver is bound to it: see 'udmabufctl devices'"
_BUSY: Final = "another program is using it: 'fuser -v {path}' names it; end that program, or stop its stream"
_NO_IMPORT: Final = "its driver does not import other devices' memory: share a memfd, or copy through the CPU, instead"
_WANTS: Final = (
    "it imports no memory of others at all, or cannot use memory of this kind, most often because it needs physically "
    "contiguous memory. 'udmabufctl explain --device {path}' says which allocator suits it"
)
_NOT_ENOUGH: Final = "the kernel has no memory, or the device no address space, left to map it; free some, try again"

_MEANINGS: Final[dict[Step, dict[int, str]]] = {
    Step.LOOK: {
        errno.ENOENT: "there is no such node: 'udmabufctl devices' lists those that there are",
        errno.ENOTDIR: "a part of the path is no directory: 'udmabufctl devices' lists the nodes that there are",
        errno.EACCES: "a directory on the way to it is closed to this user",
        errno.ELOOP: "its symbolic links lead in a circle",
        errno.ENAMETOOLONG: "no path is that long",
    },
    Step.OPEN: {
        errno.EACCES: "this user may not open it: {grant}",
        errno.EPERM: "a device policy (of a service, container or sandbox) forbids it, whoever asks",
        errno.ENOENT: _GONE,
        errno.ENODEV: _GONE,
        errno.ENXIO: _GONE,
        errno.EBUSY: _BUSY,
        errno.EROFS: "it lies on a file system that is mounted read-only",
    },
    Step.USE: {
        errno.EACCES: "the driver lets only authenticated or privileged programs do this: a DRM render node "
        "(/dev/dri/renderD*) needs neither",
        errno.EPERM: "the driver lets only privileged programs do this",
        errno.EBUSY: _BUSY,
        errno.ENOTTY: "its driver does not know the call: it is no importer",
        errno.EINVAL: "its driver does not take buffers of others, or not from the input that is chosen",
        errno.ENODEV: _GONE,
        errno.ENXIO: _GONE,
        errno.EIO: "the device does not answer: see the kernel's log ('journalctl -k')",
        errno.ENOMEM: _NOT_ENOUGH,
    },
    Step.IMPORT: {
        errno.EINVAL: _WANTS,
        errno.EFAULT: _WANTS,
        errno.EIO: _WANTS,
        errno.ERANGE: _WANTS,
        errno.ENOMEM: _NOT_ENOUGH,
        errno.ENOSPC: _NOT_ENOUGH,
        errno.ENODEV: _NO_IMPORT,
        errno.ENOSYS: _NO_IMPORT,
        errno.EOPNOTSUPP: _NO_IMPORT,
        errno.ENOTTY: "its driver does not know the call: it is no importer",
        errno.EACCES: "the driver lets only authenticated programs import, or the buffer is read-only: a DRM render "
        "node (/dev/dri/renderD*) needs no authentication",
        errno.EPERM: "the driver lets only privileged programs import",
        errno.EBUSY: "its exporter cannot move it to where this device reaches it, or another program is using it",
        errno.EBADF: "the buffer's descriptor is closed, or no dma-buf",
    },
}

_VERBS: Final = {
    Step.LOOK: "cannot be found",
    Step.OPEN: "cannot be opened",
    Step.USE: "cannot be asked",
    Step.IMPORT: "refuses the buffer",
}


def of(refused: Refused, path: str) -> Outcome:
    """Return the outcome of an import of which `path`'s device refused a step."""
    code = refused.error.errno or 0
    name = errno.errorcode.get(code, str(code))
    known = refused.hint or _MEANINGS[refused.step].get(code, "")
    cause = known.format(path=path, grant=_who_may(path)) if known else os.strerror(code)
    reason = f"{path} {_VERBS[refused.step]}: {cause} ({name})."
    return Outcome(False, refused.how, reason, name, tried=refused.step is Step.IMPORT)


def _who_may(path: str) -> str:
    """Name who may open the node, for a user who may not."""
    try:
        found = Path(path).stat()
    except OSError:
        return "ask its administrator"
    group = _group(found.st_gid)
    if found.st_mode & 0o060 == 0o060:
        return f"it is for root and the group {group}; a local session gets access by itself where systemd-logind runs"
    return "it is for root alone"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
