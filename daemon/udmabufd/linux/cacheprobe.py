# SPDX-License-Identifier: MIT
"""Whether a udmabuf device honours the flags for cache attributes, found out by asking it for what it must refuse.

Mainline's driver ignores flags that it does not know (drivers/dma-buf/udmabuf.c, up to Linux 7.2), so that success
proves nothing; a refusal does. What mappings really are is not looked at here: nothing unprivileged shows it.
"""

from __future__ import annotations

import errno
import mmap
from typing import Final

from udmabufd.linux import memfd, udmabuf

UNKNOWN_FLAG: Final = 1 << 31
"""A flag that nobody has given a meaning."""

_MUST_BE_REFUSED: Final = (
    UNKNOWN_FLAG,
    udmabuf.UDMABUF_FLAGS_CACHED | udmabuf.UDMABUF_FLAGS_UNCACHED,
    udmabuf.UDMABUF_FLAGS_CACHED | udmabuf.UDMABUF_FLAGS_WRITE_COMBINE,
    udmabuf.UDMABUF_FLAGS_UNCACHED | udmabuf.UDMABUF_FLAGS_WRITE_COMBINE,
)

_MUST_BE_ACCEPTED: Final = (
    udmabuf.UDMABUF_FLAGS_CACHED,
    udmabuf.UDMABUF_FLAGS_UNCACHED,
    udmabuf.UDMABUF_FLAGS_WRITE_COMBINE,
)


def honours_cache_flags(device: int) -> bool:
    """Return whether `device`, an open udmabuf device, refuses an unknown flag and two attributes at once with EINVAL,
    and accepts each single one. Makes buffers of one page; blocks for a moment.

    Raises OSError if the device refuses for another reason: that says nothing about flags.
    """
    _check_serving(device)
    # The first that is not as it must be decides, and on a device that ignores flags that is the very first.
    return all(_refuses(device, flags) for flags in _MUST_BE_REFUSED) and all(
        _accepts(device, flags) for flags in _MUST_BE_ACCEPTED
    )


def _refuses(device: int, flags: int) -> bool:
    if _accepts(device, flags):
        return False
    # EINVAL has many causes, of which root may make some at any time: the flags' it is between two buffers without.
    _check_serving(device)
    return True


def _check_serving(device: int) -> None:
    if not _accepts(device, 0):
        raise OSError(errno.EINVAL, "it refuses buffers without flags, too")


def _accepts(device: int, flags: int) -> bool:
    # Each has a page of its own: what another process still has of the one before could be a reason to refuse.
    with memfd.create("udmabufd-cacheprobe", mmap.PAGESIZE) as backing:
        memfd.populate(backing.fileno(), mmap.PAGESIZE)
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        try:
            udmabuf.create(device, backing.fileno(), 0, mmap.PAGESIZE, udmabuf.UDMABUF_FLAGS_CLOEXEC | flags).close()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
    return True
