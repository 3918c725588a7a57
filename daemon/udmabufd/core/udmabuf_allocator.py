# SPDX-License-Identifier: MIT
"""The allocator `udmabuf`: memfds exported as dma-bufs by /dev/udmabuf, and the state of that device.

The device may be absent at start, come, go, or fail its test; `probe` finds out, from a worker thread. The kernel
answers EINVAL for at least six causes, so limits are read and compared before it is asked.

What a probe has shown goes with the descriptor that it was shown of: memory that is made while another device takes
that one's place is described as what has made it.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.errors import CacheUnavailable, KernelLimit, UdmabufUnavailable
from udmabufd.core.matching import cache_refusals, decisive, effective_cache, refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.spec import MAX_SIZE, Request
from udmabufd.core.udmabuf_device import CACHE_FLAGS, Device, mapped_by, open_and_test, shows_unzeroed
from udmabufd.linux import dmabuf, fdstat, memfd, udmabuf
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF, Cache, CacheEvidence, CachePolicy, Kind

log = logging.getLogger(__name__)

_ORDINARY: Final = Capabilities(kind=Kind.DMA_BUF, sources={"granule": "pages of a memfd need not be adjacent"})
"""Pages of memfds, whoever exports them."""


class Exported(NamedTuple):
    """A dma-buf, the exporter that it must have, and how the CPU maps it, which the device that made it tells; None
    where that is not known.
    """

    dma_buf: OwnedFd
    exporter: str
    cache: Cache | None
    evidence: CacheEvidence | None


class UdmabufAllocator:
    """See the module. `device` and `parameters` are the paths of the node and of the driver's parameters."""

    name = UDMABUF
    free: int | None = None

    def __init__(self, device: Path, parameters: Path) -> None:
        self._path = device
        self._parameters = parameters
        self._device: Device | None = None
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
        reason, remedy = f"{self._path} cannot be used: {self._reason}", "kind=memfd is served without it"
        return Refusal("", "", reason, remedy, UdmabufUnavailable(f"{reason}. {remedy}"))

    @property
    def device(self) -> Device | None:
        """What is known of the present device, another one after each probe, None while there is none; borrowed."""
        return self._device

    @property
    def capabilities(self) -> Capabilities:
        """What its memory is like: ordinary pages, mapped as asked by a device that honours the flags."""
        return mapped_by(self._device, _ORDINARY)

    def maps(self, exporter: str) -> tuple[Cache | None, CacheEvidence | None]:
        """Return how every dma-buf of `exporter` is mapped, whatever was asked for, and how that is known: None unless
        that is the present device's, and it cannot map them in any other way.
        """
        device = self._device
        if device is None or device.exporter != exporter or device.caches or device.doubtful:
            return None, None
        known = mapped_by(device, _ORDINARY)
        return known.cache, known.evidence

    @property
    def max_size(self) -> int:
        """Bytes that the driver's size_limit_mb allows now; 0 while unavailable."""
        return 0 if self._device is None else min(self._limits().max_size, MAX_SIZE)

    def probe(self) -> bool:
        """Open and test the device anew; return whether it can be used. Blocks: call it from a worker thread."""
        device, reason = open_and_test(self._path)
        unzeroed = device is None or shows_unzeroed(device.fd)
        with self._lock:
            if self._device is not None:
                self._device.fd.close()
            self._device, self._reason, self.shows_unzeroed = device, reason, unzeroed
        return device is not None

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it does not suit, or why the driver would refuse `request`."""
        unsuitable = refusals(self.name, capabilities or self.capabilities, request, highest_address_bits)
        return decisive(unsuitable, self.unavailable) or self.refusals(request.size, 1)

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Make a sealed memfd of request.size bytes, filled by `populate`, and export it. Raises OSError, KernelLimit,
        UdmabufUnavailable, CacheUnavailable.
        """
        with ExitStack() as undo:
            fd = undo.enter_context(memfd.create(name, request.size))
            # Before the ioctl, and every page: else the client could read stale memory or lose its data.
            populate(fd.fileno(), request.size)
            memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
            exported = self.export_list([udmabuf.Item(fd.fileno(), 0, request.size)], request)
            undo.enter_context(exported.dma_buf)
            memory = describe(exported, self.name, fd, request.size, name)
            undo.pop_all()
        return memory

    def export_again(self, evicted: Memory, request: Request, name: str, populate: Populate) -> Memory:
        """Export the memfd of a buffer that was evicted, whose pages `populate` brings back; what is in them stays.
        Raises what allocate() does.
        """
        assert evicted.memfd is not None
        with ExitStack() as undo:
            # A file of its own, as the store takes none twice.
            fd = undo.enter_context(memfd.reopen(evicted.memfd.fileno()))
            populate(fd.fileno(), evicted.size)
            exported = self.export_list([udmabuf.Item(fd.fileno(), 0, evicted.size)], request)
            undo.enter_context(exported.dma_buf)
            memory = describe(exported, self.name, fd, evicted.size, name)
            undo.pop_all()
        return memory

    def refusals(self, size: int, items: int) -> tuple[Refusal, ...]:
        """Return why the driver would not export `size` bytes in so many `items` now; nothing if it would."""
        return tuple(filter(None, (self.unavailable, self._exceeds(size, items))))

    def export_list(self, items: Sequence[udmabuf.Item], request: Request | None = None) -> Exported:
        """Export `items`, one after the other, as one dma-buf, mapped as suits `request`, as usual without one; only a
        device that honours flags is told. Raises OSError, KernelLimit, UdmabufUnavailable, and CacheUnavailable or
        NoAllocator if the device cannot do (any more) what `request` insists on.
        """
        size = sum(item.size for item in items)
        with self._lock:
            if (gone := self.unavailable) is not None:
                raise gone.error
            assert self._device is not None
            device = self._device._replace(fd=self._device.fd.dup())
        with device.fd:
            if refusal := self._exceeds(size, len(items)):
                raise refusal.error
            capabilities = mapped_by(device, _ORDINARY)
            cache = capabilities.cache if request is None else self._cache_for(capabilities, request)
            try:
                dma_buf = self._create(device, items, cache)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # The parameters may have changed since they were read.
                if refusal := self._exceeds(size, len(items)):
                    raise refusal.error from error
                if request is None or cache in (None, Cache.CACHED):
                    raise
                # It has the attribute, but not for these pages: huge ones without page structures of their own, say.
                if not _does_cached(request):
                    raise CacheUnavailable(
                        f"cache: the kernel refused to map this memory {cache} ({error.strerror}); "
                        "Explain tells of other allocators"
                    ) from error
                cache = Cache.CACHED
                dma_buf = self._create(device, items, cache)
        return Exported(dma_buf, device.exporter, cache, capabilities.evidence)

    def close(self) -> None:
        """Close the device."""
        with self._lock:
            if self._device is not None:
                self._device.fd.close()
            self._device, self._reason = None, "the service is stopping"

    def _cache_for(self, capabilities: Capabilities, request: Request) -> Cache | None:
        """Return effective_cache(), once more: since `request` was judged, another device may have come in the place
        of the one that was there. Raises CacheUnavailable, NoAllocator.
        """
        for refusal in cache_refusals(self.name, capabilities, request):
            raise refusal.error
        return effective_cache(capabilities, request)

    def _create(self, device: Device, items: Sequence[udmabuf.Item], cache: Cache | None) -> OwnedFd:
        """Have `device` export `items`. Raises OSError."""
        told = CACHE_FLAGS[cache] if cache is not None and device.caches else 0
        flags = udmabuf.UDMABUF_FLAGS_CLOEXEC | told
        if len(items) == 1:
            return udmabuf.create(device.fd.fileno(), *items[0], flags, self._parameters)
        return udmabuf.create_list(device.fd.fileno(), items, flags, self._parameters)

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
            return self._limit("size", f"{size} bytes exceed", "size_limit_mb", limits.size_limit_mb)
        # UDMABUF_CREATE, for one, has no such limit.
        if items > 1 and items > limits.max_items:
            return self._limit("ranges", f"{items} exceed", "list_limit", limits.list_limit)
        return None

    def _limit(self, field: str, exceeds: str, parameter: str, value: int) -> Refusal:
        reason = f"{exceeds} udmabuf's parameter {parameter} of {value}"
        remedy = f"root can raise it in {self._parameters}"
        return Refusal(field, "", reason, remedy, KernelLimit(f"{field}: {reason}; {remedy}"))


