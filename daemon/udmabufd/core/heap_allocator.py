# SPDX-License-Identifier: MIT
"""The allocators `heap:<name>`: the kernel's dma-heaps, one allocator each.

A heap tells nothing of itself but its name. What its memory is like follows from the name, by the globs of HeapRoles:
heap_capabilities() is the one place of that. A heap that they do not know is not used: it may be protected from the
CPU, or be readable by a hypervisor.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from udmabufd.core.allocator import Capabilities, Populate, Refusal
from udmabufd.core.errors import OutOfMemory
from udmabufd.core.matching import decisive, refusals
from udmabufd.core.memory import Accounting, Memory
from udmabufd.core.node import NOTHING_KNOWN, Node, Unusable, describe, passing_shortage
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import boot, dma_heap, dmabuf
from udmabufd.linux.addresses import highest_address_bits
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import HEAP_PREFIX, Cache, CacheEvidence, Kind

log = logging.getLogger(__name__)


UNCACHED_BY_NAME: Final = ("system-uncached*", "cma-uncached*")
"""The default, told by its identity from the same globs of an administrator, who knows the heap."""


def _globs(default: tuple[str, ...], doc: str) -> Any:
    return field(default=default, metadata={"unit": "globs", "doc": doc})


@dataclass(frozen=True, slots=True)
class HeapRoles:
    """Which heaps are of which kind: globs of their names below /dev/dma_heap. The defaults are names of mainline
    Linux, and of Android's and Rockchip's kernels.
    """

    system: tuple[str, ...] = _globs(
        ("system", "system-uncached", "system-dma32", "system-uncached-dma32"),
        "Heaps of ordinary pages, which need not be adjacent. A dma-heap that neither this key nor contiguous names "
        "is not used.",
    )
    contiguous: tuple[str, ...] = _globs(
        ("reserved", "linux,cma", "default-pool", "default_cma_region", "cma", "cma-uncached"),
        "Heaps whose buffers are each one physically contiguous run.",
    )
    write_combine: tuple[str, ...] = _globs(
        UNCACHED_BY_NAME,
        "Heaps that the CPU maps write-combined, as the kernels do that name some of them uncached. The default is "
        "believed on arm alone: on other machines what such a heap maps is not known, unless this key is set.",
    )
    uncached: tuple[str, ...] = _globs((), "Heaps that the CPU maps uncached.")
    bits32: tuple[str, ...] = _globs(
        ("system-dma32", "system-uncached-dma32"),
        "Heaps whose memory has physical addresses below 4 GiB.",
    )


def heap_capabilities(heap: str, roles: HeapRoles) -> Capabilities | None:
    """Return what the memory of the heap of this name, without prefix, is like; None where that is not known."""
    contiguous = _among(heap, roles.contiguous)
    if not contiguous and not _among(heap, roles.system):
        return None
    sources = {
        "contiguous": f"its name is among [heaps] {'contiguous' if contiguous else 'system'}",
        "granule": "more than pages is not known of any heap",
        "cache": "the heaps of mainline Linux are mapped cached",
        "accounting": "the kernel charges memory of dma-heaps to no control group",
    }
    cache: Cache | None = Cache.CACHED
    evidence: CacheEvidence | None = CacheEvidence.DEFAULT
    if _among(heap, roles.uncached):
        cache, evidence = Cache.UNCACHED, CacheEvidence.DRIVER
        sources["cache"] = "its name is among [heaps] uncached"
    elif _among(heap, roles.write_combine) and roles.write_combine is UNCACHED_BY_NAME and not boot.is_arm():
        # Such drivers write the attribute into page tables, and leave the kernel's other mapping of the pages cached:
        # arm does as the page tables say, x86 as it knows of the pages (track_pfn_remap, arch/x86/mm/pat/memtype.c).
        cache = evidence = None
        del sources["cache"]
    elif _among(heap, roles.write_combine):
        combines = boot.write_combining()
        cache, evidence = Cache.WRITE_COMBINE if combines else Cache.UNCACHED, CacheEvidence.DRIVER
        lacking = "" if combines else ", and this machine is not known to combine writes"
        sources["cache"] = f"its name is among [heaps] write_combine{lacking}"
    low = _among(heap, roles.bits32)
    if low:
        sources["address_bits"] = "its name is among [heaps] bits32"
    accounting = Accounting.SYSTEM
    if _accounted():
        accounting = Accounting.SERVICE
        sources["accounting"] = "the kernel's parameter dma_heap.mem_accounting is set"
    return Capabilities(
        kind=Kind.DMA_BUF,
        contiguous=contiguous,
        address_bits=32 if low else None,
        cache=cache,
        evidence=evidence,
        accounting=accounting,
        sources=sources,
    )


class HeapAllocator:
    """See the module. `path` is the heap's node; nothing is opened before probe()."""

    free: int | None = None

    def __init__(self, path: Path, roles: HeapRoles) -> None:
        self.name = f"{HEAP_PREFIX}{path.name}"
        self._path = path
        self._roles = roles
        self.capabilities = NOTHING_KNOWN
        """What its memory is like, as a probe has found out; nothing of one that is not used."""
        self._node = Node(self.name)

    @property
    def unavailable(self) -> Refusal | None:
        """Why it cannot be used, with what to do, or None."""
        return self._node.unavailable

    @property
    def max_size(self) -> int:
        """Bytes of the machine's memory, for a heap does not tell its own; 0 while unavailable."""
        return 0 if self.unavailable else os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE

    def probe(self) -> bool:
        """Open the heap anew and make a page of it; return whether it can be used. Blocks: for a worker thread."""
        return self._node.probe(self._open)

    def match(self, request: Request, capabilities: Capabilities | None = None) -> tuple[Refusal, ...]:
        """Return why it does not suit `request`, or is not there."""
        unsuitable = refusals(self.name, capabilities or self.capabilities, request, highest_address_bits)
        return decisive(unsuitable, self.unavailable) or tuple(filter(None, (self._exceeds(request.size),)))

    def allocate(self, request: Request, name: str, populate: Populate) -> Memory:
        """Have the kernel make request.size bytes, which it zeroes: `populate` is not called. Raises OSError,
        NoAllocator, OutOfMemory.
        """
        if refusal := self._exceeds(request.size):
            raise refusal.error
        with self._node.lend() as heap, ExitStack() as undo:
            dma_buf = undo.enter_context(dma_heap.allocate(heap.fileno(), request.size))
            memory = describe(self.name, self.capabilities, dma_buf, request.size, name, self._path.name)
            undo.pop_all()
        return memory

    def close(self) -> None:
        """Close the heap; what it has given stays as it is."""
        self._node.close()

    def _open(self) -> OwnedFd:
        # Here, not when it is made: files are read for it.
        known = heap_capabilities(self._path.name, self._roles)
        self.capabilities = known or NOTHING_KNOWN
        if known is None:
            raise Unusable(
                "what memory of this dma-heap is like is not known",
                "if it is known to you, name it in [heaps] system or contiguous of the configuration",
            )
        with ExitStack() as undo:
            heap = undo.enter_context(dma_heap.open_heap(str(self._path)))
            with passing_shortage(), dma_heap.allocate(heap.fileno(), PAGE_SIZE) as page:
                if (exporter := dmabuf.fdinfo(page.fileno()).exporter) != self._path.name:
                    raise Unusable(f"its dma-bufs are exported by {exporter!r}")
            undo.pop_all()
        return heap

    def _exceeds(self, size: int) -> Refusal | None:
        # Asked for more, the system heap would have processes killed until none is left.
        limit = self.max_size
        if self.unavailable is not None or size <= limit:
            return None
        reason = f"{size} bytes exceed the machine's memory of {limit}"
        return Refusal("size", "", reason, "", OutOfMemory(f"size: {reason}"))


def _among(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _accounted() -> bool:
    try:
        return dma_heap.accounted()
    except OSError as error:
        log.warning("Whom memory of dma-heaps is charged to cannot be found out, taken for the service: %s", error)
        return True
