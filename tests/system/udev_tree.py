# SPDX-License-Identifier: MIT
"""A made-up sysfs: devices with what pyudev says of them, their files in a folder, and who looks them up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class StandIn:
    """What is used of a pyudev.Device."""

    sys_path: str
    subsystem: str | None
    sys_name: str
    parent: StandIn | None
    device_node: str | None = None
    device_links: tuple[str, ...] = ()
    driver: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        raise TypeError("a device of pyudev is true or false by the number of its properties, and warns of it")


class Tree:
    """Devices below a folder that stands for /sys; it is looked up in as udev is, and counts how often."""

    def __init__(self, sysfs: Path) -> None:
        self.sysfs = sysfs
        self.devices: dict[str, StandIn] = {}
        self.listed = 0
        """How often all devices of a subsystem were asked for."""
        self.asked = 0
        """How often one device was."""

    def add(
        self,
        path: str,
        subsystem: str | None,
        *,
        node: str | None = None,
        links: tuple[str, ...] = (),
        driver: str | None = None,
        files: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> StandIn:
        """Make a device at `path` below devices/, with `files` (relative path -> text), and return it."""
        folder = self.sysfs / "devices" / path
        for name, text in (files or {}).items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        folder.mkdir(parents=True, exist_ok=True)
        above = next((self.devices[str(up)] for up in folder.parents if str(up) in self.devices), None)
        made = StandIn(str(folder), subsystem, folder.name, above, node, links, driver, properties or {})
        self.devices[str(folder)] = made
        return made

    def link(self, path: str, target: str) -> None:
        """Make a symbolic link at `path` below devices/."""
        (self.sysfs / "devices" / path).symlink_to(target)

    def by_name(self, subsystem: str, sysname: str) -> StandIn | None:
        self.asked += 1
        return next((one for one in self.of_subsystem(subsystem) if one.sys_name == sysname), None)

    def by_path(self, path: str) -> StandIn | None:
        self.asked += 1
        return self.devices.get(path)

    def of(self, subsystem: str) -> Iterable[StandIn]:
        self.listed += 1
        return list(self.of_subsystem(subsystem))

    def of_subsystem(self, subsystem: str) -> Iterator[StandIn]:
        return (one for one in self.devices.values() if one.subsystem == subsystem)
