# SPDX-License-Identifier: MIT
"""What the tests on the real kernel share: the device, and the driver's parameters, put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udmabufd.linux import udmabuf
from udmabufd_base.fd import OwnedFd


@pytest.fixture
def device() -> Iterator[OwnedFd]:
    """/dev/udmabuf, opened as the daemon opens it."""
    with udmabuf.open_device() as fd:
        yield fd


@pytest.fixture
def set_parameter() -> Iterator[Callable[[str, int], None]]:
    """A function that sets a parameter of the driver until the end of the test."""
    before = {file: file.read_bytes() for file in Path(udmabuf.PARAMETERS).iterdir()}

    def write(name: str, value: int) -> None:
        Path(udmabuf.PARAMETERS, name).write_text(f"{value}\n", encoding="ascii")

    yield write
    for file, value in before.items():
        file.write_bytes(value)
