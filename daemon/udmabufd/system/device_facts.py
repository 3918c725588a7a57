# SPDX-License-Identifier: MIT
"""What sysfs tells of a device and of the one that does the DMA for it. Few small files are read, each of them an
answer from the kernel's memory; nothing is written.

What sysfs does not tell (masks of other buses than PCI, segment sizes, contiguity) is left to core/database.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from udmabufd.core.device import Device

if TYPE_CHECKING:
    from udmabufd.system.udev import UdevDevice

DMA_BUSES: Final = frozenset({"pci", "platform", "amba", "faux", "vmbus", "xen", "ccw", "fsl-mc", "host1x", "vio"})
"""Buses whose devices reach memory themselves; on others (usb, virtio, i2c, spi, ...) the device that they hang from
does: of virtio the transport (drivers/virtio/virtio_ring.c, vring_dma_dev)."""

VIRTIO_TRANSPORTS: Final = frozenset({"virtio-pci", "virtio-mmio", "virtio_ccw"})
"""Drivers that say nothing of what the device is: the one of the virtio device below does."""

MAX_PARAMETER: Final = 4096
"""Bytes of a module parameter: sysfs gives a page at most."""

MAX_MASK: Final = 64

MAX_LABEL: Final = 80
"""Characters of a label."""


def device_of(found: UdevDevice, name: str, parameters: Iterable[str] = ()) -> Device:
    """Return what sysfs tells of the device that was named `name`, with those module parameters of its driver.

    Blocks. What has vanished meanwhile is left out.
    """
    chain = _up_to_dma(found)
    dma = chain[-1]
    at = Path(dma.sys_path)
    properties = [_properties(device) for device in chain]
    drivers = [device.driver for device in chain if device.driver]
    if drivers[:1] and drivers[0] in VIRTIO_TRANSPORTS:
        drivers[:0] = _virtio_drivers(at)
    node_text = _read(at / "numa_node")
    numa_node = int(node_text) if node_text is not None and node_text.isdigit() else None  # -1: none
    return Device(
        name=name,
        node=found.device_node,
        subsystem=found.subsystem or "",
        sysname=found.sys_name,
        path=found.sys_path,
        label=_label(chain, properties),
        dma_path=dma.sys_path,
        dma_subsystem=dma.subsystem or "",
        dma_sysname=dma.sys_name,
        driver=dma.driver,
        drivers=tuple(dict.fromkeys(drivers)),
        modalias=properties[-1].get("MODALIAS"),
        properties=properties[0],
        parameters=_parameters(chain, parameters),
        dma_mask_bits=_dma_mask_bits(dma),
        iommu_group=_link(at / "iommu_group"),
        iommu_type=_read(at / "iommu_group" / "type"),
        numa_node=numa_node,
        card=_card(chain),
    )


def _up_to_dma(device: UdevDevice) -> list[UdevDevice]:
    """Return the device and those above it, up to the first that does DMA; it alone where none does."""
    chain = [device]
    while chain[-1].subsystem not in DMA_BUSES:
        parent = chain[-1].parent
        if parent is None:
            return chain[:1]
        chain.append(parent)
    return chain


def _dma_mask_bits(dma: UdevDevice) -> int | None:
    """Return how many bits of address its driver has said that it can take.

    Only PCI tells (drivers/pci/pci-sysfs.c), and without a driver only what every device starts with.
    """
    text = _read(Path(dma.sys_path, "dma_mask_bits")) if dma.driver else None
    bits = int(text) if text is not None and text.isdigit() else 0
    return bits if 0 < bits <= MAX_MASK else None


def _virtio_drivers(transport: Path) -> list[str]:
    """Return the drivers of the virtio devices that a transport carries: one, where it is bound."""
    found = (_link(transport / name / "driver") for name in _names(transport) if name.startswith("virtio"))
    return [driver for driver in found if driver is not None]


def _card(chain: list[UdevDevice]) -> str | None:
    """Return the name of the DRM card that one of the devices has, None where there is none."""
    names = (name for device in chain for name in _names(Path(device.sys_path, "drm")) if name.startswith("card"))
    return next(names, None)


def _label(chain: list[UdevDevice], properties: list[dict[str, str]]) -> str:
    """Return what the device calls itself, or what udev's hardware database calls it, or else its driver or name."""
    text = (
        _read(Path(chain[0].sys_path, "name"))
        or next((name for each in properties if (name := each.get("ID_MODEL_FROM_DATABASE"))), None)
        or next((device.driver for device in chain if device.driver), None)
        or chain[-1].sys_name
    )
    # Of a USB device its maker has written it, or whoever is called so.
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_LABEL])


def _properties(device: UdevDevice) -> dict[str, str]:
    properties = {}
    for key in device.properties:
        # A string that a device has sent may be cut within a character.
        with contextlib.suppress(UnicodeDecodeError):
            properties[key] = device.properties[key]
    return properties


def _parameters(chain: list[UdevDevice], names: Iterable[str]) -> dict[str, str]:
    """Return those module parameters of the nearest driver that can be read."""
    nearest = next((device for device in chain if device.driver), None)
    if nearest is None:
        return {}
    folder = Path(nearest.sys_path, "driver", "module", "parameters")
    values = {name: _read(folder / name) for name in names if "/" not in name}
    return {name: value for name, value in values.items() if value is not None}


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PARAMETER).decode("utf-8", "replace").strip()
    except OSError:
        return None


def _names(folder: Path) -> list[str]:
    """Return what is in a folder, nothing if there is none."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 (names are wanted)
    except OSError:
        return []


def _link(path: Path) -> str | None:
    """Return the name of what a link leads to, None if there is none."""
    try:
        return os.path.basename(os.readlink(path))  # noqa: PTH115, PTH119 (text of a link, not a path to follow)
    except OSError:
        return None
