#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes the journal's catalog from the daemon's table of events: systemd/man/catalog.py >systemd/udmabufd.catalog.

The file is committed, so that it can be installed without running anything; a test compares it with the table. The
format is https://systemd.io/CATALOG/'s. What the manual page says of the events is left to `sources`.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).resolve().parents[2]

WIDTH: Final = 79
"""journalctl --catalog indents the text by three and breaks no lines."""

HEAD: Final = """\
# SPDX-License-Identifier: MIT
#
# What journalctl --catalog shows beside the entries of udmabufd.
# Made by systemd/man/catalog.py from daemon/udmabufd/core/event_table.py; change it there.
"""


def catalog() -> str:
    """Return the whole file."""
    from udmabufd.core.event_table import Event

    parts = [HEAD]
    for event in Event:
        paragraphs = (
            textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
            for text in event.explanation.split("\n\n")
        )
        parts.append(
            f"-- {event.message_id}\n"
            f"Subject: {event.subject}\n"
            "Defined-By: udmabufd\n"
            "Documentation: man:udmabufd(8)\n"
            "\n" + "\n\n".join(paragraphs) + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path[:0] = [str(TOP / "daemon"), str(TOP / "client")]
    sys.stdout.write(catalog())
