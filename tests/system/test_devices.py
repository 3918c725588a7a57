# SPDX-License-Identifier: MIT
"""Device events on the loop: from a scripted source, and from the netlink socket that pyudev listens to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from udmabufd.system import udev
from udmabufd.system.devices import MAX_EVENTS_PER_TURN, WATCHED, DeviceEvent, DeviceMonitor
from udmabufd.system.udev import UdevEvents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


@dataclass
class Device:
    action: str | None = "add"
    subsystem: str = "misc"
    sys_name: str = "udmabuf"
    device_node: str | None = "/dev/udmabuf"
    sys_path: str = ""
    device_links: tuple[str, ...] = ()
    driver: str | None = None
    parent: None = None

    def __post_init__(self) -> None:
        self.sys_path = self.sys_path or f"/sys/devices/virtual/{self.subsystem}/{self.sys_name}"
        self.properties: dict[str, str] = {}

    @property
    def event(self) -> DeviceEvent:
        return DeviceEvent(self.subsystem, self.sys_name, self.device_node, self.sys_path)


class ScriptedSource:
    """Events and devices as a test wants them; a pipe makes the loop look."""

    def __init__(self) -> None:
        self.events: list[Device | OSError] = []
        self.devices: list[Device] = []
        self.subsystems: list[str] = list(WATCHED)
        """Those that events are taken of; `added` are those among them that were asked for later, each time."""
        self.added: list[str] = []
        self.refusal: OSError | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)

    def fileno(self) -> int:
        return self._read

    def give(self, *events: Device | OSError) -> None:
        self.events += events
        os.write(self._write, b"x")

    def receive(self) -> Device | None:
        if not self.events:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 64)
            return None
        event = self.events.pop(0)
        if isinstance(event, OSError):
            raise event
        return event

    def add(self, subsystem: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.added.append(subsystem)
        self.subsystems.append(subsystem)

    def set(self, subsystems: Iterable[str]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.subsystems = list(subsystems)

    def present(self, subsystem: str, names: Iterable[str] | None) -> list[Device]:
        return [
            device
            for device in self.devices
            if device.subsystem == subsystem and (names is None or device.sys_name in names)
        ]

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Heard:
    """What the callback was told, to be awaited."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.devices: list[DeviceEvent] = []

    def __call__(self, action: str, device: DeviceEvent) -> None:
        self.devices.append(device)
        self.queue.put_nowait((action, device.node or device.path))

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(10):
            return await self.queue.get()


@pytest.fixture
def source() -> Iterator[ScriptedSource]:
    made = ScriptedSource()
    yield made
    made.close()


async def test_events_of_the_watched_device_are_told(source: ScriptedSource) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source) as monitor:
        source.give(Device("add"), Device("change"), Device("remove"))
        assert [await heard.next() for _ in range(3)] == [
            ("add", "/dev/udmabuf"),
            ("change", "/dev/udmabuf"),
            ("remove", "/dev/udmabuf"),
        ]
        assert monitor.nodes == frozenset()


async def test_others_are_not(source: ScriptedSource) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source):
        source.give(
            Device(sys_name="kvm", device_node="/dev/kvm"),
            Device(subsystem="block"),
            Device("change"),
        )
        assert await heard.next() == ("change", "/dev/udmabuf")
        assert heard.queue.empty()


async def test_the_device_that_is_configured_is_watched(source: ScriptedSource) -> None:
    """In the place of the kernel's own, also when events were lost."""
    heard = Heard()
    other = Device(sys_name="udmabuf_cache", device_node="/dev/udmabuf_cache")
    source.devices = [Device(), other]
    with DeviceMonitor(heard, udmabuf="udmabuf_cache", source=source) as monitor:
        assert monitor.nodes == {"/dev/udmabuf_cache"}
        source.give(Device("change"), Device("change", sys_name="udmabuf_cache", device_node="/dev/udmabuf_cache"))
        assert await heard.next() == ("change", "/dev/udmabuf_cache")
        source.give(OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)))
        assert await heard.next() == ("add", "/dev/udmabuf_cache")
        assert heard.queue.empty()


