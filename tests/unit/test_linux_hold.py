# SPDX-License-Identifier: MIT
"""linux.hold: a mapping without access, on a memfd, which is mapped in the same way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from udmabufd.linux import memfd
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd

SIZE = 1 << 20
NAME = "held-by-the-test"


def mappings() -> list[str]:
    """Return permissions of this process's mappings of the memfd."""
    return [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if NAME in line]


def test_maps_without_access_until_closed() -> None:
    """Nor does it keep a descriptor of its own."""
    with memfd.create(NAME, SIZE) as fd:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names are wanted)
        hold = Hold(fd.fileno(), SIZE)
        assert mappings() == ["---s"]
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 (names are wanted)
        for _ in range(2):
            hold.close()
            assert mappings() == []


@pytest.mark.parametrize(("size", "code"), [(0, errno.EINVAL), (1 << 62, errno.ENOMEM)])
def test_what_cannot_be_mapped(size: int, code: int) -> None:
    with memfd.create(NAME, SIZE) as fd, pytest.raises(OSError) as caught:
        Hold(fd.fileno(), size)
    assert caught.value.errno == code


def test_a_file_that_cannot_be_mapped() -> None:
    reading, writing = (OwnedFd(end) for end in os.pipe())
    with reading, writing, pytest.raises(OSError) as caught:
        Hold(reading.fileno(), SIZE)
    assert caught.value.errno == errno.ENODEV
