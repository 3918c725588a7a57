# SPDX-License-Identifier: MIT
"""The bus's policy at work: what a bus that has our file lets through to the service, for root and for others."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bus.peer import PROPERTIES, Peer, spec
from tests.bus.private_bus import PROJECT_POLICY, PrivateBus
from tests.bus.service import RunningService, own_service
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    BUS_NAME,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    OBJECT_PATH,
)

pytestmark = pytest.mark.root

NOBODY = 65534
ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"

Open = Callable[[str, int], Awaitable[Peer]]


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Be that user, with the group of the same number, to whoever looks at a socket's credentials."""
    groups = os.getgroups()
    os.setgroups([uid])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
async def open_as() -> AsyncIterator[Open]:
    """A function that connects to a bus as a user."""
    peers = []

    async def connect(address: str, uid: int) -> Peer:
        with as_user(uid):
            peers.append(await Peer.connect(address))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


async def refused(peer: Peer, path: str, interface: str, member: str, signature: str = "", *body: object) -> str:
    """Return the name of the error that a call ends with."""
    with pytest.raises(RemoteError) as caught:
        await peer.connection.call(BUS_NAME, path, interface, member, signature, list(body))
    return caught.value.name


async def test_anyone_may_allocate_read_and_introspect(service: RunningService, open_as: Open) -> None:
    peer = await open_as(service.address, NOBODY)
    path, _, info = await peer.allocate(size=4096, kind="memfd")
    assert info["size"] == 4096
    assert await peer.get("Size", path) == 4096
    assert await peer.get("LogLevel", LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE)
    (xml,) = await peer.call("Introspect", interface="org.freedesktop.DBus.Introspectable")
    assert ALLOCATOR_INTERFACE in xml
    await peer.call("Ping", interface="org.freedesktop.DBus.Peer")
    await peer.call("Release", path=path)


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize(
    ("interface", "member"),
    [
        (ALLOCATOR_INTERFACE, "Nonesuch"),
        (ALLOCATOR_INTERFACE, "allocate"),
        ("org.udmabufd.Buffer1", "Allocate"),
        ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
        ("org.freedesktop.DBus.Debug.Stats", "GetStats"),
        ("org.example.Other", "Allocate"),
    ],
)
async def test_what_is_not_listed_does_not_arrive(
    service: RunningService, open_as: Open, uid: int, interface: str, member: str
) -> None:
    peer = await open_as(service.address, uid)
    assert await refused(peer, OBJECT_PATH, interface, member) == ACCESS_DENIED


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize(("member", "signature", "body"), [("Allocate", "a{sv}", [spec(size=4096)]), ("Ping", "", [])])
async def test_a_call_without_an_interface_does_not_arrive(
    service: RunningService, open_as: Open, uid: int, member: str, signature: str, body: list[object]
) -> None:
    peer = await open_as(service.address, uid)
    assert await refused(peer, OBJECT_PATH, "", member, signature, *body) == ACCESS_DENIED


async def test_only_root_may_set_a_property(service: RunningService, open_as: Open) -> None:
    where = (LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE)
    root, nobody = await open_as(service.address, 0), await open_as(service.address, NOBODY)
    before = await root.get("LogLevel", *where)
    other = "err" if before != "err" else "crit"
    value = [LOG_CONTROL_INTERFACE, "LogLevel", Variant("s", other)]
    assert await refused(nobody, LOG_CONTROL_PATH, PROPERTIES, "Set", "ssv", *value) == ACCESS_DENIED
    # Nor by leaving out what the rules look for.
    assert await refused(nobody, LOG_CONTROL_PATH, "", "Set", "ssv", *value) == ACCESS_DENIED
    assert await nobody.get("LogLevel", *where) == before
    await root.call("Set", "ssv", *value, path=LOG_CONTROL_PATH, interface=PROPERTIES)
    assert await nobody.get("LogLevel", *where) == other
    await root.call("Set", "ssv", *value[:2], Variant("s", before), path=LOG_CONTROL_PATH, interface=PROPERTIES)


async def test_only_the_service_may_have_the_name(service: RunningService, open_as: Open) -> None:
    peer = await open_as(service.address, NOBODY)
    with pytest.raises(RemoteError) as caught:
        await peer.connection.request_name(BUS_NAME)
    assert caught.value.name == ACCESS_DENIED


# ---- the administrator's own rules, as the file's comment has them ------------------------------------------------


def examples() -> list[str]:
    """Return the busconfig documents in the policy's comments."""
    comments = "".join(re.findall(r"<!--.*?-->", PROJECT_POLICY.read_text(), re.DOTALL))
    return re.findall(r"<busconfig>.*?</busconfig>", comments, re.DOTALL)


