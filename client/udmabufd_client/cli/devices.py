# SPDX-License-Identifier: MIT
"""`udmabufctl devices`: the devices of this machine that import dma-bufs, and what memory each needs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from udmabufd_client.cli.constraint import constraints_text
from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import Column, notes, table, width_of, write

if TYPE_CHECKING:
    from udmabufd_client.inventory import DeviceInfo

VERB = "devices"
SUMMARY = "list the devices that import dma-bufs, and what memory they need"
DESCRIPTION = (
    "List the devices of this machine that import dma-bufs, with the driver and the device that does the DMA, and "
    "what the service knows of the memory that they need, from the kernel and from its database of constraints; below "
    "the list with where each is known from. Others can be attached, too. A narrow terminal shows fewer columns."
)
EPILOG = """\
examples:
  udmabufctl devices
  udmabufctl devices --json | jq '.[] | {device, constraints}'
"""

_COLUMNS: Final = (
    Column("DEVICE", 0),
    Column("LABEL", 4, soft=True),
    Column("DRIVER", 7),
    Column("DMA DEVICE", 5, soft=True),
    Column("IOMMU", 3),
    Column("REACHES", 2, right=True),
    Column("NUMA", 1, right=True),
    Column("MEMORY", 9, soft=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the devices; return the exit status."""
    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        devices = client.devices()
    if arguments.json:
        print(as_json([device.as_dict() for device in devices]))
        return 0
    rows = [_cells(device) for device in devices]
    write(table(_COLUMNS, rows, width_of(sys.stdout)), sys.stdout, heading=True)
    notes([(device.device, _needs(device)) for device in devices if device.constraints], sys.stdout)
    return 0


def _needs(device: DeviceInfo) -> list[str]:
    """Return the constraints and where they are known from: a line for each source."""
    by_source: dict[str, dict[str, Any]] = {}
    for key, value in device.constraints.items():
        by_source.setdefault(device.sources.get(key, ""), {})[key] = value
    return [constraints_text(those) + (f": {source}" if source else "") for source, those in by_source.items()]


def _cells(device: DeviceInfo) -> tuple[str, ...]:
    return (
        device.device,
        device.label or "-",
        device.driver or "-",
        device.dma_device or "-",
        device.iommu_type or "-",
        f"{device.dma_mask_bits} bits" if device.dma_mask_bits is not None else "-",
        str(device.numa_node) if device.numa_node is not None else "-",
        constraints_text(device.constraints),
    )
