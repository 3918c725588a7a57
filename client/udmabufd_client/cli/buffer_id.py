# SPDX-License-Identifier: MIT
"""A buffer as it is named on the command line: by its id or its object path, or, to take a share of it, its ticket."""

from __future__ import annotations

import re
from dataclasses import dataclass

from udmabufd_client.contract import BUFFER_PATH_PREFIX

HELP = "the buffer's id, 16 hexadecimal digits as 'udmabufctl list' shows them, or its D-Bus object path"

HELP_OR_TICKET = f"{HELP}, or its ticket (GetTicket), 32 digits"


@dataclass(frozen=True, slots=True)
class Named:
    """What names a buffer: the one or the other."""

    id: str = ""
    ticket: str = ""


def parse_buffer(text: str) -> str:
    """Return the id. Raises ValueError."""
    found = text.removeprefix(BUFFER_PATH_PREFIX).lower()
    if not re.fullmatch(r"[0-9a-f]{16}", found):
        raise ValueError(text)
    return found


parse_buffer.__name__ = "buffer id or path"
"""argparse names the type in its message."""


def parse_named(text: str) -> Named:
    """Return the id or the ticket. Raises ValueError."""
    if re.fullmatch(r"[0-9a-f]{32}", text.lower()):
        return Named(ticket=text.lower())
    return Named(id=parse_buffer(text))


parse_named.__name__ = "buffer id, path or ticket"
