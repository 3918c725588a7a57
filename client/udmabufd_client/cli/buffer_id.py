# SPDX-License-Identifier: MIT
"""A buffer as it is named on the command line: by its id or its object path."""

from __future__ import annotations

import re

from udmabufd_client.contract import BUFFER_PATH_PREFIX

HELP = "the buffer's id, 16 hexadecimal digits as 'udmabufctl list' shows them, or its D-Bus object path"


def parse_buffer(text: str) -> str:
    """Return the id. Raises ValueError."""
    found = text.removeprefix(BUFFER_PATH_PREFIX).lower()
    if not re.fullmatch(r"[0-9a-f]{16}", found):
        raise ValueError(text)
    return found


parse_buffer.__name__ = "buffer id or path"
"""argparse names the type in its message."""