async def test_a_present_device_is_known_from_the_start(source: ScriptedSource) -> None:
    source.devices = [Device()]
    with DeviceMonitor(Heard(), source=source) as monitor:
        assert monitor.nodes == {"/dev/udmabuf"}


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True), (False, False)])
async def test_after_lost_events_it_looks_again(source: ScriptedSource, before: bool, after: bool) -> None:
    heard = Heard()
    source.devices = [Device()] if before else []
    with DeviceMonitor(heard, source=source) as monitor:
        source.devices = [Device()] if after else []
        # What was still queued at the loss is told first; then it looks.
        queued = "add" if before else "remove"
        source.give(OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)), Device(queued))
        expected = [(queued, "/dev/udmabuf")]
        if after:
            expected.append(("add", "/dev/udmabuf"))
        elif before:
            expected.append(("remove", "/dev/udmabuf"))
        assert [await heard.next() for _ in expected] == expected
        assert monitor.nodes == ({"/dev/udmabuf"} if after else set())


async def test_it_looks_again_even_if_the_loss_ends_with_a_turn(source: ScriptedSource) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source):
        source.devices = [Device()]
        lost = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        source.give(lost, *[Device(sys_name="kvm")] * (MAX_EVENTS_PER_TURN - 1))
        assert await heard.next() == ("add", "/dev/udmabuf")


async def test_an_error_for_good_is_logged_and_ends_it(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source):
        source.give(Device("add"), OSError(errno.EBADF, "Bad file descriptor"), Device("change"))
        # Told before the error is met, so that there is something to wait for.
        assert await heard.next() == ("add", "/dev/udmabuf")
        assert "restart the service" in caplog.text
        assert asyncio.get_running_loop().remove_reader(source.fileno()) is False
    assert heard.queue.empty()


async def test_a_callback_that_raises_is_logged_and_called_again(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()

    def callback(action: str, device: DeviceEvent) -> None:
        heard(action, device)
        if action == "add":
            raise RuntimeError("unexpected")

    with DeviceMonitor(callback, source=source):
        source.give(Device("add"), Device("remove"))
        assert [await heard.next(), await heard.next()] == [("add", "/dev/udmabuf"), ("remove", "/dev/udmabuf")]
    assert "unexpected" in caplog.text


async def test_a_flood_lets_others_run(source: ScriptedSource) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source):
        source.give(*[Device("change")] * (10 * MAX_EVENTS_PER_TURN))
        turns = 0
        async with asyncio.timeout(10):
            while source.events:
                turns += 1
                await asyncio.sleep(0)
        assert turns >= 10
        assert heard.queue.qsize() == 10 * MAX_EVENTS_PER_TURN


HEAP = Device("add", "dma_heap", "system", "/dev/dma_heap/system")
CARD = Device("add", "drm", "card0", "/dev/dri/card0", "/sys/devices/platform/vgem/drm/card0")
CONNECTOR = Device("add", "drm", "card0-HDMI-A-1", None, f"{CARD.sys_path}/card0-HDMI-A-1")


async def test_what_memory_comes_from_and_goes_to_is_watched(source: ScriptedSource) -> None:
    heard = Heard()
    source.devices = [CARD]
    with DeviceMonitor(heard, source=source) as monitor:
        assert monitor.devices == {CARD.sys_path: CARD.event}
        source.give(HEAP, CONNECTOR, replace(CARD, action="remove"))
        assert [(await heard.next())[0] for _ in range(3)] == ["add", "add", "remove"]
        assert heard.devices == [HEAP.event, CONNECTOR.event, CARD.event]
        assert monitor.devices == {HEAP.sys_path: HEAP.event, CONNECTOR.sys_path: CONNECTOR.event}
        assert monitor.nodes == {"/dev/dma_heap/system"}


async def test_a_device_of_another_subsystem_is_watched_when_asked_for_until_it_is_gone(
    source: ScriptedSource,
) -> None:
    heard = Heard()
    one = Device("change", "pci", "0000:00:02.0", None)
    kvm = Device("change", sys_name="kvm", device_node="/dev/kvm")
    with DeviceMonitor(heard, source=source) as monitor:
        monitor.watch(one.event)
        monitor.watch(one.event)
        monitor.watch(Device("add", "pci", "0000:00:03.0", None).event)
        monitor.watch(kvm.event)
        monitor.watch(CARD.event)
        assert source.added == ["pci"]  # once; misc and drm are watched from the start
        gone = Device("remove", "pci", one.sys_name, None)
        source.give(Device("change", "pci", "0000:00:04.0", None), one, kvm, gone, gone, Device("change"))
        assert [await heard.next() for _ in range(4)] == [
            ("change", one.sys_path),
            ("change", "/dev/kvm"),
            ("remove", one.sys_path),
            ("change", "/dev/udmabuf"),
        ]
        assert heard.queue.empty()


