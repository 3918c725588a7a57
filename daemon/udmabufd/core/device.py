# SPDX-License-Identifier: MIT
"""A device that will touch a buffer: what was found out about it, as data, and who is asked for it.

How a name is looked up is left to system/device_finder.py, what memory a device needs to database.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from udmabufd.core.constraints import NONE, Constraints
from udmabufd.core.errors import NoSuchDevice

TRANSLATING: Final = frozenset({"DMA", "DMA-FQ"})
"""Types of IOMMU groups whose devices see addresses that the kernel chooses
(Documentation/ABI/testing/sysfs-kernel-iommu_groups); `identity` and `blocked` are not among them."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device as it was when it was looked up.

    `name` is how the caller named it, `path` its path in sysfs, `node` its device node's. `dma_*` are of the device
    that does the DMA: the bus device that a class device belongs to, the host controller of a USB device, and the
    device itself where nothing does DMA. `driver` and `modalias` are that one's; `drivers` are all of those on the
    way to it, the nearest first, so that a camera on USB has both its own and its host controller's. `parameters`
    are module parameters of the nearest driver, `properties` udev's of the device itself. `card` is the DRM card that
    the device that does the DMA has, if it has one.

    `dma_mask_bits` (PCI only), IOMMU group and type and NUMA node are as sysfs tells, None where it does not.
    `constraints` and, for each key of theirs, `sources` are filled in by Database.describe().
    """

    name: str
    node: str | None
    subsystem: str
    sysname: str
    path: str
    label: str
    dma_path: str
    dma_subsystem: str
    dma_sysname: str
    driver: str | None = None
    drivers: tuple[str, ...] = ()
    modalias: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    dma_mask_bits: int | None = None
    iommu_group: str | None = None
    iommu_type: str | None = None
    numa_node: int | None = None
    card: str | None = None
    constraints: Constraints = NONE
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def translated(self) -> bool:
        """Whether an IOMMU stands between it and physical addresses; where that is not known, it counts as no."""
        return self.iommu_type in TRANSLATING


class Devices(Protocol):
    """Who knows the devices."""

    async def find(self, name: str) -> Device:
        """Return the device of a name: a device node, a path in sysfs, or `subsystem:name`.

        The name is a stranger's: neither opened nor looked at in any file system but sysfs. Raises InvalidSpec for
        what cannot be a name, NoSuchDevice, and IncompatibleConstraints where what is known of it is contradictory.
        """

    async def all(self) -> list[Device]:
        """Return the devices that a buffer can be meant for, in the order of their names."""

    def watch(self, device: Device) -> None:
        """Have its removal told from now on. Raises NoSuchDevice when it has gone since it was found.

        Call it on the event loop, in one go with what the removal has to undo.
        """

    def unwatch(self, path: str) -> None:
        """Have the removal of the device that sysfs has, or had, at `path` told no more."""


class NoDevices:
    """Devices where there are none."""

    async def find(self, name: str) -> Device:
        """Raise NoSuchDevice."""
        raise NoSuchDevice(f"{name}: there is no such device")

    async def all(self) -> list[Device]:
        """Return nothing."""
        return []

    def watch(self, device: Device) -> None:
        """Do nothing: none is ever found."""

    def unwatch(self, path: str) -> None:
        """Do nothing."""
