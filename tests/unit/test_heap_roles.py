# SPDX-License-Identifier: MIT
"""heap_capabilities: what is believed of a dma-heap for its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from udmabufd import config
from udmabufd.core.heap_allocator import HeapRoles, heap_capabilities
from udmabufd.core.matching import refusals
from udmabufd.core.memory import Accounting
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.linux import boot, dma_heap
from udmabufd_client.contract import Cache, CacheEvidence, Kind


@pytest.fixture(autouse=True)
def ordinary_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of arm's, that combines writes, and does not account for heaps."""
    monkeypatch.setattr(boot, "write_combining", lambda: True)
    monkeypatch.setattr(boot, "is_arm", lambda: True)
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


@pytest.mark.parametrize("name", ["system-uncached", "system-uncached-dma32", "cma-uncached"])
def test_a_name_alone_says_nothing_of_x86(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """There pages that a driver maps write-combined are cached unless it has told the kernel of it, too."""
    monkeypatch.setattr(boot, "is_arm", lambda: False)
    found = heap_capabilities(name, HeapRoles())
    assert found is not None
    assert (found.cache, found.evidence) == (None, None)
    assert not found.obtainable
    assert "cache" not in found.sources
    for cache in Cache:
        for demand in ({"cache_policy": "require"}, {"constraints": {"cache": [str(cache)]}}):
            spec = {"size": 1, "cache": str(cache), **demand}
            assert refusals(f"heap:{name}", found, Request.from_spec(spec), lambda: None), spec
        assert not refusals(f"heap:{name}", found, Request.from_spec({"size": 1, "cache": str(cache)}), lambda: None)
    other = heap_capabilities("system", HeapRoles())
    assert other is not None
    assert (other.cache, other.evidence) == (Cache.CACHED, CacheEvidence.DEFAULT)


@pytest.mark.parametrize("key", ["write_combine", "uncached"])
def test_an_administrator_is_believed_on_x86(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Also where the key says what is the default."""
    monkeypatch.setattr(boot, "is_arm", lambda: False)
    file = tmp_path / "udmabufd.toml"
    file.write_text(f"[heaps]\n{key} = ['system-uncached*', 'cma-uncached*']\n")
    found = heap_capabilities("system-uncached", config.load(file).heaps)
    assert found is not None
    assert found.cache is (Cache.WRITE_COMBINE if key == "write_combine" else Cache.UNCACHED)
    assert (found.evidence, found.sources["cache"]) == (CacheEvidence.DRIVER, f"its name is among [heaps] {key}")
    file.write_text("[heaps]\nbits32 = []\n")
    found = heap_capabilities("system-uncached", config.load(file).heaps)
    assert found is not None
    assert found.cache is None


@pytest.mark.parametrize("arm", [True, False])
def test_write_combining_that_is_not_known_is_told_uncached(monkeypatch: pytest.MonkeyPatch, arm: bool) -> None:
    monkeypatch.setattr(boot, "write_combining", lambda: False)
    monkeypatch.setattr(boot, "is_arm", lambda: arm)
    found = heap_capabilities("system-uncached", replace(HeapRoles(), write_combine=("system-unc*",)))
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