async def test_what_nobody_asks_for_any_more_wakes_nobody(source: ScriptedSource) -> None:
    heard = Heard()
    one, two = (Device("change", "pci", f"0000:00:0{number}.0", None) for number in (2, 3))
    net = Device("change", "net", "lo", None)
    with DeviceMonitor(heard, source=source) as monitor:
        for device in (one, two, net):
            monitor.watch(device.event)
        assert source.subsystems == [*WATCHED, "pci", "net"]
        monitor.unwatch(one.sys_path)
        # Another of the same subsystem is watched still, and this one told no more.
        assert source.subsystems == [*WATCHED, "pci", "net"]
        source.give(one, two)
        assert await heard.next() == ("change", two.sys_path)
        monitor.unwatch(two.sys_path)
        assert set(source.subsystems) == {*WATCHED, "net"}
        # What was queued before is not told either; nor does it matter to ask again, or for what was never watched.
        monitor.unwatch(two.sys_path)
        monitor.unwatch("/sys/devices/nothing")
        assert set(source.subsystems) == {*WATCHED, "net"}
        source.give(two, net)
        assert await heard.next() == ("change", net.sys_path)
        # Who asks anew is told again, and one that is gone leaves no subscription behind.
        monitor.watch(two.event)
        assert set(source.subsystems) == {*WATCHED, "net", "pci"}
        source.give(replace(two, action="remove"), replace(net, action="remove"))
        assert [await heard.next(), await heard.next()] == [("remove", two.sys_path), ("remove", net.sys_path)]
        assert set(source.subsystems) == set(WATCHED)
        assert heard.queue.empty()


async def test_what_is_watched_from_the_start_stays_watched(source: ScriptedSource) -> None:
    """Of misc only the device udmabuf is told without being asked for; its subsystem is that of others, too."""
    heard = Heard()
    kvm = Device("change", sys_name="kvm", device_node="/dev/kvm")
    with DeviceMonitor(heard, source=source) as monitor:
        source.devices = [Device(), CARD]
        for device in (kvm, CARD, Device()):
            monitor.watch(device.event)
            monitor.unwatch(device.sys_path)
        assert set(source.subsystems) == set(WATCHED)
        source.give(kvm, Device("change"), CARD)
        assert [await heard.next(), await heard.next()] == [("change", "/dev/udmabuf"), ("add", "/dev/dri/card0")]
        assert heard.queue.empty()


async def test_a_subsystem_that_cannot_be_left_out_is_logged(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    one = Device("change", "pci", "0000:00:02.0", None)
    with DeviceMonitor(heard, source=source) as monitor:
        monitor.watch(one.event)
        source.refusal = OSError(errno.ENOMEM, "Cannot allocate memory")
        monitor.unwatch(one.sys_path)
        assert "pci cannot be left out" in caplog.text
        source.give(one, Device("change"))
        assert await heard.next() == ("change", "/dev/udmabuf")


async def test_after_lost_events_what_was_asked_for_and_is_gone_is_told(
    source: ScriptedSource, tmp_path: Path
) -> None:
    heard = Heard()
    with DeviceMonitor(heard, source=source) as monitor:
        monitor.watch(DeviceEvent("pci", "stays", None, str(tmp_path)))
        monitor.watch(DeviceEvent("pci", "gone", None, str(tmp_path / "gone")))
        source.give(OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)))
        assert await heard.next() == ("remove", str(tmp_path / "gone"))
        assert heard.queue.empty()


