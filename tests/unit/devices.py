# SPDX-License-Identifier: MIT
"""Devices that a test makes up: they come, are found by name or by path, are watched, and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from udmabufd.core.constraints import Constraints
from udmabufd.core.device import Device
from udmabufd.core.errors import InvalidSpec, NoSuchDevice


def path_of(name: str) -> str:
    """Return where sysfs would have the device."""
    return f"/sys/devices/test/{name}"


class MadeUpDevices:
    """In the place of what udev knows (core.device.Devices); outlives the service. `watched` has paths.

    Set `while_found` to do something while a look-up is under way.
    """

    def __init__(self) -> None:
        self._there: dict[str, Device] = {}
        self.watched: list[str] = []
        self.asked: list[str] = []
        self.while_found: Callable[[str], None] = lambda _: None

    def come(self, name: str, **constraints: Any) -> Device:
        """Have a device of this name, which needs such memory."""
        self._there[name] = Device(
            name=name,
            node=None,
            subsystem="test",
            sysname=name,
            path=path_of(name),
            label=f"the {name}",
            dma_path=path_of(name),
            dma_subsystem="test",
            dma_sysname=name,
            constraints=Constraints.from_values(constraints),
        )
        return self._there[name]

    def go(self, name: str) -> str:
        """Have it gone; return the path that it had."""
        return self._there.pop(name).path

    async def find(self, name: str) -> Device:
        """Return the device of a name or path."""
        self.asked.append(name)
        if not name:
            raise InvalidSpec("device", "is empty")
        found = next((device for device in self._there.values() if name in (device.name, device.path)), None)
        self.while_found(name)
        if found is None:
            raise NoSuchDevice(f"{name}: there is no such device")
        return found

    async def all(self) -> list[Device]:
        """Return all of them."""
        return [self._there[name] for name in sorted(self._there)]

    def watch(self, device: Device) -> None:
        """Note that the end of `device` is to be told."""
        if self._there.get(device.sysname) is not device:
            raise NoSuchDevice(f"{device.name} is gone")
        self.watched.append(device.path)

    def unwatch(self, path: str) -> None:
        """Note that it is not any more."""
        self.watched = [watched for watched in self.watched if watched != path]
