# SPDX-License-Identifier: MIT
"""The driver's parameters, changed while it runs: read_limits() and the kernel agree at every value."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.buffers import MIB, PAGE, exported, holes, sealed_memfd
from udmabufd.linux import udmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

SetParameter = Callable[[str, int], None]


@pytest.mark.parametrize("megabytes", [1, 3, 65, 100])
def test_size_limit_at_run_time(device: OwnedFd, set_parameter: SetParameter, megabytes: int) -> None:
    """Lowered and raised, it holds at once, to the page."""
    set_parameter("size_limit_mb", megabytes)
    limits = udmabuf.read_limits()
    assert limits.size_limit_mb == megabytes
    assert limits.max_size == megabytes * MIB
    with exported(device, limits.max_size):
        pass
    with sealed_memfd(limits.max_size + PAGE, prepare=holes) as backing:
        with pytest.raises(HintedOSError, match=f"size_limit_mb of {megabytes}") as caught:
            udmabuf.create(device.fileno(), backing.fileno(), 0, limits.max_size + PAGE)
        assert caught.value.errno == errno.EINVAL


def test_no_buffer_at_all(device: OwnedFd, set_parameter: SetParameter) -> None:
    """At 0 even one page is too many."""
    set_parameter("size_limit_mb", 0)
    assert udmabuf.read_limits().max_size == 0
    with sealed_memfd(PAGE) as backing, pytest.raises(HintedOSError, match="size_limit_mb of 0"):
        udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE)


@pytest.mark.parametrize("megabytes", [-1, 2048, 4096, 2147483647])
def test_values_that_unfixed_kernels_wrap(device: OwnedFd, set_parameter: SetParameter, megabytes: int) -> None:
    """A fixed kernel multiplies in 64 bits as Limits does: 65 MiB are within all of these."""
    set_parameter("size_limit_mb", megabytes)
    assert udmabuf.read_limits().max_size >= 2048 * MIB
    with exported(device, 65 * MIB):
        pass


def test_parameters_are_there() -> None:
    """So that the defaults for kernels without them are not what the tests above saw."""
    assert set(Path(udmabuf.PARAMETERS).iterdir()) >= {
        Path(udmabuf.PARAMETERS, name) for name in ("list_limit", "size_limit_mb")
    }
