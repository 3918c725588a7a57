# SPDX-License-Identifier: MIT
"""Every member of the interfaces, as a program without the client library sees it."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import re

import pytest

from tests.bus.peer import PROPERTIES, Peer, error, plain, spec
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    ALLOCATOR_TYPES,
    BUFFER_INTERFACE,
    DEVICE_TYPES,
    INFO_TYPES,
    LIST_TYPES,
    MAX_FDS_PER_MESSAGE,
    OBJECT_PATH,
    VERDICT_TYPES,
    buffer_path,
)

PAGE = mmap.PAGESIZE
PATH = re.compile(re.escape(OBJECT_PATH) + r"/buffer/[0-9a-f]{16}")


async def test_allocate_hands_out_zeroed_memory_and_says_what_it_is(peer: Peer, kind: str) -> None:
    path, fd, info = await peer.allocate(size=PAGE + 1, kind=kind, name="front left")
    assert PATH.fullmatch(path)
    assert os.lseek(fd.fileno(), 0, os.SEEK_END) == info["size"] == 2 * PAGE
    assert os.fstat(fd.fileno()).st_ino == info["inode"]
    assert (info["size_requested"], info["kind"], info["name"], info["serial"]) == (PAGE + 1, kind, "front left", 1)
    assert info["allocator"] == ("udmabuf" if kind == "dma-buf" else "memfd")
    assert (info["cache_requested"], info["cache_effective"], info["cache_evidence"]) == (
        "cached",
        "cached",
        "default",
    )
    assert info["needs_sync"] is (kind == "dma-buf")
    assert not info.keys() & {"width", "height", "format", "modifier", "offsets", "strides"}
    with mmap.mmap(fd.fileno(), 2 * PAGE, mmap.MAP_SHARED) as view:
        assert view[:] == bytes(2 * PAGE)
        view[:5] = b"hello"


async def test_a_picture_has_its_planes_laid_out(peer: Peer, kind: str) -> None:
    _, fd, info = await peer.allocate(width=1921, height=1081, format="NV12", kind=kind)
    assert (info["strides"], info["offsets"]) == ([2048, 2048], [0, 2048 * 1081])
    assert (info["width"], info["height"], info["format"], info["modifier"]) == (1921, 1081, "NV12", 0)
    assert info["size_requested"] == 2048 * (1081 + 541)
    assert info["size"] == os.lseek(fd.fileno(), 0, os.SEEK_END) == -(-info["size_requested"] // PAGE) * PAGE


async def test_the_types_of_info_and_list_are_those_of_the_contract(peer: Peer, kind: str) -> None:
    _, _, info = await peer.call("Allocate", "a{sv}", spec(width=8, height=8, format="XR24", kind=kind))
    assert {key: variant.signature for key, variant in info.items()} == INFO_TYPES
    (entries,) = await peer.call("ListBuffers")
    (listed,) = [entry for entry in entries if entry["inode"].value == info["inode"].value]
    types = {key: variant.signature for key, variant in listed.items()}
    expected = dict(LIST_TYPES)
    if kind == "memfd":
        # The kernel counts no references of a memfd.
        del expected["references"]
    assert types == expected


async def test_every_descriptor_is_close_on_exec(peer: Peer, kind: str) -> None:
    path, fd, _ = await peer.allocate(size=1, kind=kind)
    again, _ = await peer.call("GetFd", "a{sv}", {}, path=path)
    _, many, _ = await peer.call("AllocateMany", "a{sv}u", spec(size=1, kind=kind), 3)
    for descriptor in (fd, again, *many):
        assert fcntl.fcntl(descriptor.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


async def test_many_come_in_one_message(peer: Peer, kind: str) -> None:
    count = await peer.get("MaxFdsPerMessage")
    assert count == MAX_FDS_PER_MESSAGE
    paths, fds, infos = await peer.call("AllocateMany", "a{sv}u", spec(size=PAGE, kind=kind), count)
    assert len(set(paths)) == len(fds) == len(infos) == count
    for fd, info in zip(fds, infos, strict=True):
        assert os.fstat(fd.fileno()).st_ino == info["inode"].value
    assert len({info["inode"].value for info in infos}) == count
    for wrong in (0, count + 1):
        with pytest.raises(RemoteError, match="count: must be 1 to 16") as caught:
            await peer.call("AllocateMany", "a{sv}u", spec(size=PAGE, kind=kind), wrong)
        assert caught.value.name == error("InvalidSpec")


async def test_an_empty_buffer_gets_its_memory_with_the_first_fd(peer: Peer, kind: str) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=3 * PAGE, kind=kind, name="late"))
    assert await peer.get("State", path) == "empty"
    assert (await peer.get("Serial", path), await peer.get("Allocator", path)) == (0, "")
    (first, info), (second, _) = await asyncio.gather(
        peer.call("GetFd", "a{sv}", {}, path=path), peer.call("GetFd", "a{sv}", {}, path=path)
    )
    assert os.fstat(first.fileno()).st_ino == os.fstat(second.fileno()).st_ino == info["inode"].value
    (listed,) = [entry for entry in map(plain, (await peer.call("ListBuffers"))[0]) if entry["buffer"] == path]
    assert listed["charged"] == 3 * PAGE
    assert await peer.get("Bytes") >= 3 * PAGE
    (everything,) = await peer.call(
        "GetAll", "s", BUFFER_INTERFACE, path=path, interface="org.freedesktop.DBus.Properties"
    )
    assert plain(everything) == {
        "State": "backed",
        "Size": 3 * PAGE,
        "Serial": 1,
        "Allocator": info["allocator"].value,
        "Name": "late",
        "Constraints": {},
        "Attachments": [],
    }


async def test_holders_alone_hear_of_changes(peer: Peer, other: Peer, kind: str) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=PAGE, kind=kind))
    await peer.call("GetFd", "a{sv}", {}, path=path)
    await peer.call("SetName", "s", "renamed", path=path)
    # The bus keeps the order, so after an answer every earlier signal is there.
    await peer.get("Version")
    await other.get("Version")
    bodies = [body for header, body in peer.signals if header.path == path]
    assert [(interface, plain(changed), gone) for interface, changed, gone in bodies] == [
        (BUFFER_INTERFACE, {"State": "backed", "Serial": 1, "Allocator": await peer.get("Allocator", path)}, []),
        (BUFFER_INTERFACE, {"Name": "renamed"}, []),
    ]
    assert not [header for header, _ in other.signals if header.path == path]


async def test_a_ticket_makes_another_connection_a_holder(peer: Peer, other: Peer, kind: str) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=PAGE, kind=kind))
    (ticket,) = await peer.call("GetTicket", path=path)
    assert re.fullmatch("[0-9a-f]{32}", ticket)
    assert await peer.call("GetTicket", path=path) == [ticket]
    imported, info = await other.call("ImportTicket", "s", ticket)
    assert imported == path
    # Nothing that only memory gives a value to.
    assert not info.keys() & {"allocator", "cache_effective", "cache_evidence", "needs_sync", "serial", "inode"}
    ours, _ = await peer.call("GetFd", "a{sv}", {}, path=path)
    theirs, _ = await other.call("GetFd", "a{sv}", {}, path=path)
    with (
        mmap.mmap(ours.fileno(), PAGE, mmap.MAP_SHARED) as mine,
        mmap.mmap(theirs.fileno(), PAGE, mmap.MAP_SHARED) as yours,
    ):
        mine[:6] = b"shared"
        assert yours[:6] == b"shared"
    await peer.call("Release", path=path)
    assert await other.get("State", path) == "backed"
    await other.call("Release", path=path)
    if kind == "dma-buf":
        # While its memory is there, the ticket brings it back to life.
        assert (await peer.call("ImportTicket", "s", ticket))[0] == path
        assert await peer.get("State", path) == "backed"
        await peer.call("Release", path=path)
    ours.close()
    theirs.close()
    async with asyncio.timeout(30):
        while path in [entry["buffer"].value for entry in (await peer.call("ListBuffers"))[0]]:
            await peer.get("Version")
    with pytest.raises(RemoteError) as caught:
        await peer.call("ImportTicket", "s", ticket)
    assert caught.value.name == error("NoSuchBuffer")


async def test_shares_are_counted(peer: Peer, kind: str) -> None:
    path, _, _ = await peer.allocate(size=PAGE, kind=kind)
    (ticket,) = await peer.call("GetTicket", path=path)
    await peer.call("ImportTicket", "s", ticket)
    await peer.call("Release", path=path)
    assert await peer.get("Name", path) == f"udmabufd-{path.rpartition('/')[2]}"
    await peer.call("Release", path=path)
    with pytest.raises(RemoteError) as caught:
        await peer.call("Release", path=path)
    assert caught.value.name == error("NoSuchBuffer")


async def test_the_end_of_a_connection_takes_its_shares(peer: Peer, other: Peer, kind: str) -> None:
    path, _, _ = await other.allocate(size=PAGE, kind=kind)
    assert path in await listed(peer)
    other.close()
    while path in await listed(peer):  # noqa: ASYNC110 - the bus tells the service, nobody tells us
        await asyncio.sleep(0)


async def listed(peer: Peer) -> set[str]:
    """Return the paths in ListBuffers."""
    (entries,) = await peer.call("ListBuffers")
    return {entry["buffer"].value for entry in entries}


async def test_list_counts_holders_references_and_charges(peer: Peer, kind: str) -> None:
    path, fd, _ = await peer.allocate(size=5 * PAGE, kind=kind, name="listed")

    async def entry() -> dict[str, object]:
        (entries,) = await peer.call("ListBuffers")
        return next(plain(entry) for entry in entries if entry["buffer"].value == path)

    before = await entry()
    assert (before["state"], before["holders"], before["charged"]) == ("backed", 1, 5 * PAGE)
    if kind == "dma-buf":
        assert before["references"] == 1
        with fd.dup(), mmap.mmap(fd.fileno(), PAGE, mmap.MAP_SHARED):
            # The duplicate, the mapping, and the descriptor that Python's mmap keeps.
            assert (await entry())["references"] == 4
        assert (await entry())["references"] == 1


async def test_caches_that_cannot_be_had(peer: Peer, kind: str) -> None:
    _, _, info = await peer.allocate(size=1, kind=kind, cache="write-combine")
    assert (info["cache_requested"], info["cache_effective"]) == ("write-combine", "cached")
    await peer.allocate(size=1, kind=kind, cache="cached", cache_policy="require")
    for cache in ("write-combine", "uncached"):
        with pytest.raises(RemoteError, match=": cache: ") as caught:
            await peer.allocate(size=1, kind=kind, cache=cache, cache_policy="require")
        assert caught.value.name == error("CacheUnavailable")


async def test_names(peer: Peer, kind: str) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    for name in ("x", "x" * 31, "with space~"):
        await peer.call("SetName", "s", name, path=path)
        assert await peer.get("Name", path) == name
    for name in ("", "x" * 32, "a\tb", "é"):
        with pytest.raises(RemoteError, match=": name: ") as caught:
            await peer.call("SetName", "s", name, path=path)
        assert caught.value.name == error("InvalidSpec")
    assert await peer.get("Name", path) == "with space~"


async def test_properties_have_the_types_of_the_xml(peer: Peer) -> None:
    (everything,) = await peer.call("GetAll", "s", ALLOCATOR_INTERFACE, interface=PROPERTIES)
    assert {name: variant.signature for name, variant in everything.items()} == {
        "Version": "u",
        "UdmabufAvailable": "b",
        "Allocators": "as",
        "MaxBufferSize": "t",
        "MaxBytesPerUser": "t",
        "MaxBytesPerApplication": "t",
        "MaxEvictedBytesPerUser": "t",
        "MaxWrappedBytesPerUser": "t",
        "MaxFdsInFlightPerUser": "u",
        "MaxSharesPerUser": "u",
        "MaxAttachmentsPerUser": "u",
        "MaxBuffersPerUser": "u",
        "MaxBuffers": "u",
        "MaxFdsPerMessage": "u",
        "MaxCallsPerWindow": "u",
        "CallWindowUSec": "t",
        "MaxCallsInFlightPerUser": "u",
        "Buffers": "u",
        "Bytes": "t",
        "EvictedBytes": "t",
    }
    assert everything["Allocators"].value[-1] == "memfd"


async def test_properties_without_their_interface(peer: Peer, kind: str) -> None:
    """D-Bus lets its name be empty, and leaves to the service what that finds."""
    path, _, _ = await peer.allocate(size=1, kind=kind)
    for where, interface, name in ((OBJECT_PATH, ALLOCATOR_INTERFACE, "Version"), (path, BUFFER_INTERFACE, "State")):
        (named,) = await peer.call("GetAll", "s", interface, path=where, interface=PROPERTIES)
        (found,) = await peer.call("GetAll", "s", "", path=where, interface=PROPERTIES)
        # Counters among the values may differ by now.
        assert {key: value.signature for key, value in found.items()} == {
            key: value.signature for key, value in named.items()
        }
        assert await peer.get(name, where, "") == named[name].value
        with pytest.raises(RemoteError, match="UnknownProperty"):
            await peer.get("Nothing", where, "")
    with pytest.raises(RemoteError, match="UnknownInterface"):
        await peer.call("GetAll", "s", "org.example.Other", path=path, interface=PROPERTIES)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attachment": Variant("u", 1)}, "attachment: this connection has no attachment 1"),
        ({"attachment": Variant("t", 1)}, "attachment: must have the D-Bus type 'u'"),
        ({"dynamic": Variant("b", True)}, "dynamic: is not a known key; there are: attachment"),
    ],
)
async def test_options_of_get_fd(peer: Peer, kind: str, options: dict[str, Variant], text: str) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    with pytest.raises(RemoteError, match=f": {text}") as caught:
        await peer.call("GetFd", "a{sv}", options, path=path)
    assert caught.value.name == error("InvalidSpec")


@pytest.mark.parametrize(
    ("device", "options", "name", "text"),
    [
        ("", {}, "InvalidSpec", "device: "),
        ("mem:null\n", {}, "InvalidSpec", "device: "),
        ("mem:none", {}, "NoSuchDevice", "mem:none"),
        ("/dev/none", {}, "NoSuchDevice", "/dev/none"),
        ("/etc/passwd", {}, "InvalidSpec", "device: "),
        ("mem:null", {"sise": Variant("t", 1)}, "InvalidSpec", "sise: is not a known key"),
        ("mem:null", {"dynamic": Variant("u", 1)}, "InvalidSpec", "dynamic: must have the D-Bus type 'b'"),
        ("mem:null", {"constraints": Variant("a{st}", {})}, "InvalidSpec", "constraints: must have the D-Bus type"),
        (
            "mem:null",
            {"constraints": Variant("a{sv}", {"sise": Variant("t", 1)})},
            "InvalidSpec",
            "constraints.sise: is not a known key",
        ),
        (
            "mem:null",
            {"constraints": Variant("a{sv}", {"alignment": Variant("u", 1)})},
            "InvalidSpec",
            "constraints.alignment: must have the D-Bus type 't'",
        ),
        (
            "mem:null",
            {"constraints": Variant("a{sv}", {"max_segments": Variant("u", 0)})},
            "InvalidSpec",
            "constraints.max_segments: must be 1 to",
        ),
    ],
)
async def test_what_cannot_be_attached(
    peer: Peer, kind: str, device: str, options: dict[str, Variant], name: str, text: str
) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=1, kind=kind))
    with pytest.raises(RemoteError, match=f": {text}") as caught:
        await peer.call("Attach", "sa{sv}", device, options, path=path)
    assert caught.value.name == error(name)
    assert await peer.get("Attachments", path) == []


async def test_nothing_imports_a_memfd(peer: Peer) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=1, kind="memfd"))
    with pytest.raises(RemoteError) as caught:
        await peer.call("Attach", "sa{sv}", "mem:null", {}, path=path)
    assert caught.value.name == error("NotSupported")
    with pytest.raises(RemoteError, match=": attachment: this connection has no attachment 1") as caught:
        await peer.call("Detach", "u", 1, path=path)
    assert caught.value.name == error("InvalidSpec")
    with pytest.raises(RemoteError, match=": devices: contradicts kind memfd") as caught:
        await peer.allocate(size=1, kind="memfd", devices=["mem:null"])
    assert caught.value.name == error("InvalidSpec")


async def test_explain_has_a_row_for_each_allocator_and_agrees_with_what_is_done(peer: Peer, kind: str) -> None:
    (listed,) = await peer.call("ListAllocators")
    names = [row["allocator"].value for row in listed]
    assert await peer.get("Allocators") == [row["allocator"].value for row in listed if row["available"].value]
    (rows,) = await peer.call("Explain", "a{sv}", spec(size=PAGE, kind=kind))
    assert [row["allocator"].value for row in rows] == names
    for row in rows:
        types = {key: variant.signature for key, variant in row.items()}
        told = {"cache_effective", "cache_evidence"} if row["ok"].value else {"field", "device", "reason", "remedy"}
        assert types == {key: VERDICT_TYPES[key] for key in ("allocator", "ok", *told)}
    _, _, info = await peer.allocate(size=PAGE, kind=kind)
    chosen = next(plain(row) for row in rows if row["ok"].value)
    assert {key: info[key] for key in ("allocator", "cache_effective", "cache_evidence")} == {
        key: chosen[key] for key in ("allocator", "cache_effective", "cache_evidence")
    }
    asked = {"constraints": {"max_segment_size": Variant("t", 1), "max_segments": Variant("u", 1)}}
    (rows,) = await peer.call("Explain", "a{sv}", spec(size=PAGE, kind=kind, **asked))
    assert not any(row["ok"].value for row in rows)
    with pytest.raises(RemoteError) as caught:
        await peer.allocate(size=PAGE, kind=kind, **asked)
    assert caught.value.name == error("NoAllocator")
    # The charges of earlier tests end in a moment; one for what was refused would not.
    async with asyncio.timeout(60):
        while await peer.get("Bytes") != info["size"]:
            await peer.get("Version")


async def test_the_types_of_the_lists_are_those_of_the_contract(peer: Peer) -> None:
    for member, known in (("ListAllocators", ALLOCATOR_TYPES), ("ListDevices", DEVICE_TYPES)):
        (rows,) = await peer.call(member)
        for row in rows:
            types = {key: variant.signature for key, variant in row.items()}
            assert types.items() <= known.items()
            (first,) = set(types) & {"allocator", "device"}
            assert row[first].value


async def test_a_buffer_object_is_found_by_its_whole_id_only(peer: Peer, kind: str) -> None:
    path, _, _ = await peer.allocate(size=1, kind=kind)
    for wrong in (path[:-1], path + "0", buffer_path("0" * 16), path + "/x", buffer_path("")[:-1] + "s"):
        with pytest.raises(RemoteError):
            await peer.call("GetTicket", path=wrong, interface=BUFFER_INTERFACE)