async def test_a_subsystem_that_cannot_be_watched_is_logged(
    source: ScriptedSource, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    source.refusal = OSError(errno.E2BIG, "Argument list too long")
    with DeviceMonitor(heard, source=source) as monitor:
        monitor.watch(Device("add", "pci", "0000:00:02.0", None).event)
        assert "pci cannot be received" in caplog.text
        source.give(Device("change"))
        assert await heard.next() == ("change", "/dev/udmabuf")


def generation(monitor: DeviceMonitor) -> int:
    assert monitor.generation is not None
    return monitor.generation


async def test_the_generation_changes_with_news_of_watched_subsystems(source: ScriptedSource) -> None:
    heard = Heard()
    monitor = DeviceMonitor(heard, source=source)
    assert monitor.generation is None
    with monitor:
        before = generation(monitor)
        source.give(Device(subsystem="block"), Device("change"))
        await heard.next()
        assert generation(monitor) == before + 1
        # What udev says of a misc device that is not told of may be a link's.
        source.give(Device(sys_name="kvm"), Device("change"))
        await heard.next()
        assert generation(monitor) == before + 3
        source.devices = [Device()]
        source.give(OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)))
        assert await heard.next() == ("add", "/dev/udmabuf")
        assert generation(monitor) == before + 4
    assert monitor.generation is None


