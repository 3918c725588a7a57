# SPDX-License-Identifier: MIT
"""The allocator `udmabuf`: memfds exported as dma-bufs by /dev/udmabuf, and the state of that device.

The device may be absent at start, come, go, or fail its test; `probe` finds out, from a worker thread. The kernel
answers EINVAL for at least six causes, so limits are read and compared before it is asked.
"""

from __future__ import annotations

import errno
import logging
import threading
from contextlib import ExitStack
from pathlib import Path

from udmabufd.core.allocator import refuse_other_caches
from udmabufd.core.errors import AllocatorError, KernelLimit, UdmabufUnavailable
from udmabufd.core.memory import Memory
from udmabufd.core.spec import MAX_SIZE, Request
from udmabufd.linux import dmabuf, memfd, selftest, udmabuf
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
    kind = Kind.DMA_BUF

    def __init__(self, device: Path, parameters: Path) -> None:
        self._path = device
        self._parameters = parameters
        self._device: OwnedFd | None = None
        self._reason = "it was not probed yet"
        # A probe may replace the device while a worker thread makes a buffer with it.
        self._lock = threading.Lock()

    @property
    def unavailable(self) -> AllocatorError | None:
        """Why no dma-buf can be made at present, with what to do, or None."""
        if self._device is not None:
            return None
        return UdmabufUnavailable(f"/dev/udmabuf cannot be used: {self._reason}. kind=memfd is served without it")

    @property
    def max_size(self) -> int:
        """Bytes that the driver's size_limit_mb allows now; 0 while unavailable."""
        return 0 if self._device is None else min(self._limits().max_size, MAX_SIZE)

    def probe(self) -> bool:
        """Open and test the device anew; return whether it can be used. Blocks: call it from a worker thread."""
        device, reason = self._open_and_test()
        with self._lock:
            if self._device is not None:
                self._device.close()
            self._device, self._reason = device, reason
        return device is not None

    def match(self, request: Request) -> AllocatorError | None:
        """Return why the driver would refuse `request`, or None."""
        return self.unavailable or self._exceeds(request) or refuse_other_caches(request)

    def allocate(self, request: Request, name: str) -> Memory:
        """Make a populated, sealed memfd of request.size bytes and export it. Raises OSError, KernelLimit,
        UdmabufUnavailable.
        """
        with ExitStack() as undo:
            fd = undo.enter_context(memfd.create(name, request.size))
            # Before the ioctl, and every page: else the client could read stale memory or lose its data.
            memfd.populate(fd.fileno(), request.size)
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
            dma_buf = undo.enter_context(self._export(fd, request))
            size, exporter = dmabuf.size(dma_buf.fileno()), dmabuf.fdinfo(dma_buf.fileno()).exporter
            if (size, exporter) != (request.size, "udmabuf"):
                raise OSError(errno.EPROTO, f"exported {size} bytes by {exporter!r}")
            dmabuf.set_name(dma_buf.fileno(), name)
            inode = dmabuf.inode(dma_buf.fileno())
            undo.pop_all()
        return Memory(
            allocator=self.name,
            memfd=fd,
            dma_buf=dma_buf,
            inode=inode,
            # Mainline maps udmabuf memory cached in every version.
            cache=Cache.CACHED,
            evidence=CacheEvidence.DEFAULT,
            # What the importers' caches do is not known here.
            needs_sync=True,
        )

    def close(self) -> None:
        """Close the device."""
        with self._lock:
            if self._device is not None:
                self._device.close()
            self._device, self._reason = None, "the service is stopping"

    def _export(self, fd: OwnedFd, request: Request) -> OwnedFd:
        with self._lock:
            if (gone := self.unavailable) is not None:
                raise gone
            assert self._device is not None
            device = self._device.dup()
        with device:
            try:
                return udmabuf.create(device.fileno(), fd.fileno(), 0, request.size)
            except OSError as error:
                # The parameters may have changed since match() read them.
                if error.errno == errno.EINVAL and (refusal := self._exceeds(request)):
                    raise refusal from error
                raise

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

    def _exceeds(self, request: Request) -> AllocatorError | None:
        limits = self._limits()
        if request.size > limits.max_size:
            return KernelLimit(
                f"size: {request.size} bytes exceed udmabuf's parameter size_limit_mb of {limits.size_limit_mb}; "
                "root can raise it in /sys/module/udmabuf/parameters"
            )
        return None