async def may_allocate(peer: Peer) -> bool:
    try:
        await peer.allocate(size=4096, kind="memfd")
    except RemoteError as error:
        if error.name != ACCESS_DENIED:
            raise
        return False
    return True


@pytest.mark.host
async def test_a_user_can_be_denied(open_as: Open, tmp_path: Path) -> None:
    deny, _ = examples()
    local = tmp_path / "local.conf"
    local.write_text(deny.replace('"guest"', f'"{NOBODY}"').replace('"contractors"', '"games"'))
    with PrivateBus([PROJECT_POLICY, local]) as bus, own_service(bus.address):
        assert not await may_allocate(await open_as(bus.address, NOBODY))
        assert await may_allocate(await open_as(bus.address, 1))
        assert await may_allocate(await open_as(bus.address, 0))
        # By the service's unique name, too.
        peer = await open_as(bus.address, NOBODY)
        (owner,) = (
            await peer.connection.call(
                "org.freedesktop.DBus",
                "/org/freedesktop/DBus",
                "org.freedesktop.DBus",
                "GetNameOwner",
                "s",
                [BUS_NAME],
            )
        ).body
        with pytest.raises(RemoteError, match=re.escape("Rejected")) as caught:
            await peer.connection.call(owner, OBJECT_PATH, ALLOCATOR_INTERFACE, "ListBuffers")
        assert caught.value.name == ACCESS_DENIED


SYSTEM_CONF = Path("/usr/share/dbus-1/system.conf")
SYSTEM_LOCAL = "/etc/dbus-1/system-local.conf"


def only_nogroup(path: Path) -> Path:
    """Write the example for one group, with nobody's group in it."""
    _, only = examples()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(only.replace('"video"', '"nogroup"'))
    return path


async def check_that_only_nobody_may(open_as: Open, address: str) -> None:
    nobody, other = await open_as(address, NOBODY), await open_as(address, 1)
    assert await may_allocate(nobody)
    assert not await may_allocate(other)
    value = [LOG_CONTROL_INTERFACE, "LogLevel", Variant("s", "debug")]
    assert await refused(nobody, LOG_CONTROL_PATH, PROPERTIES, "Set", "ssv", *value) == ACCESS_DENIED


def system_includes(root: Path) -> str:
    """Return what the system bus includes, from its folders of policies to system-local.conf, with `root` as /."""
    text = SYSTEM_CONF.read_text()
    start = text.index("<includedir>")
    end = text.index("</include>", text.index(f">{SYSTEM_LOCAL}<")) + len("</include>")
    # A relative name is seen from the file's folder.
    includes = text[start:end].replace(">system.d<", f">{SYSTEM_CONF.parent}/system.d<")
    return re.sub(r">(/[^<]*)<", rf">{root}\1<", includes)


@pytest.mark.host
@pytest.mark.parametrize("folder", ["/usr/share/dbus-1/system.d", "/etc/dbus-1/system.d"])
async def test_one_group_alone_can_be_allowed(open_as: Open, tmp_path: Path, folder: str) -> None:
    """Wherever the prefix puts our file, by the system bus's own order of reading."""
    assert f"{SYSTEM_LOCAL}." in PROJECT_POLICY.read_text()
    only_nogroup(tmp_path / SYSTEM_LOCAL.lstrip("/"))
    packaged = tmp_path / folder.lstrip("/") / PROJECT_POLICY.name
    packaged.parent.mkdir(parents=True, exist_ok=True)
    packaged.write_text(PROJECT_POLICY.read_text())
    with PrivateBus([], system_includes(tmp_path)) as bus, own_service(bus.address):
        await check_that_only_nobody_may(open_as, bus.address)


@pytest.mark.host
@pytest.mark.parametrize("ours_first", [True, False])
async def test_one_group_alone_whatever_the_order_in_a_folder(open_as: Open, tmp_path: Path, ours_first: bool) -> None:
    """The same rules beside our file hold in one of the two orders alone, hence the place that the comment names."""
    beside = only_nogroup(tmp_path / "system.d/udmabufd-local.conf")
    folder = [PROJECT_POLICY, beside] if ours_first else [beside, PROJECT_POLICY]
    with PrivateBus(folder) as bus, own_service(bus.address):
        assert await may_allocate(await open_as(bus.address, 1)) is not ours_first
    last = only_nogroup(tmp_path / "system-local.conf")
    with PrivateBus([*folder, last]) as bus, own_service(bus.address):
        await check_that_only_nobody_may(open_as, bus.address)


def test_the_policy_documents_both_cases() -> None:
    assert len(examples()) == 2
