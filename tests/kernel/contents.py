# SPDX-License-Identifier: MIT
"""What buffers hold, cheaply: a word at the beginning of each page and one at the end, which tell who wrote last.

A page that was not copied, was copied to another place, or is of an older state shows. `Known.content` of the books
has "" for memory that nobody has written to, which is zero, and otherwise what stamp() returned.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.kernel.buffers import PAGE, mapped
from udmabufd_base.fd import OwnedFd

_WORD: Final = 8
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)


def stamp(fd: OwnedFd, size: int, number: int) -> str:
    """Write into a buffer of `size` bytes, whole pages, and return what it holds now."""
    with mapped(fd, size) as view:
        words = np.frombuffer(view, dtype=np.uint64)
        words[:: PAGE // _WORD] = _of(number, size // PAGE)
        words[-1] = number
        del words
    return f"{number} {size}"


def difference(fd: OwnedFd, size: int, content: str) -> str:
    """Return "" if a buffer of `size` bytes holds `content` (beyond what that is of: zeros), or what it holds."""
    number, written = map(int, content.split()) if content else (0, 0)
    expected = np.zeros(size // PAGE, dtype=np.uint64)
    expected[: written // PAGE] = _of(number, written // PAGE)
    with mapped(fd, size) as view:
        words = np.frombuffer(view, dtype=np.uint64)
        wrong = np.flatnonzero(words[:: PAGE // _WORD] != expected)
        last = int(words[written // _WORD - 1]) if written else 0
        beyond = int(words[-1]) if written < size else 0
        del words
    if len(wrong):
        return (
            f"{len(wrong)} of {size // PAGE} pages, from page {wrong[0]} to page {wrong[-1]}, are not of {content!r}"
        )
    return "" if (last, beyond) == (number, 0) else f"it ends in {last} and {beyond}, and should with {number}"


def _of(number: int, pages: int) -> NDArray[np.uint64]:
    return np.arange(1, pages + 1, dtype=np.uint64) * _ODD + np.uint64(number)
