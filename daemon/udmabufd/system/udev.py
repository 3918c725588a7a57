# SPDX-License-Identifier: MIT
"""What is used of udev, through pyudev: events, and looking devices up.

Every device of pyudev that comes from here has the attributes of `UdevDevice`; tests put their own in its place. What
to watch is left to devices.py, what to look up to device_finder.py.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import pyudev

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

log = logging.getLogger(__name__)

UDEV_CONTROL: Final = "/run/udev/control"
"""Exists while systemd-udevd runs."""


class UdevDevice(Protocol):
    """What is used of pyudev.Device."""

    @property
    def sys_path(self) -> str: ...
    @property
    def subsystem(self) -> str | None: ...
    @property
    def sys_name(self) -> str: ...
    @property
    def device_node(self) -> str | None: ...
    @property
    def device_links(self) -> Iterable[str]: ...
    @property
    def driver(self) -> str | None: ...
    @property
    def properties(self) -> Mapping[str, str]: ...
    @property
    def parent(self) -> UdevDevice | None: ...


class UdevEvent(UdevDevice, Protocol):
    """A device that something happened to."""

    @property
    def action(self) -> str | None: ...


class UdevEvents:
    """Events of the subsystems that were asked for: a netlink socket that pyudev reads. For one thread."""

    def __init__(self, subsystems: Iterable[str]) -> None:
        """Subscribe. Raises OSError when the kernel does not let us."""
        self._context = pyudev.Context()
        source = "udev" if Path(UDEV_CONTROL).exists() else "kernel"
        if source == "kernel":
            log.info("udev does not run here; listening to the kernel's own device events")
        self._monitor = pyudev.Monitor.from_netlink(self._context, source=source)
        for subsystem in subsystems:
            self.add(subsystem)
        self._monitor.start()

    def add(self, subsystem: str) -> None:
        """Take events of this subsystem, too, from now on. Raises OSError."""
        self._monitor.filter_by(subsystem)

    def set(self, subsystems: Iterable[str]) -> None:
        """Take events of these subsystems alone from now on. Raises OSError."""
        self._monitor.remove_filter()
        for subsystem in subsystems:
            self.add(subsystem)

    def fileno(self) -> int:
        """Return the descriptor of the netlink socket; it is pyudev's."""
        return int(self._monitor.fileno())

    def receive(self) -> UdevEvent | None:
        """Return the next event's device, None when there is none. Raises OSError, ENOBUFS when events were lost."""
        try:
            event: UdevEvent | None = self._monitor.poll(timeout=0)
        except OSError as error:
            if error.errno is not None:
                raise
            # pyudev polls before it reads, and says of an error only that there is one. It is the socket's still.
            with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
                number = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise OSError(number, os.strerror(number)) from error
        return event

    def present(self, subsystem: str, names: Iterable[str] | None) -> Iterator[UdevDevice]:
        """Return the devices of a subsystem that exist now; with `names`, those that are called so."""
        if names is None:
            yield from self._context.list_devices(subsystem=subsystem)
            return
        for name in names:
            yield from self._context.list_devices(subsystem=subsystem, sys_name=name)


class UdevLookup:
    """Looks devices up in sysfs and udev's database, opening nothing else.

    From any thread, but from one at a time, and so for the devices that it returns: libudev knows no locks.
    """

    def __init__(self) -> None:
        # Once: pyudev starts a program, ldconfig, to find libudev.
        self._context = pyudev.Context()

    def by_name(self, subsystem: str, sysname: str) -> UdevDevice | None:
        """Return the device of a subsystem with this name of the kernel's, neither with a slash."""
        try:
            device: UdevDevice = pyudev.Devices.from_name(self._context, subsystem, sysname)
        except pyudev.DeviceNotFoundError:
            return None
        return device

    def by_path(self, path: str) -> UdevDevice | None:
        """Return the device of a path in sysfs, which may go through links."""
        try:
            device: UdevDevice = pyudev.Devices.from_sys_path(self._context, path)
        except pyudev.DeviceNotFoundError:
            return None
        return device

    def of(self, subsystem: str) -> Iterable[UdevDevice]:
        """Return all devices of a subsystem."""
        devices: Iterable[UdevDevice] = self._context.list_devices(subsystem=subsystem)
        return devices
