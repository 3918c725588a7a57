# SPDX-License-Identifier: MIT
"""What the service says of this machine: its devices, its allocators, and which of those would serve a spec.

Pure data, as frozen dataclasses; None, or an empty text, where the service gave none because it does not apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from udmabufd_client import contract
from udmabufd_client.errors import BadReply
from udmabufd_client.replies import typed


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one allocator says to a spec: whether it would be asked for the memory, and if not, why.

    `field` is the key of `constraints` or `spec` that decides, `device` whose demand that is (a device, or "spec"),
    `remedy` what would help. `cache_effective` is what CPU mappings of its memory would be (contract.Cache), and
    `cache_evidence` how that is known (contract.CacheEvidence). Each is empty where there is none.
    """

    allocator: str
    ok: bool
    field: str = ""
    device: str = ""
    reason: str = ""
    remedy: str = ""
    cache_effective: str = ""
    cache_evidence: str = ""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of Explain. Raises BadReply on a wrong type, and without an allocator or its answer."""
        return cls(**_complete("Explain", typed(raw, contract.VERDICT_TYPES), "allocator", "ok"))

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key: for JSON."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value != ""}


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device that imports dma-bufs: the one that a program opens, the one that does the DMA, and what it needs.

    `constraints` has the keys of contract.CONSTRAINT_KEYS, `sources` says by the same keys where each is known from.
    """

    device: str
    subsystem: str | None = None
    label: str | None = None
    driver: str | None = None
    dma_device: str | None = None
    dma_mask_bits: int | None = None
    iommu_group: str | None = None
    iommu_type: str | None = None
    numa_node: int | None = None
    constraints: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of ListDevices. Raises BadReply on a wrong type, and without a device."""
        return cls(**_complete("ListDevices", typed(raw, contract.DEVICE_TYPES), "device"))

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key: for JSON."""
        return _known(self)


@dataclass(frozen=True, kw_only=True)
class AllocatorInfo:
    """A source of memory: whether it can serve, what its memory is like, and where each figure is known from.

    `max_size`, `granule` and `free` in bytes. `cache` is what CPU mappings of its memory are (contract.Cache) unless
    another attribute is asked for that is among `caches`, all that can be had of it.
    """

    allocator: str
    kind: str | None = None
    available: bool | None = None
    reason: str | None = None
    max_size: int | None = None
    granule: int | None = None
    contiguous: bool | None = None
    address_bits: int | None = None
    cache: str | None = None
    caches: tuple[str, ...] | None = None
    cache_evidence: str | None = None
    accounting: str | None = None
    free: int | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Return one row of ListAllocators. Raises BadReply on a wrong type, and without a name."""
        row = _complete("ListAllocators", typed(raw, contract.ALLOCATOR_TYPES), "allocator")
        if "caches" in row:
            row["caches"] = tuple(row["caches"])
        return cls(**row)

    @property
    def obtainable(self) -> tuple[str, ...]:
        """Every cache attribute that can be had of it, the usual one first; none where the service does not say."""
        usual = () if self.cache is None else (self.cache,)
        return (*usual, *(cache for cache in self.caches or () if cache not in usual))

    def as_dict(self) -> dict[str, Any]:
        """Return what is known, by key: for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in _known(self).items()}


def _complete(member: str, row: dict[str, Any], *needed: str) -> dict[str, Any]:
    """Return `row`. Raises BadReply naming what it lacks."""
    for key in needed:
        if key not in row:
            raise BadReply(f"{member}: a row has no {key}.")
    return row


def _known(row: DeviceInfo | AllocatorInfo) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if value is not None and value != {}}
