# SPDX-License-Identifier: MIT
"""What others may see of a buffer: nothing. And what only root may do."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.bus.peer import PROPERTIES, Peer, error, spec
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from tests.bus.service import own_service
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    BUFFER_INTERFACE,
    LOG_CONTROL_INTERFACE,
    LOG_CONTROL_PATH,
    OBJECT_PATH,
    buffer_path,
    interface_xml,
)

INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"

CALLS = [
    (BUFFER_INTERFACE, "GetFd", "a{sv}", [{}]),
    (BUFFER_INTERFACE, "GetFd", "s", ["of another type"]),
    (BUFFER_INTERFACE, "GetTicket", "", []),
    (BUFFER_INTERFACE, "Attach", "sa{sv}", ["mem:null", {}]),
    (BUFFER_INTERFACE, "Attach", "sa{sv}", ["", {"sise": Variant("t", 1)}]),
    (BUFFER_INTERFACE, "Detach", "u", [1]),
    (BUFFER_INTERFACE, "SetName", "s", ["mine"]),
    (BUFFER_INTERFACE, "Release", "", []),
    (PROPERTIES, "Get", "ss", [BUFFER_INTERFACE, "Size"]),
    (PROPERTIES, "Get", "ss", [BUFFER_INTERFACE, "NoSuchProperty"]),
    (PROPERTIES, "GetAll", "s", [BUFFER_INTERFACE]),
    (PROPERTIES, "GetAll", "s", ["org.example.None"]),
    (INTROSPECTABLE, "Introspect", "", []),
    ("org.freedesktop.DBus.Peer", "Ping", "", []),
]


@pytest.mark.parametrize(("interface", "member", "signature", "body"), CALLS)
async def test_to_anyone_else_a_buffer_does_not_exist(
    peer: Peer, other: Peer, kind: str, interface: str, member: str, signature: str, body: list[object]
) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    told = []
    for asked in (path, buffer_path("0123456789abcdef")):
        with pytest.raises(RemoteError) as caught:
            await other.call(member, signature, *body, path=asked, interface=interface)
        told.append((caught.value.name, caught.value.message))
    # The same words for a foreign buffer and for one that never was.
    assert told[0] == told[1]
    assert told[0][0] == error("NoSuchBuffer")
    assert await peer.get("State", path) == "backed"


async def introspect(peer: Peer, path: str) -> ET.Element:
    (document,) = await peer.call("Introspect", path=path, interface=INTROSPECTABLE)
    return ET.fromstring(document)


async def test_buffers_are_no_children_and_show_themselves_to_their_holders(peer: Peer, kind: str) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    assert not (await introspect(peer, OBJECT_PATH)).findall("node")
    names = {element.get("name") for element in (await introspect(peer, path)).findall("interface")}
    assert BUFFER_INTERFACE in names


async def test_introspection_is_the_xml_that_is_shipped(peer: Peer, kind: str) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    for where, interface in (
        (OBJECT_PATH, ALLOCATOR_INTERFACE),
        (path, BUFFER_INTERFACE),
        (LOG_CONTROL_PATH, LOG_CONTROL_INTERFACE),
    ):
        live = next(e for e in (await introspect(peer, where)).findall("interface") if e.get("name") == interface)
        shipped = ET.fromstring(interface_xml(interface)).find("interface")
        assert shipped is not None
        assert ET.canonicalize(ET.tostring(live), strip_text=True) == ET.canonicalize(
            ET.tostring(shipped), strip_text=True
        )


async def test_every_object_is_found_from_the_root(peer: Peer) -> None:
    found, waiting = set(), ["/"]
    while waiting:
        path = waiting.pop()
        found.add(path)
        children = (await introspect(peer, path)).findall("node")
        waiting += [f"{path.rstrip('/')}/{child.get('name')}" for child in children]
    assert {OBJECT_PATH, LOG_CONTROL_PATH} <= found


SPECIFICATION_ERRORS: list[tuple[str, str, str, str, list[object], str]] = [
    ("/nowhere", ALLOCATOR_INTERFACE, "ListBuffers", "", [], "UnknownObject"),
    (OBJECT_PATH, "org.example.None", "ListBuffers", "", [], "UnknownInterface"),
    (OBJECT_PATH, ALLOCATOR_INTERFACE, "Pin", "", [], "UnknownMethod"),
    (OBJECT_PATH, ALLOCATOR_INTERFACE, "Allocate", "s", ["x"], "InvalidArgs"),
    (OBJECT_PATH, ALLOCATOR_INTERFACE, "ListBuffers", "s", ["x"], "InvalidArgs"),
    (OBJECT_PATH, PROPERTIES, "Get", "ss", [ALLOCATOR_INTERFACE, "None"], "UnknownProperty"),
    (OBJECT_PATH, PROPERTIES, "Get", "ss", ["org.example.None", "Version"], "UnknownInterface"),
    (OBJECT_PATH, PROPERTIES, "Set", "ssv", [ALLOCATOR_INTERFACE, "Version", Variant("u", 2)], "PropertyReadOnly"),
]


async def refusals(peer: Peer) -> list[str]:
    """Return the errors that the calls above end in, by their last words."""
    names = []
    for path, interface, member, signature, body, _ in SPECIFICATION_ERRORS:
        with pytest.raises(RemoteError) as caught:
            await peer.call(member, signature, *body, path=path, interface=interface)
        names.append(caught.value.name.removeprefix("org.freedesktop.DBus.Error."))
    return names


async def test_what_is_no_member_is_stopped_by_our_policy_on_the_bus(peer: Peer) -> None:
    stopped = {"org.example.None", "Pin"}
    expected = [
        "AccessDenied" if {interface, member} & stopped else name
        for _, interface, member, _, _, name in SPECIFICATION_ERRORS
    ]
    assert await refusals(peer) == expected


@pytest.mark.host
async def test_the_errors_of_the_specification_where_the_bus_lets_everything_through() -> None:
    with PrivateBus(extra_policy=OPEN_POLICY) as bus, own_service(bus.address):
        peer = await Peer.connect(bus.address)
        try:
            assert await refusals(peer) == [name for *_, name in SPECIFICATION_ERRORS]
            # A holder that asks for a member of a later version learns that, and not that its buffer is gone.
            (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=1, kind="memfd"))
            with pytest.raises(RemoteError) as caught:
                await peer.call("Resize", path=path)
            assert caught.value.name == "org.freedesktop.DBus.Error.UnknownMethod"
        finally:
            peer.close()


async def test_log_level_is_read_by_anyone_and_written_by_root(peer: Peer) -> None:
    arguments = {"path": LOG_CONTROL_PATH, "interface": LOG_CONTROL_INTERFACE}
    before = await peer.get("LogLevel", **arguments)
    assert await peer.get("SyslogIdentifier", **arguments) == "udmabufd"

    async def set_level(level: object) -> None:
        await peer.call(
            "Set",
            "ssv",
            LOG_CONTROL_INTERFACE,
            "LogLevel",
            Variant("s" if isinstance(level, str) else "u", level),
            path=LOG_CONTROL_PATH,
            interface=PROPERTIES,
        )

    await set_level("debug")
    assert await peer.get("LogLevel", **arguments) == "debug"
    for wrong in ("loud", 7):
        with pytest.raises(RemoteError, match="LogLevel") as caught:
            await set_level(wrong)
        assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
    await set_level(before)
