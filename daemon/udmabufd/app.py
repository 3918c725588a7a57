# SPDX-License-Identifier: MIT
"""The one place that builds and connects the parts, and the order in which they start and stop.

Start: probe the device, connect, take the name, READY. Stop: STOPPING, answer what is under way, end the buffers.
A lost bus ends the daemon with an error; systemd starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import time
from pathlib import Path

from udmabufd.bus.server import Server
from udmabufd.config import Config
from udmabufd.core.ledger import Ledger
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.pool import Pool
from udmabufd.core.service import Service
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.system.devices import DeviceMonitor
from udmabufd.system.logcontrol import LogControl
from udmabufd.system.notify import Notifier
from udmabufd.system.watchdog import Watchdog, timeout_from_environment
from udmabufd_base.codec import LIBRARY

log = logging.getLogger(__name__)

STOP_TIMEOUT = 5.0
"""Seconds that calls under way have to finish at a stop."""

SPARE_FDS = 1024
"""Descriptors beside the two of each buffer: duplicates on their way to clients, sockets, devices."""


class BusLost(Exception):
    """The bus ended the connection."""


class App:
    """The daemon: made from a configuration, run once."""

    def __init__(self, config: Config, log_control: LogControl) -> None:
        self._workers = Workers()
        ledger = Ledger(config.limits, time.monotonic)
        self._udmabuf = UdmabufAllocator(Path(config.udmabuf.device), Path(config.udmabuf.parameters))
        # In order of preference; a new allocator is one line here.
        pool = Pool([self._udmabuf, MemfdAllocator(config.limits.max_bytes_per_user)])
        self._service = Service(config.limits, ledger, pool, self._workers)
        self._server = Server(self._service, ledger, log_control)
        self._config = config
        self._notifier = Notifier.from_environment()
        self._probing = asyncio.Lock()
        self._probes: set[asyncio.Task[None]] = set()

    async def run(self, address: str) -> None:
        """Serve on the bus at `address` until SIGTERM or SIGINT, which also end a start that takes long.

        Raises BusLost, BusError, WatchdogError, OSError, and ValueError for a malformed address.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        raise_fd_limit(2 * self._config.limits.max_buffers + SPARE_FDS)
        serving = asyncio.create_task(self._start_and_serve(address, timeout_from_environment()))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            stopped.cancel()
            serving.cancel()
            await asyncio.wait((serving,))
            await self._stop()

    async def _start_and_serve(self, address: str, watchdog_timeout: float | None) -> None:
        # Watched before the first probe, so that no device can appear unseen between the two.
        with DeviceMonitor(self._device_event):
            await self._probe()
            await self._server.start(address)
            with Watchdog(self._notifier, self._unwell, watchdog_timeout):
                self._notifier.ready()
                log.info("Serving with %s", LIBRARY)
                raise BusLost(f"The connection to the bus was lost: {await self._server.wait_lost()}")

    async def _stop(self) -> None:
        self._notifier.stopping()
        await self._server.stop(STOP_TIMEOUT)
        await self._service.close()
        if self._probes:
            await asyncio.wait(tuple(self._probes))
        self._udmabuf.close()
        self._workers.close()

    def _unwell(self) -> str | None:
        return None if self._server.connected else "the connection to the bus is lost"

    def _device_event(self, action: str, device: str) -> None:
        if device == self._config.udmabuf.device:
            log.info("udev: %s %s", action, device)
            # One that runs may have looked too early; one that waits will see all that has happened by then.
            if len(self._probes) < 2:
                task = asyncio.create_task(self._probe())
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probe(self) -> None:
        """Find out whether udmabuf can be used, one probe at a time, and tell whoever wants to know."""
        async with self._probing:
            before = self._udmabuf.unavailable
            available = await self._workers.submit(self._udmabuf.probe)
            reason = self._udmabuf.unavailable
            if available:
                log.info("udmabuf can be used; buffers of up to %d bytes", self._udmabuf.max_size)
            else:
                log.warning("%s", reason)
            self._notifier.status("Serving dma-bufs and memfds" if available else f"Serving memfds only: {reason}")
            if available == (before is not None):
                self._server.availability_changed(available)


def raise_fd_limit(wanted: int) -> None:
    """Raise the soft limit of open files to `wanted`, or as far as the hard limit allows, which is then logged."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log.warning("max_buffers needs %d open files, the limit is %d: raise LimitNOFILE= of the unit", wanted, hard)
