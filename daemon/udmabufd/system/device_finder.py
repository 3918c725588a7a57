# SPDX-License-Identifier: MIT
"""Looks up the device that a client names, in sysfs and udev's database.

A name comes from a stranger. A path in /dev is not looked at, for it may lie on a file system that never answers:
device nodes are found by the names that udev knows. What sysfs tells of a device is left to device_facts.py,
what memory it needs to core/database.py, its removal to devices.py.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec, NoSuchDevice
from udmabufd.core.events import Event, emit
from udmabufd.system.device_facts import device_of
from udmabufd.system.devices import DeviceEvent
from udmabufd.system.udev import UdevLookup

if TYPE_CHECKING:
    from udmabufd.core.database import Database
    from udmabufd.core.device import Device
    from udmabufd.system.udev import UdevDevice

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME_MAX: Final = 256
PATH_MAX: Final = 512
"""Bytes of a device's name, and of its path in sysfs: both go into records of a fixed size."""

NODE_SUBSYSTEMS: Final = ("drm", "video4linux", "accel", "media", "misc")
"""Subsystems whose device nodes are found by their paths and links; devices of others only as subsystem:name."""

LISTED: Final = ("drm", "video4linux", "accel")
"""Subsystems whose devices buffers are meant for."""

SYSFS: Final = "/sys"
SYSFS_ROOTS: Final = ("devices", "class", "bus", "block", "dev")
"""Folders of sysfs that lead to devices. In others (fs, kernel, firmware) other file systems are mounted."""

_PRINTABLE: Final = re.compile(r"[ -~]+")
_SUBSYSTEM: Final = re.compile(r"[A-Za-z0-9_.+-]+")


class Submit(Protocol):
    """Workers.submit: runs what blocks in a thread."""

    def __call__(self, job: Callable[[], T], /) -> Awaitable[T]: ...


class Lookup(Protocol):
    """What is used of UdevLookup, so that tests can put their own in its place. Called in threads, one at a time."""

    def by_name(self, subsystem: str, sysname: str) -> UdevDevice | None: ...
    def by_path(self, path: str) -> UdevDevice | None: ...
    def of(self, subsystem: str) -> Iterable[UdevDevice]: ...


class Monitor(Protocol):
    """What is used of DeviceMonitor."""

    @property
    def generation(self) -> int | None: ...
    def watch(self, device: DeviceEvent) -> None: ...
    def unwatch(self, path: str) -> None: ...


