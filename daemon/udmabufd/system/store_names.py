# SPDX-License-Identifier: MIT
"""Names for what is in the service manager's store: short, because all of them travel in one environment string."""

from __future__ import annotations

import heapq
import string
from typing import Final

ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
LONGEST: Final = 3
"""Characters of the longest name."""

_SIZES: Final[list[int]] = [len(ALPHABET) ** length for length in range(1, LONGEST + 1)]


class StoreNames:
    """A free list of names of 1 to 3 characters [0-9A-Za-z], the shortest first."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._freed: list[int] = []
        self._next = 0

    def take(self) -> str:
        """Return a name that is not in use, until free(). Raises RuntimeError when all 242,234 are in use."""
        while self._freed:
            number = heapq.heappop(self._freed)
            if number not in self._taken:
                break
        else:
            while self._next in self._taken:
                self._next += 1
            number = self._next
            if number >= sum(_SIZES):
                raise RuntimeError("every name of the store is in use")
            self._next += 1
        self._taken.add(number)
        return _name(number)

    def reserve(self, name: str) -> None:
        """Take `name`, if it is one of the list, off it until free()."""
        number = _number(name)
        if number is not None:
            self._taken.add(number)

    def free(self, name: str) -> None:
        """Put `name` back; harmless for one that is free or not of the list."""
        number = _number(name)
        if number in self._taken:
            self._taken.remove(number)
            if number < self._next:
                heapq.heappush(self._freed, number)

    def __contains__(self, name: str) -> bool:
        """Whether `name` is in use."""
        return _number(name) in self._taken


def _name(number: int) -> str:
    length = 1
    while number >= _SIZES[length - 1]:
        number -= _SIZES[length - 1]
        length += 1
    text = ""
    for _ in range(length):
        number, digit = divmod(number, len(ALPHABET))
        text = ALPHABET[digit] + text
    return text


def _number(name: str) -> int | None:
    """Return the place of `name` in the list; None for a name that is not of it."""
    if not 1 <= len(name) <= LONGEST or any(character not in ALPHABET for character in name):
        return None
    number = 0
    for character in name:
        number = number * len(ALPHABET) + ALPHABET.index(character)
    return sum(_SIZES[: len(name) - 1]) + number
