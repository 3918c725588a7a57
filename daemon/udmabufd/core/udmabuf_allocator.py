# SPDX-License-Identifier: MIT
"""The allocator `udmabuf`: memfds exported as dma-bufs by /dev/udmabuf, and the state of that device.

The device may be absent at start, come, go, or fail its test; `probe` finds out, from a worker thread. The kernel
answers EINVAL for at least six causes, so limits are read and compared before it is asked.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.errors import KernelLimit, UdmabufUnavailable
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import MAX_SIZE, Request
from udmabufd.linux import dmabuf, fdstat, memfd, selftest, udmabuf
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF, Cache, CacheEvidence, Kind

log = logging.getLogger(__name__)

_HINTS = {
    errno.ENOENT: "the kernel offers no such device; it needs CONFIG_UDMABUF",
    errno.EACCES: "the service may not open it; check the device's group and the unit's SupplementaryGroups=",
    errno.EPERM: "the unit's device policy forbids it; check DeviceAllow=",
}


class UdmabufAllocator:
    """See the module. `device` and `parameters` are the paths of the node and of the driver's parameters."""

    name = UDMABUF
    capabilities = Capabilities(
        kind=Kind.DMA_BUF,
        sources={
            "granule": "pages of a memfd need not be adjacent",
            "cache": "udmabuf maps memory cached in every version of Linux",
        },
    )
    free: int | None = None

    def __init__(self, device: Path, parameters: Path) -> None:
        self._path = device
        self._parameters = parameters
        self._device: OwnedFd | None = None
        self._reason = "it was not probed yet"
        self.shows_unzeroed = True
        """Whether pages that their owner has allocated, but never written, are exported unzeroed (see linux.selftest);
        also True while that is not known."""
        # A probe may replace the device while a worker thread makes a buffer with it.
        self._lock = threading.Lock()

    @property
    def unavailable(self) -> Refusal | None:
        """Why no dma-buf can be made at present, with what to do, or None."""
        if self._device is not None:
            return None
        error = UdmabufUnavailable(f"/dev/udmabuf cannot be used: {self._reason}. kind=memfd is served without it")
        return Refusal(
            "", "", f"/dev/udmabuf cannot be used: {self._reason}", "kind=memfd is served without it", error
        )

    @property
    def max_size(self) -> int:
        """Bytes that the driver's size_limit_mb allows now; 0 while unavailable."""
        return 0 if self._device is None else min(self._limits().max_size, MAX_SIZE)

    def probe(self) -> bool:
        """Open and test the device anew; return whether it can be used. Blocks: call it from a worker thread."""
        device, reason = self._open_and_test()
        shows_unzeroed = device is None or _shows_unzeroed(device)
        with self._lock:
            if self._device is not None:
                self._device.close()
            self._device, self._reason, self.shows_unzeroed = device, reason, shows_unzeroed
        return device is not None

    def match(self, request: Request) -> tuple[Refusal, ...]:
        """Return why it does not suit, or why the driver would refuse `request`."""
        unsuitable = refusals(self.name, self.capabilities, request, highest_address_bits)
        return unsuitable or self.refusals(request.size, 1)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make a sealed memfd of request.size bytes, filled by `populate`, and export it. Raises OSError, KernelLimit,
        UdmabufUnavailable.
        """
        with ExitStack() as undo:
            fd = undo.enter_context(memfd.create(name, request.size))
            # Before the ioctl, and every page: else the client could read stale memory or lose its data.
            populate(fd.fileno(), request.size)
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
            dma_buf = undo.enter_context(self.export_list([udmabuf.Item(fd.fileno(), 0, request.size)]))
            memory = describe(self.name, fd, dma_buf, request.size, name)
            undo.pop_all()
        return memory

    def refusals(self, size: int, items: int) -> tuple[Refusal, ...]:
        """Return why the driver would not export `size` bytes in so many `items` now; nothing if it would."""
        return tuple(filter(None, (self.unavailable, self._exceeds(size, items))))

    def export_list(self, items: Sequence[udmabuf.Item]) -> OwnedFd:
        """Export `items`, one after the other, as one dma-buf. Raises OSError, KernelLimit, UdmabufUnavailable."""
        size = sum(item.size for item in items)
        with self._lock:
            if (gone := self.unavailable) is not None:
                raise gone.error
            assert self._device is not None
            device = self._device.dup()
        with device:
            if refusal := self._exceeds(size, len(items)):
                raise refusal.error
            try:
                if len(items) == 1:
                    return udmabuf.create(device.fileno(), *items[0])
                return udmabuf.create_list(device.fileno(), items)
            except OSError as error:
                # The parameters may have changed since they were read.
                if error.errno == errno.EINVAL and (refusal := self._exceeds(size, len(items))):
                    raise refusal.error from error
                raise

    def close(self) -> None:
        """Close the device."""
        with self._lock:
            if self._device is not None:
                self._device.close()
            self._device, self._reason = None, "the service is stopping"

    def _open_and_test(self) -> tuple[OwnedFd | None, str]:
        try:
            device = udmabuf.open_device(str(self._path))
        except OSError as error:
            return None, _HINTS.get(error.errno or 0, error.strerror or "it cannot be opened")
        try:
            selftest.check(device.fileno())
        except (OSError, selftest.SelfTestFailed) as error:
            device.close()
            log.error("The self-test of /dev/udmabuf failed: %s", error)
            return None, f"its self-test failed ({error})"
        return device, ""

    def _limits(self) -> udmabuf.Limits:
        try:
            return udmabuf.read_limits(str(self._parameters))
        except OSError as error:
            # The driver knows its limits all the same; ours would only have explained them beforehand.
            log.warning("Cannot read the parameters of udmabuf, taking their defaults: %s", error)
            return udmabuf.DEFAULT_LIMITS

    def _exceeds(self, size: int, items: int = 1) -> Refusal | None:
        limits = self._limits()
        if size > limits.max_size:
            return _limit("size", f"{size} bytes exceed", "size_limit_mb", limits.size_limit_mb)
        # UDMABUF_CREATE, for one, has no such limit.
        if items > 1 and items > limits.max_items:
            return _limit("ranges", f"{items} exceed", "list_limit", limits.list_limit)
        return None


def _limit(field: str, exceeds: str, parameter: str, value: int) -> Refusal:
    reason = f"{exceeds} udmabuf's parameter {parameter} of {value}"
    remedy = "root can raise it in /sys/module/udmabuf/parameters"
    return Refusal(field, "", reason, remedy, KernelLimit(f"{field}: {reason}; {remedy}"))


def describe(
    allocator: str,
    fd: OwnedFd | None,
    dma_buf: OwnedFd,
    size: int,
    name: str,
    accounting: Accounting = Accounting.SERVICE,
) -> Memory:
    """Check that `dma_buf` is what was asked for, name it, and return it as Memory of `allocator` and `fd`. Raises
    OSError; both descriptors are the caller's then.
    """
    info = dmabuf.fdinfo(dma_buf.fileno())
    if (info.size, info.exporter) != (size, "udmabuf"):
        raise OSError(errno.EPROTO, f"exported {info.size} bytes by {info.exporter!r}")
    dmabuf.set_name(dma_buf.fileno(), name)
    identity = fdstat.look(dma_buf.fileno())
    return Memory(
        allocator=allocator,
        size=size,
        memfd=fd,
        dma_buf=dma_buf,
        device=identity.device,
        inode=identity.inode,
        # Mainline maps udmabuf memory cached in every version.
        cache=Cache.CACHED,
        evidence=CacheEvidence.DEFAULT,
        # What the importers' caches do is not known here.
        needs_sync=True,
        accounting=accounting,
    )


def _shows_unzeroed(device: OwnedFd) -> bool:
    try:
        return selftest.single_fallocate_flaw(device.fileno())
    except OSError as error:
        log.warning("Whether udmabuf exports unzeroed pages could not be found out, taken for yes: %s", error)
        return True