class DeviceFinder:
    """The devices of this machine: core.device.Devices."""

    def __init__(self, submit: Submit, database: Database, monitor: Monitor, *, lookup: Lookup | None = None) -> None:
        """Look up in threads (`submit`), take what is known from `database`, have removals told by `monitor`."""
        self._submit = submit
        self._database = database
        self._monitor = monitor
        self._lookup: Lookup = UdevLookup() if lookup is None else lookup
        self._links: tuple[int, dict[str, list[str]]] | None = None
        self._contradicted: set[str] = set()

    async def find(self, name: str) -> Device:
        """Return the device of a name: a device node or a link to one, a path in sysfs, or `subsystem:name`.

        Raises InvalidSpec for what cannot be a name, NoSuchDevice, and IncompatibleConstraints where what is known of
        the device is contradictory.
        """
        look_up = self._parse(name)
        device = await self._submit(lambda: self._find(name, look_up))
        try:
            return self._database.describe(device)
        except IncompatibleConstraints as error:
            self._tell_contradiction(device, error)
            raise

    async def all(self) -> list[Device]:
        """Return the devices that buffers are meant for, in the order of their names.

        One of which what is known is contradictory has no constraints, and the contradiction for a source.
        """
        described = []
        for device in await self._submit(self._all):
            try:
                described.append(self._database.describe(device))
            except IncompatibleConstraints as error:
                self._tell_contradiction(device, error)
                described.append(replace(device, sources={error.field: str(error)}))
        return described

    def watch(self, device: Device) -> None:
        """Have its removal told from now on. Raises NoSuchDevice when it has gone since it was found."""
        self._monitor.watch(DeviceEvent(device.subsystem, device.sysname, device.node, device.path))
        # Only now: what goes from here on is told.
        if not Path(device.path).exists():
            raise NoSuchDevice(f"{device.name}: the device has just been removed")

    def unwatch(self, path: str) -> None:
        """Have the removal of the device at `path` told no more."""
        self._monitor.unwatch(path)

    def _parse(self, name: str) -> Callable[[], UdevDevice | None]:
        """Return how to look up `name`. Raises InvalidSpec; looks at nothing but the text."""
        longest = PATH_MAX if name.startswith(f"{SYSFS}/") else NAME_MAX
        if not 0 < len(name) <= longest or not _PRINTABLE.fullmatch(name):
            raise InvalidSpec("device", f"must be 1 to {longest} printable characters of ASCII")
        if name.startswith("/"):
            parts = name.split("/")[1:]
            if any(part in ("", ".", "..") for part in parts):
                raise InvalidSpec("device", "must be a path without '.', '..' and empty parts")
            if parts[0] == "dev" and len(parts) > 1:
                return lambda: self._by_node(name, parts[-1])
            if parts[0] == "sys" and len(parts) > 2 and parts[1] in SYSFS_ROOTS:
                return lambda: self._lookup.by_path(name)
            roots = ", ".join(f"/sys/{root}/" for root in SYSFS_ROOTS)
            raise InvalidSpec("device", f"must be a path below /dev/ or one of {roots}")
        subsystem, colon, sysname = name.partition(":")
        if not colon or not _SUBSYSTEM.fullmatch(subsystem) or "/" in sysname or sysname in ("", ".", ".."):
            raise InvalidSpec("device", "must be a device node, a path in sysfs, or subsystem:name")
        if subsystem in (".", ".."):
            raise InvalidSpec("device", "has no subsystem before the colon")
        return lambda: self._lookup.by_name(subsystem, sysname)

    def _find(self, name: str, look_up: Callable[[], UdevDevice | None]) -> Device:
        found = look_up()
        # Buses, classes, drivers and modules have paths and names in sysfs, too, and are no devices.
        if found is None or not found.sys_path.startswith(f"{SYSFS}/devices/") or len(found.sys_path) > PATH_MAX:
            found = None  # or it would live on in the error's traceback, out of the lock
            hint = "; other devices than those of ListDevices are named subsystem:name" if name[:5] == "/dev/" else ""
            raise NoSuchDevice(f"{name}: udev knows no such device{hint}")
        return device_of(found, name, self._database.parameters)

    def _by_node(self, path: str, sysname: str) -> UdevDevice | None:
        for subsystem in NODE_SUBSYSTEMS:
            device = self._lookup.by_name(subsystem, sysname)
            if device is not None and device.device_node == path:
                return device
        paths = self._by_link().get(path, [])
        claiming = (device for device in map(self._lookup.by_path, paths) if device is not None)
        found = [device for device in claiming if path in device.device_links]
        if len(found) > 1:
            # udev's data does not say which of them won. That it knows the link, it does: no stranger made it.
            node = _target(path)
            found = [device for device in found if device.device_node == node]
        return found[0] if found else None

    def _by_link(self) -> dict[str, list[str]]:
        """Return udev's links to device nodes, each with the paths in sysfs of the devices that claim it.

        They are looked for again only when there was news of devices, so that a name that nobody has costs little.
        """
        generation = self._monitor.generation
        known = self._links
        if known is not None and generation is not None and known[0] == generation:
            return known[1]
        links: dict[str, list[str]] = {}
        for subsystem in NODE_SUBSYSTEMS:
            for device in self._lookup.of(subsystem):
                for link in device.device_links:
                    links.setdefault(link, []).append(device.sys_path)
        self._links = None if generation is None else (generation, links)
        return links

    def _all(self) -> list[Device]:
        found = (device for subsystem in LISTED for device in self._lookup.of(subsystem))
        devices = [
            device_of(device, device.device_node, self._database.parameters)
            for device in found
            if device.device_node is not None  # connectors have none
        ]
        return sorted(devices, key=lambda device: device.name)

    def _tell_contradiction(self, device: Device, error: IncompatibleConstraints) -> None:
        if device.path not in self._contradicted:
            self._contradicted.add(device.path)
            emit(log, Event.CONSTRAINTS_CONTRADICT, device=device.name, reason=str(error))


def _target(link: str) -> str | None:
    """Return the device node that one of udev's links leads to."""
    try:
        return os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))  # noqa: PTH115, PTH118, PTH120
    except OSError:
        return None
