# SPDX-License-Identifier: MIT
"""The descriptors that the service manager passed to this process, by name: the protocol of sd_listen_fds(3).

What they are and whether they are wanted is left to the caller, who owns them.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from udmabufd_base.fd import OwnedFd

if TYPE_CHECKING:
    from collections.abc import MutableMapping

log = logging.getLogger(__name__)

FIRST: Final = 3
"""SD_LISTEN_FDS_START: the number of the first descriptor; the others follow without a gap."""

UNNAMED: Final = "unknown"
"""What systemd calls a descriptor without a name."""

VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def take(environ: MutableMapping[str, str] | None = None) -> dict[str, list[OwnedFd]]:
    """Return the descriptors passed to this process by their names, and remove the variables that announce them.

    They are close-on-exec, which systemd leaves to the receiver. Empty when $LISTEN_PID is another process: they were
    its, and their numbers may be anything here. A number that is not open is logged and left out.
    """
    variables = os.environ if environ is None else environ
    pid, count, names, _ = (variables.pop(variable, None) for variable in VARIABLES)
    if pid is None or count is None or not _is(pid, os.getpid()):
        return {}
    if not (count.isascii() and count.isdecimal()):
        log.error("The service manager's LISTEN_FDS is no number: %r; what it passed is lost", count)
        return {}
    numbers = range(FIRST, FIRST + int(count))
    listed = [UNNAMED] * len(numbers) if names is None else _names(names)
    if len(listed) != len(numbers):
        log.error("The service manager passed %d descriptors and %d names for them", len(numbers), len(listed))
        listed = [UNNAMED] * len(numbers)
    found: dict[str, list[OwnedFd]] = {}
    for number, name in zip(numbers, listed, strict=True):
        try:
            os.set_inheritable(number, False)
        except OSError as error:
            log.error("Descriptor %d, passed by the service manager as %r: %s", number, name, error.strerror)
        else:
            found.setdefault(name, []).append(OwnedFd(number))
    return found


def _is(text: str, number: int) -> bool:
    return text.isascii() and text.isdecimal() and int(text) == number


def _names(text: str) -> list[str]:
    """Return the names in `text`: separated by colons, a backslash taking the next character as it is."""
    if not text:
        return []
    names = [""]
    escaped = False
    for character in text:
        if character == "\\" and not escaped:
            escaped = True
            continue
        if character == ":" and not escaped:
            names.append("")
        else:
            names[-1] += character
        escaped = False
    return names