async def test_after_stop_nothing_is_told(source: ScriptedSource) -> None:
    heard = Heard()
    monitor = DeviceMonitor(heard, source=source)
    monitor.start()
    monitor.stop()
    monitor.stop()
    source.give(Device("add"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert heard.queue.empty()


# ---- the real netlink socket --------------------------------------------------------------------------------------

NETLINK_KOBJECT_UEVENT = 15
UDEV_GROUP = 2
LIBUDEV_MAGIC = 0xFEEDCAFE


def murmur2(data: bytes) -> int:
    """MurmurHash2 with seed 0: how libudev's messages name their subsystem to the kernel's filter."""
    m = 0x5BD1E995
    h = len(data)
    while len(data) >= 4:
        k = int.from_bytes(data[:4], "little") * m & 0xFFFFFFFF
        k = (k ^ k >> 24) * m & 0xFFFFFFFF
        h = (h * m & 0xFFFFFFFF) ^ k
        data = data[4:]
    if data:
        h = (h ^ int.from_bytes(data, "little")) * m & 0xFFFFFFFF
    h = (h ^ h >> 13) * m & 0xFFFFFFFF
    return h ^ h >> 15


def udev_message(action: str, subsystem: str, name: str) -> bytes:
    """Return what systemd-udevd would multicast for a device (struct monitor_netlink_header of systemd)."""
    properties = {
        "ACTION": action,
        "DEVPATH": f"/devices/virtual/{subsystem}/{name}",
        "SUBSYSTEM": subsystem,
        "DEVNAME": f"/dev/{name}",
        "MAJOR": "10",
        "MINOR": "125",
        "SEQNUM": "1",
    }
    body = b"".join(f"{key}={value}\0".encode() for key, value in properties.items())
    header = struct.Struct("=8s4sIII4s4s4s4s")
    zero = bytes(4)
    return (
        header.pack(
            b"libudev\0",
            LIBUDEV_MAGIC.to_bytes(4, "big"),
            header.size,
            header.size,
            len(body),
            murmur2(subsystem.encode()).to_bytes(4, "big"),
            zero,
            zero,
            zero,
        )
        + body
    )


@pytest.fixture
def udevd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that may multicast in the place of systemd-udevd."""
    if os.geteuid() != 0:
        pytest.skip("only root is believed to be udev")
    monkeypatch.setattr(udev, "UDEV_CONTROL", "/")
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
    try:
        made.sendto(udev_message("change", "udmabufd-test", "probe"), (0, UDEV_GROUP))
    except ConnectionRefusedError:
        pass  # nobody listens yet
    except PermissionError:
        made.close()
        pytest.skip("this root may not multicast (no CAP_NET_ADMIN)")
    yield made
    made.close()


@pytest.mark.root
async def test_udevs_own_messages_are_understood(udevd: socket.socket) -> None:
    heard = Heard()
    with DeviceMonitor(heard):
        udevd.sendto(udev_message("add", "misc", "kvm"), (0, UDEV_GROUP))
        udevd.sendto(udev_message("add", "block", "udmabuf"), (0, UDEV_GROUP))
        udevd.sendto(udev_message("add", "misc", "udmabuf"), (0, UDEV_GROUP))
        udevd.sendto(udev_message("remove", "misc", "udmabuf"), (0, UDEV_GROUP))
        assert [await heard.next(), await heard.next()] == [("add", "/dev/udmabuf"), ("remove", "/dev/udmabuf")]


@pytest.mark.root
async def test_an_overflow_of_the_real_socket_is_survived(udevd: socket.socket) -> None:
    heard = Heard()

    class Counted(UdevEvents):
        lost = 0

        def __init__(self) -> None:
            super().__init__(WATCHED)
            self._monitor.set_receive_buffer_size(1 << 16)  # libudev takes 128 MiB where it may

        def receive(self) -> udev.UdevEvent | None:
            try:
                return super().receive()
            except OSError as error:
                Counted.lost += error.errno == errno.ENOBUFS
                raise

        def present(self, subsystem: str, names: Iterable[str] | None) -> Iterator[udev.UdevDevice]:
            yield from [Device()] if subsystem == "misc" else []

    source = Counted()
    with DeviceMonitor(heard, source=source):
        # All of this before the loop turns: more than the socket's buffer holds.
        message = udev_message("change", "misc", "udmabuf")
        for _ in range(10_000):
            udevd.sendto(message, (0, UDEV_GROUP))
        assert await heard.next() == ("change", "/dev/udmabuf")
        assert Counted.lost == 1
        # Once all that was queued has been read, it looks at what is present; from then on events are heard again.
        while await heard.next() != ("add", "/dev/udmabuf"):
            pass
        udevd.sendto(udev_message("remove", "misc", "udmabuf"), (0, UDEV_GROUP))
        while await heard.next() != ("remove", "/dev/udmabuf"):
            pass
        assert asyncio.get_running_loop().remove_reader(source.fileno())  # it still listens


@pytest.mark.root
async def test_a_further_subsystem_passes_the_kernels_filter_once_it_is_asked_for(udevd: socket.socket) -> None:
    heard = Heard()
    with DeviceMonitor(heard) as monitor:
        udevd.sendto(udev_message("change", "mem", "null"), (0, UDEV_GROUP))
        monitor.watch(DeviceEvent("mem", "null", "/dev/null", "/sys/devices/virtual/mem/null"))
        udevd.sendto(udev_message("change", "block", "null"), (0, UDEV_GROUP))
        udevd.sendto(udev_message("remove", "mem", "null"), (0, UDEV_GROUP))
        udevd.sendto(udev_message("add", "drm", "dri/card0"), (0, UDEV_GROUP))
        assert [await heard.next(), await heard.next()] == [("remove", "/dev/null"), ("add", "/dev/dri/card0")]


@pytest.mark.root
async def test_the_kernels_filter_stops_what_nobody_asks_for_any_more(udevd: socket.socket) -> None:
    """Not even the loop is woken: the socket has nothing to read."""

    def readable(source: UdevEvents) -> bool:
        return bool(select.select([source.fileno()], [], [], 0)[0])

    def received(source: UdevEvents) -> list[str | None]:
        return [event.subsystem for event in iter(source.receive, None)]

    source = UdevEvents(WATCHED)
    null = DeviceEvent("mem", "null", "/dev/null", "/sys/devices/virtual/mem/null")
    monitor = DeviceMonitor(Heard(), source=source)
    said = [udev_message("change", *names) for names in (("mem", "null"), ("net", "lo"), ("drm", "dri/card0"))]
    for _ in range(2):
        monitor.watch(null)
        for message in said:
            udevd.sendto(message, (0, UDEV_GROUP))
        assert readable(source)
        assert received(source) == ["mem", "drm"]
        monitor.unwatch(null.path)
        for message in said[:2]:
            udevd.sendto(message, (0, UDEV_GROUP))
        assert not readable(source)
        udevd.sendto(said[2], (0, UDEV_GROUP))
        assert readable(source)
        assert received(source) == ["drm"]


@pytest.mark.guest
@pytest.mark.root
async def test_real_events_of_the_real_device() -> None:
    heard = Heard()
    with DeviceMonitor(heard) as monitor:
        assert "/dev/udmabuf" in monitor.nodes
        trigger = await asyncio.create_subprocess_exec("udevadm", "trigger", "--action=change", "/dev/udmabuf")
        assert await trigger.wait() == 0
        assert await heard.next() == ("change", "/dev/udmabuf")
