# SPDX-License-Identifier: MIT
"""linux.hugepages: pools as the kernel shows them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from udmabufd.linux import hugepages
from udmabufd.linux.errors import HintedOSError

HUGE = 2 << 20


def pool(tmp_path: Path, **pages: int | str) -> hugepages.Pool:
    """Read a pool of which some figures are given, the others 0."""
    folder = tmp_path / "hugepages-2048kB"
    folder.mkdir(exist_ok=True)
    for name in ("nr", "free", "resv", "surplus", "nr_overcommit"):
        (folder / f"{name}_hugepages").write_text(f"{pages.get(name, 0)}\n")
    return hugepages.read_pool(HUGE, tmp_path)


@pytest.mark.parametrize(
    ("pages", "capacity", "available"),
    [
        ({}, 0, 0),
        ({"nr": 8, "free": 8}, 8, 8),
        ({"nr": 8, "free": 3}, 8, 3),
        ({"nr": 8, "free": 3, "resv": 2}, 8, 1),
        # Surplus pages: none yet, two of four, all, and more than are allowed since the limit was lowered.
        ({"nr_overcommit": 4}, 4, 4),
        ({"nr": 10, "free": 0, "surplus": 2, "nr_overcommit": 4}, 12, 2),
        ({"nr": 12, "free": 0, "surplus": 4, "nr_overcommit": 4}, 12, 0),
        ({"nr": 12, "free": 0, "surplus": 4, "nr_overcommit": 1}, 12, 0),
        # Before Linux 6.17 udmabuf takes from the reserved ones what was never reserved, and the figure wraps.
        ({"nr": 8, "free": 3, "resv": 2**63 - 1}, 8, 0),
    ],
)
def test_pools(tmp_path: Path, pages: dict[str, int], capacity: int, available: int) -> None:
    found = pool(tmp_path, **pages)
    assert (found.capacity, found.available) == (capacity * HUGE, available * HUGE)


def test_no_pool_of_that_size(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hugepages.read_pool(1 << 30, tmp_path)


def test_what_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(HintedOSError, match="expected a number of pages, found 'many'") as caught:
        pool(tmp_path, free="many")
    assert caught.value.errno == errno.EINVAL
