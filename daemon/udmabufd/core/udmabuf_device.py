# SPDX-License-Identifier: MIT
"""An open udmabuf device and what a probe has shown of it: from that follows how the memory that it exports is mapped.

When it is probed, and what is made with it, is the matter of the allocators over it.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from udmabufd.core.allocator import Capabilities
from udmabufd.linux import boot, cacheprobe, selftest, udmabuf
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF, Cache, CacheEvidence

log = logging.getLogger(__name__)

CACHE_FLAGS: Final = {
    Cache.CACHED: udmabuf.UDMABUF_FLAGS_CACHED,
    Cache.UNCACHED: udmabuf.UDMABUF_FLAGS_UNCACHED,
    Cache.WRITE_COMBINE: udmabuf.UDMABUF_FLAGS_WRITE_COMBINE,
}
"""What a device that honours flags is told."""

_ABSENT: Final = {udmabuf.DEVICE: "the kernel offers no such device; it needs CONFIG_UDMABUF"}
_HINTS: Final = {
    errno.EACCES: "the service may not open it; check the device's group and the unit's SupplementaryGroups=",
    errno.EPERM: "the unit's device policy forbids it; check DeviceAllow=",
}


class Device(NamedTuple):
    """An open device and what a probe has shown of it: what the kernel calls the exporter of its dma-bufs, and which
    cache attributes can be asked for, none of a device that does not heed the flags for them; `doubtful` if that could
    not be found out, and is only taken for no.
    """

    fd: OwnedFd
    exporter: str
    caches: frozenset[Cache]
    doubtful: bool = False


def open_and_test(path: Path) -> tuple[Device | None, str]:
    """Return the device of the node `path`, or None and why it cannot be used, as a clause. Blocks."""
    try:
        fd = udmabuf.open_device(str(path))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None, _ABSENT.get(str(path), "[udmabuf] device of the configuration names it, and it is not there")
        return None, _HINTS.get(error.errno or 0, error.strerror or "it cannot be opened")
    try:
        exporter = selftest.check(fd.fileno())
    except (OSError, selftest.SelfTestFailed) as error:
        fd.close()
        log.error("The self-test of %s failed: %s", path, error)
        return None, f"its self-test failed ({error})"
    try:
        return Device(fd, exporter, _caches(fd)), ""
    except OSError as error:
        log.warning("Whether udmabuf honours flags for cache attributes cannot be told, taken for no: %s", error)
        return Device(fd, exporter, frozenset(), doubtful=True), ""


def shows_unzeroed(device: OwnedFd) -> bool:
    """Return whether pages that were allocated, but never written, are exported unzeroed; also where that is not
    known. Blocks.
    """
    try:
        return selftest.single_fallocate_flaw(device.fileno())
    except OSError as error:
        log.warning("Whether udmabuf exports unzeroed pages could not be found out, taken for yes: %s", error)
        return True


def mapped_by(device: Device | None, capabilities: Capabilities) -> Capabilities:
    """Return `capabilities` of memory that `device` exports, with the cache attributes that it has or can be asked
    for: none of a device that is not there, or is not the kernel's own and does not heed flags.
    """
    sources = capabilities.sources
    if device is None or not (device.caches or device.exporter == UDMABUF):
        return replace(capabilities, cache=None, evidence=None)
    if not device.caches:
        source = "the kernel's own udmabuf maps memory cached in every version of Linux"
        return replace(capabilities, sources={**sources, "cache": source})
    source = "the device refuses flags that it does not know, and contradicting ones"
    if Cache.WRITE_COMBINE not in device.caches:
        source += "; this machine is not known to combine writes"
    return replace(
        capabilities,
        caches=device.caches,
        evidence=CacheEvidence.PROBE,
        sources={**sources, "cache": source},
    )


def _caches(device: OwnedFd) -> frozenset[Cache]:
    """Raises OSError."""
    if not cacheprobe.honours_cache_flags(device.fileno()):
        return frozenset()
    # Without page attribute tables x86 maps uncached what is asked to be write-combined.
    return frozenset(Cache) if boot.write_combining() else frozenset(Cache) - {Cache.WRITE_COMBINE}
