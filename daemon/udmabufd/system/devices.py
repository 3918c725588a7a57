# SPDX-License-Identifier: MIT
"""Watches udev for devices coming and going: those that memory comes from, and those that buffers are attached to.

Events arrive on the event loop, without a thread. Where udev does not run, the kernel's own events are listened to:
they come before anybody has set a node's permissions, but then nobody will. Whether a node can be opened, and what its
coming and going means, is left to the callback.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self

from udmabufd.system.udev import UdevEvents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from udmabufd.system.udev import UdevDevice, UdevEvent

    Callback = Callable[[str, "DeviceEvent"], None]

log = logging.getLogger(__name__)

WATCHED: Final[dict[str, frozenset[str] | None]] = {
    "misc": frozenset({"udmabuf"}),
    "dma_heap": None,
    "drm": None,
    "video4linux": None,
    "accel": None,
    "media": None,
}
"""Kernel subsystem -> names of the devices of it that matter, None for all; of misc by default."""

MAX_EVENTS_PER_TURN: Final = 64
"""Events read in one turn of the loop, so that a flood of them does not keep others waiting."""


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """The device that something happened to: its subsystem, the kernel's name, its node and its path in sysfs."""

    subsystem: str
    sysname: str
    node: str | None
    path: str


class Source(Protocol):
    """What is used of UdevEvents, so that tests can put their own in its place."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are events."""

    def add(self, subsystem: str) -> None:
        """Take events of this subsystem, too. Raises OSError."""

    def set(self, subsystems: Iterable[str]) -> None:
        """Take events of these subsystems alone. Raises OSError."""

    def receive(self) -> UdevEvent | None:
        """Return the next event's device, None when there is none. Raises OSError, ENOBUFS when events were lost."""

    def present(self, subsystem: str, names: Iterable[str] | None) -> Iterable[UdevDevice]:
        """Return the devices of a subsystem that exist now; with `names`, those that are called so."""


class DeviceMonitor:
    """Tells a callback of each event of the watched devices; a context manager, to be entered on the event loop.

    The callback gets the action (`add`, `change`, `remove`, ... as udev has it) and the device. When events were
    lost, each device that is there is told as `add`, and each that is gone as `remove`. Those that are there at the
    start are in `devices`.
    """

    def __init__(self, callback: Callback, *, udmabuf: str = "udmabuf", source: Source | None = None) -> None:
        """Subscribe, also to the events of the misc device `udmabuf`; nothing is told before `start()`. Raises OSError
        when no events can be had.
        """
        self._callback = callback
        self._names = WATCHED | {"misc": frozenset({udmabuf})}
        self._source: Source = UdevEvents(WATCHED) if source is None else source
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: dict[str, DeviceEvent] = {}
        self._subsystems = set(WATCHED)
        self._watched: dict[str, DeviceEvent] = {}
        self._lost = False
        self._generation = 0

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def devices(self) -> Mapping[str, DeviceEvent]:
        """The watched devices that udev has at the moment, by their paths in sysfs."""
        return dict(self._known)

    @property
    def nodes(self) -> frozenset[str]:
        """The device nodes of those that have one."""
        return frozenset(device.node for device in self._known.values() if device.node is not None)

    @property
    def generation(self) -> int | None:
        """A number that stays the same only while there is no news of a subsystem in WATCHED; None while unknown."""
        return None if self._loop is None or self._lost else self._generation

    def watch(self, device: DeviceEvent) -> None:
        """Tell of what happens to this device, too, of whatever subsystem, from now until it is removed."""
        if self._observed(device):
            return
        if device.subsystem not in self._subsystems:
            try:
                self._source.add(device.subsystem)
            except OSError as error:
                # Less is told then, and all else goes on.
                log.error("Events of devices of %s cannot be received: %s", device.subsystem, error)
                return
            self._subsystems.add(device.subsystem)
        self._watched[device.path] = device

    def unwatch(self, path: str) -> None:
        """Tell no more of the device at `path`, if that was asked for by watch()."""
        device = self._watched.pop(path, None)
        if device is None or device.subsystem in WATCHED:
            return
        if any(other.subsystem == device.subsystem for other in self._watched.values()):
            return
        # Others' events would wake the service for nothing.
        self._subsystems.discard(device.subsystem)
        try:
            self._source.set(sorted(self._subsystems))
        except OSError as error:
            log.error("Events of devices of %s cannot be left out: %s", device.subsystem, error)

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
            if device.subsystem in WATCHED:
                self._generation += 1
            event = _event(device)
            if self._observed(event) or event.path in self._watched:
                self._tell(device.action or "change", event)
        if self._lost and self._loop is not None:
            # The kernel drops events until what is queued has been read, and says so only once: look when it is empty,
            # which may be now, without another event to wake us.
            self._loop.call_soon(self._read)

    def _present(self) -> dict[str, DeviceEvent]:
        found = (
            _event(device)
            for subsystem, names in self._names.items()
            for device in self._source.present(subsystem, names)
        )
        return {device.path: device for device in found}

    def _enumerate(self) -> None:
        self._generation += 1
        present = self._present()
        # Of what is not in WATCHED only those devices matter that somebody asked for: no need to list the others.
        still = {path: device for path, device in self._watched.items() if Path(path).exists()}
        for path, device in sorted((self._known | self._watched).items()):
            if path not in present and path not in still:
                self._tell("remove", device)
        for _, device in sorted(present.items()):
            self._tell("add", device)

    def _observed(self, device: DeviceEvent) -> bool:
        if device.subsystem not in self._names:
            return False
        names = self._names[device.subsystem]
        return names is None or device.sysname in names

    def _tell(self, action: str, device: DeviceEvent) -> None:
        if action == "remove":
            self._known.pop(device.path, None)
            self.unwatch(device.path)
        elif self._observed(device):
            self._known[device.path] = device
        try:
            self._callback(action, device)
        except Exception:
            # The next event must still be heard.
            log.exception("Handling of device event %s %s failed", action, device.path)


def _event(device: UdevDevice) -> DeviceEvent:
    return DeviceEvent(device.subsystem or "", device.sys_name, device.device_node, device.sys_path)
