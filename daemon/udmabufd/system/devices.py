# SPDX-License-Identifier: MIT
"""Watches udev for the devices that the service uses: today /dev/udmabuf alone.

Events arrive on the event loop, without a thread. Where udev does not run, the kernel's own events are listened to:
they come before anybody has set a node's permissions, but then nobody will. Whether a node can be opened, and what its
coming and going means, is left to the callback.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import pyudev

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Callback = Callable[[str, str], None]

log = logging.getLogger(__name__)

WATCHED: Final[dict[str, frozenset[str]]] = {"misc": frozenset({"udmabuf"})}
"""Kernel subsystem -> names of the devices of it that matter."""

MAX_EVENTS_PER_TURN: Final = 64
"""Events read in one turn of the loop, so that a flood of them does not keep others waiting."""

UDEV_CONTROL: Final = "/run/udev/control"
"""Exists while systemd-udevd runs."""


class Source(Protocol):
    """What is used of udev, so that tests can put their own in its place."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are events."""

    def receive(self) -> Any | None:
        """Return the next event's device, None when there is none. Raises OSError, ENOBUFS when events were lost."""

    def present(self) -> Iterable[Any]:
        """Return the devices that exist now."""


class UdevSource:
    """The real thing: a netlink monitor and an enumeration of pyudev."""

    def __init__(self) -> None:
        """Subscribe to events. Raises OSError when the kernel does not let us."""
        self._context = pyudev.Context()
        source = "udev" if Path(UDEV_CONTROL).exists() else "kernel"
        if source == "kernel":
            log.info("udev does not run here; listening to the kernel's own device events")
        self._monitor = pyudev.Monitor.from_netlink(self._context, source=source)
        for subsystem in WATCHED:
            self._monitor.filter_by(subsystem)
        self._monitor.start()

    def fileno(self) -> int:
        """Return the descriptor of the netlink socket; it is pyudev's."""
        return int(self._monitor.fileno())

    def receive(self) -> Any | None:
        """Return the next event's device, None when there is none. Raises OSError."""
        try:
            return self._monitor.poll(timeout=0)
        except OSError as error:
            if error.errno is not None:
                raise
            # pyudev polls before it reads, and says of an error only that there is one. It is the socket's still.
            with socket.socket(fileno=os.dup(self.fileno())) as duplicate:
                number = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise OSError(number, os.strerror(number)) from error

    def present(self) -> Iterable[Any]:
        """Return the devices of the watched subsystems that exist now."""
        for subsystem, names in WATCHED.items():
            for name in names:
                yield from self._context.list_devices(subsystem=subsystem, sys_name=name)


class DeviceMonitor:
    """Tells a callback of each event of the watched devices; a context manager, to be entered on the event loop.

    The callback gets the action (`add`, `change`, `remove`, ... as udev has it) and the device node's path. When
    events were lost, each device that is there is told as `add`, and each that is gone as `remove`. Those that are
    there at the start are in `nodes`.
    """

    def __init__(self, callback: Callback, *, source: Source | None = None) -> None:
        """Subscribe; nothing is told before `start()`. Raises OSError when no events can be had."""
        self._callback = callback
        self._source: Source = UdevSource() if source is None else source
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: set[str] = set()
        self._lost = False

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def nodes(self) -> frozenset[str]:
        """Device nodes, by their paths, of the watched devices that udev has at the moment."""
        return frozenset(self._known)

    def start(self) -> None:
        """Tell of events from now on. Call it on the event loop, once."""
        self._loop = asyncio.get_running_loop()
        # Subscribed before it looks: what comes in between is told and known, rather than missed.
        self._known = self._present()
        self._loop.add_reader(self._source.fileno(), self._read)

    def stop(self) -> None:
        """Tell no more. Harmless when repeated."""
        if self._loop is not None:
            self._loop.remove_reader(self._source.fileno())
            self._loop = None

    def _read(self) -> None:
        for _ in range(MAX_EVENTS_PER_TURN):
            if self._loop is None:
                return  # the callback stopped us
            try:
                device = self._source.receive()
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._lost = True
                    continue
                log.error("Device events can no longer be received: %s; restart the service to watch again", error)
                self.stop()
                return
            if device is None:
                if self._lost:
                    self._lost = False
                    log.info("Device events were lost; looking at all devices again")
                    self._enumerate()
                return
            if device.sys_name in WATCHED.get(device.subsystem, ()) and device.device_node:
                self._tell(device.action or "change", device.device_node)
        if self._lost and self._loop is not None:
            # The kernel drops events until what is queued has been read, and says so only once: look when it is empty,
            # which may be now, without another event to wake us.
            self._loop.call_soon(self._read)

    def _present(self) -> set[str]:
        return {device.device_node for device in self._source.present() if device.device_node}

    def _enumerate(self) -> None:
        present = self._present()
        for node in sorted(self._known - present):
            self._tell("remove", node)
        for node in sorted(present):
            self._tell("add", node)

    def _tell(self, action: str, node: str) -> None:
        if action == "remove":
            self._known.discard(node)
        else:
            self._known.add(node)
        try:
            self._callback(action, node)
        except Exception:
            # The next event must still be heard.
            log.exception("Handling of device event %s %s failed", action, node)
