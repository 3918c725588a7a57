# SPDX-License-Identifier: MIT
"""What memory devices need that no interface of the kernel tells: entries that match devices, each with its source.

Pure: where entries come from is left to udmabufd/database.py, how a device is looked up to system/device_finder.py.
Nothing is assumed of a device that no entry matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from udmabufd.core.constraints import NONE, Constraints, Demand, merge
from udmabufd.core.device import Device
from udmabufd.core.errors import IncompatibleConstraints
from udmabufd_client.contract import DUMB_PREFIX, Cache

Kernel = tuple[int, int]
"""Version and patch level, such as (6, 12)."""

Globs = tuple[str, ...]
"""Shell patterns of which one has to match; none at all match anything."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """A range of kernels: from `first` on, up to but without `end`; None for no limit."""

    first: Kernel | None = None
    end: Kernel | None = None

    def __contains__(self, kernel: Kernel) -> bool:
        return (self.first is None or kernel >= self.first) and (self.end is None or kernel < self.end)


@dataclass(frozen=True, slots=True)
class Match:
    """Which devices are meant: those for which all that is stated here is so.

    `driver` is one of Device.drivers. `subsystem` and `name` (the kernel's name, such as `vivid.0`) are both of the
    device itself or both of the one that does the DMA; `modalias` is the latter's. `property` has udev's properties,
    `parameter` module parameters of the nearest driver. Where one is a list, the figure that counts is that of the
    device's instance: the number that `instance`, a regular expression, finds in its label. `iommu` is whether an
    IOMMU translates what the device addresses.
    """

    driver: Globs = ()
    subsystem: Globs = ()
    name: Globs = ()
    modalias: Globs = ()
    property: Mapping[str, Globs] = field(default_factory=dict)
    parameter: Mapping[str, Globs] = field(default_factory=dict)
    instance: re.Pattern[str] | None = None
    iommu: bool | None = None
    kernel: Kernels = field(default=Kernels())

    def fits(self, device: Device, kernel: Kernel) -> bool:
        """Return whether `device`, on a kernel of this version, is meant."""
        names = (device.subsystem, device.sysname), (device.dma_subsystem, device.dma_sysname)
        return (
            kernel in self.kernel
            and self.iommu in (None, device.translated)
            and any(_any(self.driver, driver) for driver in device.drivers or (None,))
            and any(_any(self.subsystem, subsystem) and _any(self.name, name) for subsystem, name in names)
            and _any(self.modalias, device.modalias)
            and all(_any(globs, device.properties.get(key)) for key, globs in self.property.items())
            and all(_any(globs, self._parameter(device, key)) for key, globs in self.parameter.items())
        )

    def _parameter(self, device: Device, name: str) -> str | None:
        value = device.parameters.get(name)
        if value is None or "," not in value:
            return value
        found = None if self.instance is None else self.instance.search(device.label)
        number = "" if found is None else found[1]
        figures = value.split(",")
        return figures[int(number)] if number.isdecimal() and int(number) < len(figures) else None


@dataclass(frozen=True, slots=True)
class DumbFacts:
    """What a DRM driver's dumb buffers are like: the cache attribute of their mappings, by the dma-buf too, and
    whether each is one physically contiguous run. `source` says where that is known from.
    """

    cache: Cache
    contiguous: bool
    source: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of the devices that `match`, and where from.

    With `by_cpu` their driver reads and writes buffers by the CPU alone, so that what sysfs says of DMA does not
    matter to them. With `own_only` it takes no memory but that of its own DRM device.
    """

    match: Match
    source: str
    constraints: Constraints = NONE
    by_cpu: bool = False
    own_only: bool = False
    dumb: DumbFacts | None = None


class Database:
    """All entries, for one kernel."""

    def __init__(self, entries: Iterable[Entry], kernel: Kernel) -> None:
        self._entries = tuple(entries)
        self._kernel = kernel

    @property
    def parameters(self) -> frozenset[str]:
        """The module parameters that entries ask for."""
        return frozenset(name for entry in self._entries for name in entry.match.parameter)

    def describe(self, device: Device) -> Device:
        """Return the device with what is known of it: constraints, and where each comes from.

        Raises IncompatibleConstraints, its `devices` being two sources, where they contradict each other.
        """
        matching = self._matching(device)
        demands = [Demand(entry.source, entry.constraints) for entry in matching]
        if device.card is not None:
            own = Constraints(allocators=frozenset({f"{DUMB_PREFIX}{device.card}"}))
            demands += [Demand(entry.source, own) for entry in matching if entry.own_only]
        mask = device.dma_mask_bits
        if (
            mask is not None
            and mask < 64
            and not device.translated
            and not any(entry.by_cpu or entry.own_only for entry in matching)
        ):
            iommu = (
                "without an IOMMU" if device.iommu_group is None else f"IOMMU type {device.iommu_type or 'unknown'}"
            )
            source = f"sysfs: dma_mask_bits {mask} of {device.dma_subsystem}:{device.dma_sysname}, {iommu}"
            demands.insert(0, Demand(source, Constraints(address_bits=mask)))
        try:
            merged = merge(demands)
        except IncompatibleConstraints as error:
            raise IncompatibleConstraints(
                error.field, error.devices, f"what is known of {device.name} contradicts itself: {error}"
            ) from error
        return replace(device, constraints=merged.constraints, sources=dict(merged.by))

    def dumb_of(self, device: Device) -> DumbFacts | None:
        """Return what dumb buffers of this DRM device are like, None where that is not known."""
        return next((entry.dumb for entry in self._matching(device) if entry.dumb is not None), None)

    def _matching(self, device: Device) -> list[Entry]:
        return [entry for entry in self._entries if entry.match.fits(device, self._kernel)]


def kernel_version(release: str) -> Kernel:
    """Return version and patch level of a release as uname has it, such as `6.12.107+deb13-amd64`."""
    version, level = re.match(r"(\d+)\.(\d+)", release).groups()  # type: ignore[union-attr]
    return int(version), int(level)


def parse_kernels(text: str) -> Kernels:
    """Return the range that `text` states, such as `>=6.11,<6.16`. Raises ValueError."""
    limits: dict[str, Kernel] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(>=|<)\s*(\d+)\.(\d+)\s*", part)
        if found is None or found[1] in limits:
            raise ValueError(f"{text!r} is no range of kernels such as '>=6.11,<6.16'")
        limits[found[1]] = int(found[2]), int(found[3])
    return Kernels(limits.get(">="), limits.get("<"))


def _any(globs: Globs, value: str | None) -> bool:
    return not globs or (value is not None and any(fnmatchcase(value, glob) for glob in globs))
