# SPDX-License-Identifier: MIT
"""heap_capabilities: what is believed of a dma-heap for its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from udmabufd.core.heap_allocator import HeapRoles, heap_capabilities
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.linux import boot, dma_heap
from udmabufd_client.contract import Cache, CacheEvidence, Kind


@pytest.fixture(autouse=True)
def ordinary_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that combines writes, and does not account for heaps."""
    monkeypatch.setattr(boot, "write_combining", lambda: True)
    monkeypatch.setattr(dma_heap, "accounted", lambda: False)


@pytest.mark.parametrize(
    ("name", "contiguous", "bits", "cache"),
    [
        ("system", False, None, Cache.CACHED),
        ("reserved", True, None, Cache.CACHED),
        ("linux,cma", True, None, Cache.CACHED),
        ("default-pool", True, None, Cache.CACHED),
        ("default_cma_region", True, None, Cache.CACHED),
        ("system-uncached", False, None, Cache.WRITE_COMBINE),
        ("system-dma32", False, 32, Cache.CACHED),
        ("system-uncached-dma32", False, 32, Cache.WRITE_COMBINE),
        ("cma-uncached", True, None, Cache.WRITE_COMBINE),
    ],
)
def test_known_names(name: str, contiguous: bool, bits: int | None, cache: Cache) -> None:
    found = heap_capabilities(name, HeapRoles())
    assert found is not None
    assert (found.kind, found.granule, found.size_step) == (Kind.DMA_BUF, PAGE_SIZE, PAGE_SIZE)
    assert (found.contiguous, found.address_bits, found.cache) == (contiguous, bits, cache)
    assert found.evidence is (CacheEvidence.DEFAULT if cache is Cache.CACHED else CacheEvidence.DRIVER)
    assert found.accounting is Accounting.SYSTEM
    assert ("address_bits" in found.sources) == (bits is not None)


@pytest.mark.parametrize("name", ["system_cc_shared", "protected,secure-video", "System", "vendor", "reserved2"])
def test_unknown_names(name: str) -> None:
    """Memory shared with a hypervisor, or that the CPU may not touch, among them."""
    assert heap_capabilities(name, HeapRoles()) is None


def test_the_administrator_knows_more() -> None:
    roles = replace(HeapRoles(), contiguous=("vendor*",), uncached=("vendor-u?",), bits32=("vendor-uc",))
    found = heap_capabilities("vendor-uc", roles)
    assert found is not None
    assert (found.contiguous, found.address_bits, found.cache) == (True, 32, Cache.UNCACHED)
    assert heap_capabilities("linux,cma", roles) is None


def test_write_combining_that_is_not_known_is_told_uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "write_combining", lambda: False)
    found = heap_capabilities("system-uncached", HeapRoles())
    assert found is not None
    assert found.cache is Cache.UNCACHED
    assert "not known to combine writes" in found.sources["cache"]


def test_heaps_that_are_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dma_heap, "accounted", lambda: True)
    found = heap_capabilities("system", HeapRoles())
    assert found is not None
    assert found.accounting is Accounting.SERVICE


def test_whether_heaps_are_accounted_for_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service pays, for what is known."""

    def refuse() -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dma_heap, "accounted", refuse)
    found = heap_capabilities("system", HeapRoles())
    assert found is not None
    assert found.accounting is Accounting.SERVICE
