# SPDX-License-Identifier: MIT
"""udmabufd.service as systemd runs it in the guest: its sandbox, its device, its journal, its watchdog."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bus.peer import Peer, plain
from udmabufd.core.limits import Limits
from udmabufd.system.journal import JournalHandler
from udmabufd.system.store_capacity import check_capacity
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_client.contract import ERROR_PREFIX, OBJECT_PATH

pytestmark = [pytest.mark.guest, pytest.mark.root]

BUS = "unix:path=/run/dbus/system_bus_socket"
UNIT = "udmabufd.service"
NODE = Path("/dev/udmabuf")
DROP_IN = Path("/run/systemd/system/udmabufd.service.d/90-test.conf")
PATIENCE = 120
"""Seconds; a guest without hardware virtualisation needs some of them."""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def show(name: str) -> str:
    """Return what systemd knows of the unit by that name."""
    return run("systemctl", "show", "--value", "-p", name, UNIT).strip()


@asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    peer = await Peer.connect(BUS)
    try:
        yield peer
    finally:
        peer.close()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until the answer is yes: of things that nobody signals."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.2)


@pytest.fixture
def restarted_afterwards() -> Iterator[None]:
    """Leave the service as it was found, whatever a test does to it."""
    yield
    DROP_IN.unlink(missing_ok=True)
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", UNIT)
    run("systemctl", "restart", UNIT)


def test_the_service_runs_as_its_own_user_without_rights() -> None:
    assert show("User") == "udmabufd"
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{show('MainPID')}/status").read_text().splitlines() if ":" in line
    )
    assert status["Name"].strip() == "udmabufd"
    assert int(status["Uid"].split()[0]) == int(run("id", "-u", "udmabufd"))
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"


def test_it_has_room_for_what_it_may_have_to_keep() -> None:
    pid = show("MainPID")
    environ = dict(
        entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
    )
    assert environ["FDSTORE"] == show("FileDescriptorStoreMax")
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (open_files,) = (line.split()[3:5] for line in limits if line.startswith("Max open files"))
    assert open_files == [show("LimitNOFILE")] * 2
    check_capacity(Limits().max_buffers, environ, int(open_files[1]))


def test_its_memory_is_limited_by_a_slice_of_its_own() -> None:
    assert show("ControlGroup") == "/udmabufd.slice/udmabufd.service"
    group = Path("/sys/fs/cgroup/udmabufd.slice")
    total = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert int((group / "memory.max").read_text()) == pytest.approx(total / 2, rel=0.01)
    assert (group / "udmabufd.service/memory.max").read_text().strip() == "max"
    assert show("OOMPolicy") == "continue"


def test_the_service_sees_which_application_a_process_is_of() -> None:
    # A process of another user, as the service's user sees it from inside the sandbox.
    inside = ("nsenter", "--mount", "--target", show("MainPID"), "setpriv", "--reuid=udmabufd", "--clear-groups")
    shown = run(*inside, "cat", "/proc/1/cgroup")
    assert shown == Path("/proc/1/cgroup").read_text()


@pytest.mark.usefixtures("restarted_afterwards")
@pytest.mark.parametrize("number", ["KILL", "TERM"])
async def test_whatever_ends_it_it_is_started_again(number: str) -> None:
    # However often.
    assert show("StartLimitIntervalUSec") == "0"
    pid = show("MainPID")
    run("systemctl", "kill", "--kill-whom=main", f"--signal={number}", UNIT)

    async def again() -> bool:
        return show("MainPID") not in ("0", pid) and show("ActiveState") == "active"

    await until(again)
    async with connected() as peer:
        assert await peer.get("Version") == 1


def test_systemd_was_told_a_status() -> None:
    assert show("StatusText")
    assert show("Type") == "notify"
    assert int(show("WatchdogTimestampMonotonic")) > 0


async def test_the_bus_starts_the_service(restarted_afterwards: None) -> None:
    run("systemctl", "stop", UNIT)
    async with connected() as peer:
        assert await peer.get("Version") == 1
    assert show("ActiveState") == "active"


@pytest.mark.usefixtures("restarted_afterwards")
async def test_a_late_device_is_served_inside_the_sandbox() -> None:
    before = NODE.stat()
    assert stat.S_ISCHR(before.st_mode)
    run("systemctl", "stop", UNIT)
    NODE.unlink()
    try:
        run("systemctl", "start", UNIT)
        async with connected() as peer:
            assert await peer.get("UdmabufAvailable") is False
            _, _, info = await peer.allocate(size=4096, kind="memfd")
            assert info["allocator"] == "memfd"
            # Another allocator steps in; who wants this one is told.
            _, _, info = await peer.allocate(size=4096)
            assert info["allocator"] == "heap:system"
            with pytest.raises(RemoteError) as caught:
                await peer.allocate(size=4096, allocator="udmabuf")
            assert caught.value.name == f"{ERROR_PREFIX}UdmabufUnavailable"
            assert "memfd" in show("StatusText")

            assert await peer.get("Allocators") == ["heap:system", "memfd"]
            await peer.connection.add_match(f"type='signal',path='{OBJECT_PATH}',member='PropertiesChanged'")
            pid = show("MainPID")

            # As the kernel makes a node, for root alone; udev's rule then gives it its group.
            os.mknod(NODE, 0o600 | stat.S_IFCHR, before.st_rdev)
            run("udevadm", "trigger", "--action=add", "--subsystem-match=misc", "--sysname-match=udmabuf")

            async def available() -> bool:
                return bool(await peer.get("UdmabufAvailable"))

            await until(available)
            # Everybody was told, and it recovered rather than was started again.
            told = [body for header, body in peer.signals if header.path == OBJECT_PATH]
            assert [plain(changed) for _, changed, _ in told] == [{"UdmabufAvailable": True}]
            assert show("MainPID") == pid
            _, _, info = await peer.allocate(size=4096)
            assert info["allocator"] == "udmabuf"
    finally:
        if not NODE.exists():
            os.mknod(NODE, 0o660 | stat.S_IFCHR, before.st_rdev)
        run("udevadm", "trigger", "--action=add", "--subsystem-match=misc", "--sysname-match=udmabuf")
        run("udevadm", "settle")
    after = NODE.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)


def test_the_rule_leaves_the_node_to_its_other_users() -> None:
    assert NODE.group() == "kvm"
    assert stat.S_IMODE(NODE.stat().st_mode) == 0o660
    # The class of the device is allowed; the permissions of the node still count.
    assert "char-misc r" in show("DeviceAllow")


@pytest.mark.usefixtures("restarted_afterwards")
async def test_a_service_that_hangs_is_killed_and_started_again() -> None:
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text("[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    pid = show("MainPID")
    run("kill", "-STOP", pid)

    async def again() -> bool:
        return show("MainPID") not in ("0", pid) and show("ActiveState") == "active"

    await until(again)
    assert int(show("NRestarts")) == 1


@pytest.mark.usefixtures("restarted_afterwards")
async def test_too_short_a_watchdog_is_refused_with_the_reason() -> None:
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text("[Service]\nWatchdogSec=1s\nRestart=no\n")
    run("systemctl", "daemon-reload")
    assert subprocess.run(["systemctl", "restart", UNIT], check=False, capture_output=True).returncode != 0
    assert "set it to 2 s or more" in run("journalctl", "-u", UNIT, "-n", "20", "--no-pager")


def test_the_log_level_is_changed_by_systemctl() -> None:
    before = run("systemctl", "service-log-level", UNIT).strip()
    run("systemctl", "service-log-level", UNIT, "debug")
    try:
        assert run("systemctl", "service-log-level", UNIT).strip() == "debug"
    finally:
        run("systemctl", "service-log-level", UNIT, before)
    # Under systemd, stderr is the journal: records arrive with their fields, not as lines.
    entries = [json.loads(line) for line in run("journalctl", "-u", UNIT, "-o", "json").splitlines()]
    ours = [entry for entry in entries if entry.get("LOGGER", "").startswith("udmabufd")]
    assert ours
    assert all(entry["SYSLOG_IDENTIFIER"] == "udmabufd" for entry in ours)


async def test_the_real_journal_takes_large_records_and_their_fields() -> None:
    token = os.urandom(8).hex()
    handler = JournalHandler("udmabufd-test")
    logger = logging.getLogger("udmabufd.test_service")
    logger.addHandler(handler)
    try:
        text = f"{token} " + "x" * (400 << 10)  # beyond a datagram, below journald's own limit of a field
        logger.warning("%s", text, extra={"uid": 4711, "buffer": token})
    finally:
        logger.removeHandler(handler)
        handler.close()

    async def found() -> bool:
        shown = run("journalctl", "-o", "json", "--all", f"UDMABUFD_BUFFER={token}")
        return bool(shown) and json.loads(shown)["MESSAGE"] == text and json.loads(shown)["UDMABUFD_UID"] == "4711"

    await until(found)


def test_the_journal_explains_what_the_service_says() -> None:
    catalog = Path("/usr/lib/systemd/catalog/udmabufd.catalog").read_text().splitlines()
    entries = {line.split()[1] for line in catalog if line.startswith("-- ")}
    assert entries
    # The installation for this machine was made elsewhere, where there is no catalog to bring up to date.
    run("journalctl", "--update-catalog")
    listed = {line.split()[0] for line in run("journalctl", "--list-catalog", *sorted(entries)).splitlines()}
    assert listed == entries


def test_polkit_knows_the_actions() -> None:
    policy = ElementTree.parse("/usr/share/polkit-1/actions/org.udmabufd.policy")
    actions = [element.get("id", "") for element in policy.iter("action")]
    assert actions
    for action in actions:
        assert action in run("pkaction", "--action-id", action)


async def test_a_user_that_the_administrator_denies_is_refused() -> None:
    local = Path("/etc/dbus-1/system.d/udmabufd-local.conf")
    reload = (
        "busctl",
        "call",
        "org.freedesktop.DBus",
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        "ReloadConfig",
    )

    async def allowed(uid: int) -> bool:
        os.seteuid(uid)
        try:
            peer = await Peer.connect(BUS)
        finally:
            os.seteuid(0)
        try:
            await peer.allocate(size=4096, kind="memfd")
        except BusError as error:
            assert isinstance(error, RemoteError), error
            assert error.name == "org.freedesktop.DBus.Error.AccessDenied"
            return False
        finally:
            peer.close()
        return True

    assert await allowed(65534)
    local.write_text(
        '<busconfig><policy user="65534"><deny send_destination="org.udmabufd.Allocator1"/></policy></busconfig>'
    )
    try:
        run(*reload)
        assert not await allowed(65534)
        assert await allowed(1)
    finally:
        local.unlink()
        run(*reload)
    assert await allowed(65534)


@pytest.mark.usefixtures("restarted_afterwards")
def test_the_other_devices_of_the_nodes_group_are_out_of_its_reach() -> None:
    kvm = Path("/dev/kvm")
    made = not kvm.exists()
    if made:
        os.mknod(kvm, 0o660 | stat.S_IFCHR, os.makedev(10, 232))
    try:
        run("systemctl", "restart", UNIT)
        inside = ("nsenter", "--mount", "--target", show("MainPID"), "stat", "-c", "%a %t:%T")
        # systemd puts a node without a device and without permissions over it.
        assert run(*inside, str(kvm)).split() == ["0", "0:0"]
        assert run(*inside, str(NODE)).split() != ["0", "0:0"]
    finally:
        if made:
            kvm.unlink()
