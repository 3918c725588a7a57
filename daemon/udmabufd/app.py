# SPDX-License-Identifier: MIT
"""The one place that builds and connects the parts, and the order in which they start and stop.

Start: take over the former run's buffers, probe the device, connect, take the name, READY. Stop: STOPPING, answer what
is under way; the buffers stay in the service manager's store. A lost bus ends the daemon with an error; systemd starts
it again, and it goes on with what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import time
from pathlib import Path

from udmabufd import database
from udmabufd.allocators import Allocators
from udmabufd.bus.server import Server
from udmabufd.config import Config
from udmabufd.core.admission import Admission
from udmabufd.core.closer import Closer
from udmabufd.core.custody import Custody
from udmabufd.core.errors import AllocatorError
from udmabufd.core.events import Event, emit
from udmabufd.core.identity import Identity
from udmabufd.core.ledger import Ledger
from udmabufd.core.maker import Maker
from udmabufd.core.moving import Moving
from udmabufd.core.placement import Placement
from udmabufd.core.service import Service
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.linux import memfd
from udmabufd.linux.headroom import Headroom, free_fds
from udmabufd.system.device_finder import DeviceFinder
from udmabufd.system.devices import DeviceEvent, DeviceMonitor
from udmabufd.system.fdstore import FdStore
from udmabufd.system.logcontrol import LogControl
from udmabufd.system.notify import Notifier
from udmabufd.system.pressure import MACHINE, MemoryPressure, source_from_environment
from udmabufd.system.store_capacity import SPARE_FDS, check_capacity, stored_fds
from udmabufd.system.watchdog import Watchdog, timeout_from_environment
from udmabufd_base.codec import LIBRARY

log = logging.getLogger(__name__)

STOP_TIMEOUT = 5.0
"""Seconds that calls under way have to finish at a stop."""

PROBE_TIMEOUT = 5.0
"""Seconds that a start waits for heaps and cards to be opened."""

PRESSURE_STEP = 64 << 20
"""Bytes of idle buffers that are evicted, at least, each time that the kernel tells of memory pressure."""

STORE_TIMEOUT = 2.0
"""Seconds for the service manager to take what was last said to its store."""


class BusLost(Exception):
    """The bus ended the connection."""


class App:
    """The daemon: made from a configuration on the event loop, run once."""

    def __init__(self, config: Config, log_control: LogControl) -> None:
        """Raises StoreError when the configured maximum of buffers does not fit; ConfigError, OSError."""
        limits = config.limits
        self._config = config
        self._notifier = Notifier.from_environment()
        self._store = FdStore.from_environment(self._notifier.address)
        inherited = self._store.inherited()
        if self._store.enabled:
            check_capacity(limits.max_buffers, os.environ, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        raise_fd_limit(stored_fds(limits.max_buffers) + SPARE_FDS)
        self._workers = Workers()
        self._prover = Workers(1, "prover")
        # A copy may wait for devices that use the memory: nobody who fills memory waits for it.
        self._movers = Workers(2, "mover")
        # Of its own: who fills memory waits for nobody's look-ups. One thread, as libudev wants it.
        self._lookups = Workers(1, "devices")
        ledger = Ledger(limits, time.monotonic)
        self._udmabuf = UdmabufAllocator(Path(config.udmabuf.device), Path(config.udmabuf.parameters))
        known = database.load()
        # Watched before anything is looked at, so that no device can appear unseen between the two.
        self._monitor = DeviceMonitor(self._device_event, udmabuf=Path(config.udmabuf.device).name)
        self._devices = DeviceFinder(self._lookups.submit, known, self._monitor)
        self._allocators = Allocators(config, self._udmabuf, self._workers.submit, known)
        self._identity = Identity()
        self._custody = Custody(
            ledger, limits.max_buffers, self._store, self._workers, self._prover, inherited, self._udmabuf.maps
        )
        self._headroom = headroom = Headroom()
        maker = Maker(
            self._custody,
            Admission(headroom.read, free_fds, headroom.shared_memory, headroom.reclaimable),
            self._store,
            self._workers,
        )
        placement = Placement(self._allocators.pool, self._devices)
        moving = Moving(
            self._custody,
            maker,
            placement,
            self._udmabuf,
            self._store,
            self._workers,
            self._movers,
            limits.move_timeout_msec,
        )
        maker.relieve = moving.evict_idle
        self._service = Service(limits, ledger, placement, self._udmabuf, self._custody, maker, self._identity, moving)
        self._server = Server(self._service, ledger, Closer(), log_control)
        self._probing = asyncio.Lock()
        self._waiting_probes: set[asyncio.Task[None]] = set()
        self._following: set[asyncio.Task[None]] = set()
        self._relieving: set[asyncio.Task[None]] = set()
        self._served = False

    async def run(self, address: str) -> None:
        """Serve on the bus at `address` until SIGTERM or SIGINT, which also end a start that takes long.

        Raises BusLost, BusError, WatchdogError, OSError, and ValueError for a malformed address.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
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
        with self._monitor:
            await self._custody.start()
            await self._probe()
            for event in self._monitor.devices.values():
                self._follow("add", event, tell=False)
            if self._following:
                # A card that does not answer keeps its own buffers from nobody but those who want them.
                await asyncio.wait(tuple(self._following), timeout=PROBE_TIMEOUT)
            await self._server.start(address)
            await self._service.attaching.resume()
            self._service.moving.moves.resume()
            # The unit's own group sees stalls of the daemon alone, which may have everybody's memory and do nothing.
            sources = [source for source in (source_from_environment(), MACHINE) if source is not None]
            pressure = MemoryPressure(self._relieve, sources)
            with Watchdog(self._notifier, self._unwell, watchdog_timeout), pressure:
                self._notifier.ready()
                log.info("Serving with %s", LIBRARY)
                raise BusLost(f"The connection to the bus was lost: {await self._server.wait_lost()}")

    async def _stop(self) -> None:
        self._notifier.stopping()
        await self._server.stop(STOP_TIMEOUT)
        await self._custody.close()
        if under_way := (*self._waiting_probes, *self._following, *self._relieving):
            await asyncio.wait(under_way, timeout=STOP_TIMEOUT)
        self._allocators.pool.close()
        self._udmabuf.close()
        self._workers.close()
        self._prover.close()
        self._movers.close()
        self._lookups.close()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(STORE_TIMEOUT):
                await self._store.settled()
        self._store.close()

    def _relieve(self) -> None:
        """Memory is short: evict some of what nobody uses, unless that is being done already."""
        # Without swap the memory of an evicted buffer would stay where it is.
        if not self._relieving and self._headroom.reclaimable(1 << 62):
            _keep(asyncio.create_task(self._evict_some()), self._relieving)

    async def _evict_some(self) -> None:
        freed = await self._service.moving.evict_idle(PRESSURE_STEP)
        log.info("Memory is short: %d bytes of idle buffers were evicted", freed)

    def _unwell(self) -> str | None:
        return None if self._server.connected else "the connection to the bus is lost"

    def _device_event(self, action: str, event: DeviceEvent) -> None:
        log.debug("udev: %s %s", action, event.path)
        if action == "remove":
            self._service.attaching.gone(event.path)
        if event.node == self._config.udmabuf.device:
            # One that runs may have looked too early; one that waits will see all that has happened by then.
            if len(self._waiting_probes) < 2:
                _keep(asyncio.create_task(self._probe()), self._waiting_probes)
        else:
            self._follow(action, event)

    def _follow(self, action: str, event: DeviceEvent, *, tell: bool = True) -> None:
        """Have the allocators keep up with a device that one of them is of."""
        if self._allocators.concerns(event):
            following = self._allocators.follow(action, event, self._devices, tell=tell)
            _keep(asyncio.create_task(following), self._following)

    async def _probe(self) -> None:
        """Find out whether udmabuf can be used, one probe at a time, and tell whoever wants to know."""
        async with self._probing:
            before = self._udmabuf.unavailable
            available = await self._workers.submit(self._udmabuf.probe)
            reason = self._unavailable()
            if available:
                log.info("udmabuf can be used; buffers of up to %d bytes", self._udmabuf.max_size)
                await self._learn_dma_bufs()
            else:
                emit(log, Event.SELF_TEST_FAILED, reason=reason)
            self._tell_status()
            if available == (before is not None):
                if available and self._served:
                    emit(log, Event.UDMABUF_BACK)
                self._server.availability_changed(available)
            self._served = True

    async def _learn_dma_bufs(self) -> None:
        """Make one dma-buf, to know the others of this machine by the device of its file."""
        request = Request.from_spec({"size": 1})
        with contextlib.suppress(OSError, AllocatorError):
            memory = await self._workers.submit(self._udmabuf.allocate, request, "udmabufd-probe", memfd.populate)
            self._identity.learn_dma_buf(memory.device)
            await self._workers.submit(memory.close)

    def _unavailable(self) -> str | None:
        """Why udmabuf cannot be used, or None."""
        refusal = self._udmabuf.unavailable
        return None if refusal is None else str(refusal.error)

    def _tell_status(self) -> None:
        reason = self._unavailable()
        if (refusal := self._custody.refusal) is not None:
            self._notifier.status(f"Serving nothing: the former run's state cannot be read ({refusal})")
        else:
            self._notifier.status(
                "Serving dma-bufs and memfds" if reason is None else f"Serving memfds only: {reason}"
            )


def _keep(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> None:
    """Have `tasks` hold `task` until it is done."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def raise_fd_limit(wanted: int) -> None:
    """Raise the soft limit of open files to `wanted`, or as far as the hard limit allows, which is then logged."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log.warning("max_buffers needs %d open files, the limit is %d: raise LimitNOFILE= of the unit", wanted, hard)
