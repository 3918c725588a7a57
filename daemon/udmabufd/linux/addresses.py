# SPDX-License-Identifier: MIT
"""How far up the machine's memory reaches; which device can address it is left to the caller."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

_ZONEINFO: Final = Path("/proc/zoneinfo")

_FIELD: Final = re.compile(r"\s*(spanned|present|start_pfn:)\s+(\d+)")


def highest_address_bits(zoneinfo: Path = _ZONEINFO) -> int | None:
    """Return the bits of the highest physical address of memory that the kernel may hand out now, None where that
    cannot be read.

    From the zones that have pages present (zoneinfo_show_print, mm/vmstat.c): first page frame and frames spanned.
    Memory that is added while the machine runs shows there once it is online; memory of devices never does.
    """
    try:
        zones = zoneinfo.read_text(encoding="ascii").split(", zone ")[1:]
        highest = max(map(_end, zones), default=0)
    except (OSError, UnicodeDecodeError, KeyError):
        return None
    return (highest * mmap.PAGESIZE - 1).bit_length() if highest else None


def _end(zone: str) -> int:
    """Return the first page frame behind a zone, 0 for one without pages. Raises KeyError: it has no figures."""
    figures = {found[1]: int(found[2]) for line in zone.splitlines() if (found := _FIELD.fullmatch(line))}
    # A zone without pages has no start.
    return figures["start_pfn:"] + figures["spanned"] if figures["present"] else 0
