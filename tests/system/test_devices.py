# SPDX-License-Identifier: MIT
"""Device events on the loop: from a scripted source, and from the netlink socket that pyudev listens to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from udmabufd.system import devices
from udmabufd.system.devices import MAX_EVENTS_PER_TURN, DeviceMonitor, UdevSource

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Device:
    action: str | None = "add"
    subsystem: str = "misc"
    sys_name: str = "udmabuf"
    device_node: str | None = "/dev/udmabuf"


class ScriptedSource:
    """Events and devices as a test wants them; a pipe makes the loop look."""

    def __init__(self) -> None:
        self.events: list[Device | OSError] = []
        self.devices: list[Device] = []
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

    def present(self) -> list[Device]:
        return self.devices

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Heard:
    """What the callback was told, to be awaited."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def __call__(self, action: str, node: str) -> None:
        self.queue.put_nowait((action, node))

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
            Device(device_node=None),
            Device("change"),
        )
        assert await heard.next() == ("change", "/dev/udmabuf")
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

    def callback(action: str, node: str) -> None:
        heard(action, node)
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
    monkeypatch.setattr(devices, "UDEV_CONTROL", "/")
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

    class Counted(UdevSource):
        lost = 0

        def __init__(self) -> None:
            super().__init__()
            self._monitor.set_receive_buffer_size(1 << 16)  # libudev takes 128 MiB where it may

        def receive(self) -> object | None:
            try:
                return super().receive()
            except OSError as error:
                Counted.lost += error.errno == errno.ENOBUFS
                raise

        def present(self) -> list[Device]:
            return [Device()]

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


@pytest.mark.guest
@pytest.mark.root
async def test_real_events_of_the_real_device() -> None:
    heard = Heard()
    with DeviceMonitor(heard) as monitor:
        assert monitor.nodes == {"/dev/udmabuf"}
        trigger = await asyncio.create_subprocess_exec("udevadm", "trigger", "--action=change", "/dev/udmabuf")
        assert await trigger.wait() == 0
        assert await heard.next() == ("change", "/dev/udmabuf")