def _does_cached(request: Request) -> bool:
    """Whether cached memory will do where what `request` prefers is not to be had."""
    accepted = request.merged.constraints.cache
    return request.cache_policy is CachePolicy.PREFER and (accepted is None or Cache.CACHED in accepted)


def unexported(name: str, size: int, populate: Populate) -> Memory:
    """Return memory that nobody has: a memfd of `size` bytes, filled by `populate`, for export_again(). Raises
    OSError.
    """
    with ExitStack() as undo:
        fd = undo.enter_context(memfd.create(name, size))
        populate(fd.fileno(), size)
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        identity = fdstat.look(fd.fileno())
        undo.pop_all()
    return Memory(
        allocator=UDMABUF,
        size=size,
        memfd=fd,
        dma_buf=None,
        device=identity.device,
        inode=identity.inode,
        cache=Cache.CACHED,
        evidence=CacheEvidence.DEFAULT,
        needs_sync=True,
    )


def describe(
    exported: Exported,
    allocator: str,
    fd: OwnedFd | None,
    size: int,
    name: str,
    accounting: Accounting = Accounting.SERVICE,
) -> Memory:
    """Check that `exported` is what was asked for, name it, and return it as Memory of `allocator` and `fd`. Raises
    OSError; both descriptors are the caller's then.
    """
    dma_buf = exported.dma_buf
    info = dmabuf.fdinfo(dma_buf.fileno())
    if (info.size, info.exporter) != (size, exported.exporter):
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
        cache=exported.cache,
        evidence=exported.evidence,
        # What the importers' caches do is not known here.
        needs_sync=True,
        accounting=accounting,
    )
