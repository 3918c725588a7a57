# SPDX-License-Identifier: MIT
"""What the client knows of the interface against the interface itself: errors, keys, signatures, imports, verbs."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import pytest

import udmabufd_client
from udmabufd_base.codec import Variant, encode
from udmabufd_base.message import Message, MessageType
from udmabufd_client import aio, contract, errors, sync
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUFFER_INTERFACE, ErrorName
from udmabufd_client.info import (
    AttachmentInfo,
    BufferInfo,
    Limits,
    ListedBuffer,
    RecoveredBuffer,
    Usage,
    parse_properties,
)
from udmabufd_client.interface import interface
from udmabufd_client.inventory import AllocatorInfo, DeviceInfo, Verdict
from udmabufd_client.share import Share
from udmabufd_client.spec import SpecKeys, check_count, marshal_attach, marshal_spec, marshal_wrap


@pytest.mark.parametrize("name", ErrorName)
def test_every_error_of_the_interface_has_its_class(name: ErrorName) -> None:
    error = errors.from_remote(contract.ERROR_PREFIX + name, "said by the service")
    assert type(error).__name__ == name
    assert (str(error), error.dbus_name) == ("said by the service", contract.ERROR_PREFIX + name)
    assert getattr(udmabufd_client, name) is type(error)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.InvalidSpec, ValueError),
        (errors.OutOfMemory, MemoryError),
        (errors.AccessDenied, PermissionError),
        (errors.CallTimedOut, TimeoutError),
        (errors.NoSuchBuffer, LookupError),
        (errors.ServiceUnavailable, ConnectionError),
    ],
)
def test_errors_are_also_what_they_refine(cls: type[errors.UdmabufError], builtin: type[Exception]) -> None:
    assert issubclass(cls, builtin)
    assert str(cls("why")) == "why"
    assert cls("why").args == ("why",)


@pytest.mark.parametrize("name", ["org.udmabufd.Error.NotYetThought", "com.example.Odd", ""])
def test_an_unknown_error_keeps_its_name_and_text(name: str) -> None:
    error = errors.from_remote(name, "the text")
    assert type(error) is errors.RemoteFailure
    assert error.dbus_name == name
    assert "the text" in str(error)
    assert name in str(error)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("ServiceUnknown", errors.ServiceUnavailable),
        ("NameHasNoOwner", errors.ServiceUnavailable),
        ("NoReply", errors.ServiceUnavailable),
        ("Spawn.ChildExited", errors.ServiceUnavailable),
        ("AccessDenied", errors.AccessDenied),
        ("UnknownMethod", errors.NotSupported),
        ("LimitsExceeded", errors.RateLimited),
    ],
)
def test_what_the_bus_says_is_typed_too_and_names_the_next_step(name: str, cls: type[errors.UdmabufError]) -> None:
    error = errors.from_remote("org.freedesktop.DBus.Error." + name, "as the bus put it")
    assert type(error) is cls
    assert "as the bus put it" in str(error)
    if cls is errors.ServiceUnavailable:
        assert "systemctl start udmabufd" in str(error)


def test_the_keywords_are_the_keys_of_spec() -> None:
    python = {"t": int, "u": int, "s": str, "as": Sequence[str], "a{sv}": Mapping[str, object]}
    assert get_type_hints(SpecKeys) == {key: python[signature] for key, signature in contract.SPEC_TYPES.items()}


def test_the_fields_are_the_keys_of_info_and_list() -> None:
    python = {"t": int, "u": int, "s": str, "b": bool, "o": str, "at": tuple[int, ...]}
    for cls, types in ((BufferInfo, contract.INFO_TYPES), (ListedBuffer, contract.LIST_TYPES)):
        hints: dict[str, Any] = get_type_hints(cls)
        expected: dict[str, Any] = {key: python[signature] | None for key, signature in types.items()}
        if cls is ListedBuffer:
            expected["buffer"] = str
        assert hints == expected


def test_the_rows_for_administrators_have_the_keys_of_the_contract() -> None:
    python = {"t": int, "u": int, "s": str, "o": str}
    usage, recovered = get_type_hints(Usage), get_type_hints(RecoveredBuffer)
    assert usage == {key: python[signature] for key, signature in contract.USAGE_TYPES.items()}
    assert recovered == {key: python[signature] | None for key, signature in contract.RECOVERED_TYPES.items()}
    row = Usage.parse({"uid": Variant("u", 5), "bytes": Variant("t", 7), "newer": Variant("s", "x")})
    assert row == Usage(uid=5, bytes=7)
    with pytest.raises(errors.BadReply, match="no user"):
        Usage.parse({"bytes": Variant("t", 7)})
    with pytest.raises(errors.BadReply, match="size"):
        RecoveredBuffer.parse({"size": Variant("s", "7")})
    kept = RecoveredBuffer.parse({"inode": Variant("t", 9), "action": Variant("s", "kept")})
    assert (kept.id, kept.as_dict()) == (None, {"inode": 9, "action": "kept"})


def test_the_rows_of_devices_and_allocators_have_the_keys_of_the_contract() -> None:
    python: dict[str, Any] = {
        "t": int,
        "u": int,
        "s": str,
        "b": bool,
        "as": tuple[str, ...],
        "a{ss}": dict[str, str],
        "a{sv}": dict[str, Any],
    }
    for cls, types, always in (
        (Verdict, contract.VERDICT_TYPES, set(contract.VERDICT_TYPES)),
        (AttachmentInfo, contract.ATTACHMENT_TYPES, set(contract.ATTACHMENT_TYPES)),
        (DeviceInfo, contract.DEVICE_TYPES, {"device", "constraints", "sources"}),
        (AllocatorInfo, contract.ALLOCATOR_TYPES, {"allocator", "sources"}),
    ):
        expected = {key: python[known] if key in always else python[known] | None for key, known in types.items()}
        assert get_type_hints(cls) == expected


@pytest.mark.parametrize(
    ("cache", "caches", "obtainable"),
    [
        ("cached", ["cached", "uncached", "write-combine"], ("cached", "uncached", "write-combine")),
        ("write-combine", ["cached", "write-combine"], ("write-combine", "cached")),
        ("uncached", None, ("uncached",)),
        (None, None, ()),
    ],
)
def test_an_allocator_tells_every_cache_attribute_the_usual_one_first(
    cache: str | None, caches: list[str] | None, obtainable: tuple[str, ...]
) -> None:
    told: dict[str, Any] = {"allocator": "udmabuf", "cache": cache, "caches": caches}
    row = {key: value for key, value in told.items() if value is not None}
    allocator = AllocatorInfo.parse({key: Variant(contract.ALLOCATOR_TYPES[key], value) for key, value in row.items()})
    assert allocator.obtainable == obtainable
    assert allocator.caches == (None if caches is None else tuple(caches))
    assert allocator.as_dict() == row
    hash(allocator.caches)


def test_a_verdict_is_read_as_it_is_sent() -> None:
    ok = Verdict.parse({"allocator": Variant("s", "udmabuf"), "ok": Variant("b", True)})
    assert ok == Verdict(allocator="udmabuf", ok=True)
    assert ok.as_dict() == {"allocator": "udmabuf", "ok": True}
    texts = {key: Variant("s", f"the {key}") for key in ("allocator", "field", "device", "reason", "remedy")}
    refused = Verdict.parse({**texts, "ok": Variant("b", False), "newer": Variant("u", 1)})
    assert (refused.ok, refused.field, refused.remedy) == (False, "the field", "the remedy")
    mapped = {key: Variant("s", f"the {key}") for key in ("allocator", "cache_effective", "cache_evidence")}
    mapped["ok"] = Variant("b", True)
    suits = Verdict.parse(mapped)
    assert (suits.cache_effective, suits.cache_evidence) == ("the cache_effective", "the cache_evidence")
    assert suits.as_dict() == {key: value.value for key, value in mapped.items()}
    for lacking in ("allocator", "ok"):
        with pytest.raises(errors.BadReply, match=f"Explain: a row has no {lacking}"):
            Verdict.parse({key: value for key, value in {**texts, "ok": Variant("b", True)}.items() if key != lacking})
    with pytest.raises(errors.BadReply, match="ok: .*type s"):
        Verdict.parse({**texts, "ok": Variant("s", "yes")})


def test_constraints_in_rows_are_plain_and_checked() -> None:
    row = {
        "device": Variant("s", "/dev/video0"),
        "dma_mask_bits": Variant("u", 32),
        "constraints": Variant("a{sv}", {"cache": Variant("as", ["cached"]), "alignment": Variant("t", 64)}),
        "sources": Variant("a{ss}", {"alignment": "a page"}),
    }
    known = DeviceInfo.parse(row)
    assert list(known.constraints.items()) == [("alignment", 64), ("cache", ["cached"])], "the contract's order"
    assert (known.sources, known.driver) == ({"alignment": "a page"}, None)
    assert list(known.as_dict()) == ["device", "dma_mask_bits", "constraints", "sources"]
    with pytest.raises(errors.BadReply, match="alignment: .*type u"):
        DeviceInfo.parse(row | {"constraints": Variant("a{sv}", {"alignment": Variant("u", 64)})})
    with pytest.raises(errors.BadReply, match="constraints: .*type as"):
        DeviceInfo.parse(row | {"constraints": Variant("as", [])})
    with pytest.raises(errors.BadReply, match="ListDevices: a row has no device"):
        DeviceInfo.parse({})
    with pytest.raises(errors.BadReply, match="ListAllocators: a row has no allocator"):
        AllocatorInfo.parse({"free": Variant("t", 1)})
    assert AllocatorInfo.parse({"allocator": Variant("s", "memfd"), "free": Variant("t", 0)}).as_dict() == {
        "allocator": "memfd",
        "free": 0,
    }


def test_properties_of_a_buffer_are_typed_to_the_last_row() -> None:
    row = {"attachment": Variant("u", 3), "device": Variant("s", "mem:null"), "own": Variant("b", True)}
    told = parse_properties(
        BUFFER_INTERFACE,
        {
            "Constraints": Variant("a{sv}", {"contiguous": Variant("b", True)}),
            "Attachments": Variant("aa{sv}", [row]),
        },
    )
    assert told == {
        "Constraints": {"contiguous": True},
        "Attachments": (AttachmentInfo(attachment=3, device="mem:null", own=True),),
    }
    assert told["Attachments"][0].number == 3
    with pytest.raises(errors.BadReply, match="no attachment"):
        parse_properties(BUFFER_INTERFACE, {"Attachments": Variant("aa{sv}", [{}])})
    with pytest.raises(errors.BadReply, match="pins"):
        parse_properties(BUFFER_INTERFACE, {"Attachments": Variant("aa{sv}", [{**row, "pins": Variant("t", 1)}])})


def test_every_limit_of_the_interface_is_a_field() -> None:
    names = [name for name in interface(ALLOCATOR_INTERFACE).properties if name.startswith(("Max", "CallWindow"))]
    limits = Limits.from_properties({name: number for number, name in enumerate(names)})
    assert dataclasses.astuple(limits) == tuple(range(len(names)))


def test_the_xml_is_read_as_it_is_written() -> None:
    allocator = interface(ALLOCATOR_INTERFACE)
    assert allocator.methods["AllocateMany"].in_signature == "a{sv}u"
    assert allocator.methods["AllocateMany"].out_signature == "aoahaa{sv}"
    assert allocator.properties["MaxBufferSize"].signature == "t"
    assert all(known.doc for known in allocator.properties.values())
    assert interface("org.freedesktop.DBus.Properties").signals == {"PropertiesChanged": "sa{sv}as"}


def test_both_clients_have_the_same_verbs() -> None:
    pairs: tuple[tuple[type, type], ...] = (
        (aio.Client, sync.Client),
        (aio.Buffer, sync.Buffer),
        (aio.Attachment, sync.Attachment),
    )
    pairs += (aio.Move, sync.Move), (aio.MoveStream, sync.MoveStream)
    for one, other in pairs:
        verbs = {name for name in dir(one) if not name.startswith("_")}
        assert verbs == {name for name in dir(other) if not name.startswith("_")}
        for name in verbs:
            in_one, in_other = getattr(one, name), getattr(other, name)
            if name == "connect" or isinstance(in_one, property):
                continue
            assert list(inspect.signature(in_one).parameters) == list(inspect.signature(in_other).parameters), name


@pytest.mark.parametrize(
    ("spec", "key", "why"),
    [
        ({"colour": 1}, "colour", "no such key"),
        ({"size": "4096"}, "size", "integer of 64 bits, not str"),
        ({"size": 1.5}, "size", "not float"),
        ({"size": True}, "size", "not bool"),
        ({"size": -1}, "size", "outside"),
        ({"size": 1 << 64}, "size", "outside"),
        ({"width": 1 << 32}, "width", "outside"),
        ({"format": b"XR24"}, "format", "string, not bytes"),
        ({"name": "a\0b"}, "name", "character"),
        ({"name": "\udcff"}, "name", "character"),
        ({"devices": "/dev/video0"}, "devices", "list of strings, not str"),
        ({"devices": 5}, "devices", "list of strings, not int"),
        ({"devices": ["mem:null", 5]}, r"devices\[1\]", "string, not int"),
        ({"devices": ["a\0b"]}, r"devices\[0\]", "character"),
        ({"constraints": [("alignment", 4)]}, "constraints", "mapping of keys to values, not list"),
        ({"constraints": {"colour": 1}}, "constraints.colour", "no such key; there are address_bits, alignment"),
        ({"constraints": {"alignment": "64"}}, "constraints.alignment", "integer of 64 bits, not str"),
        ({"constraints": {"alignment": -1}}, "constraints.alignment", "outside"),
        ({"constraints": {"max_segments": 1 << 32}}, "constraints.max_segments", "outside"),
        ({"constraints": {"contiguous": 1}}, "constraints.contiguous", "bool, not int"),
        ({"constraints": {"cache": "cached"}}, "constraints.cache", "list of strings, not str"),
        ({"constraints": {"allocators": [3]}}, r"constraints.allocators\[0\]", "string, not int"),
        ({"constraints": {1: 2}}, "constraints.1", "no such key"),
    ],
)
def test_a_bad_spec_is_refused_before_it_is_sent_and_names_the_key(spec: dict[str, Any], key: str, why: str) -> None:
    for given, keywords in ((spec, {}), ({}, spec)):
        with pytest.raises(errors.InvalidSpec, match=rf"^{key}: .*{why}"):
            marshal_spec(given, keywords)


def test_a_good_spec_gets_its_types() -> None:
    class FromNumpy:
        def __index__(self) -> int:
            return 640

    marshalled = marshal_spec({"width": FromNumpy(), "name": None}, {"kind": contract.Kind.MEMFD, "height": 480})
    assert {key: (value.signature, value.value) for key, value in marshalled.items()} == {
        "width": ("u", 640),
        "kind": ("s", "memfd"),
        "height": ("u", 480),
    }
    assert type(marshalled["kind"].value) is str
    with pytest.raises(errors.InvalidSpec, match="size: given twice"):
        marshal_spec({"size": 1}, {"size": 1})
    given: dict[str, Any] = {"alignment": FromNumpy(), "max_segments": 1, "contiguous": True, "address_bits": None}
    heaps = [f"heap:h{number}" for number in range(8)]
    given |= {"cache": (contract.Cache.WRITE_COMBINE, "cached"), "allocators": set(heaps)}
    for constraints in (
        marshal_spec({"constraints": given}, {})["constraints"],
        marshal_attach(constraints=given, dynamic=None)["constraints"],
        marshal_wrap(constraints=given, devices=None)["constraints"],
    ):
        assert constraints.signature == "a{sv}"
        assert {key: (value.signature, value.value) for key, value in constraints.value.items()} == {
            "alignment": ("t", 640),
            "max_segments": ("u", 1),
            "contiguous": ("b", True),
            "cache": ("as", ["write-combine", "cached"]),
            # A set has no order of its own: the same request is the same message.
            "allocators": ("as", heaps),
        }
        assert {type(item) for item in constraints.value["cache"].value} == {str}
    devices = marshal_spec({"devices": ("/dev/video0", "mem:null")}, {})["devices"]
    assert (devices.signature, devices.value) == ("as", ["/dev/video0", "mem:null"])
    assert marshal_attach(dynamic=True)["dynamic"].signature == "b"
    # Whole, as it travels.
    message = Message(MessageType.METHOD_CALL, path="/", member="M", signature="a{sv}")
    message.body = [marshal_spec({"constraints": given, "devices": []}, {})]
    assert encode(message)
    with pytest.raises(errors.InvalidSpec, match="^count"):
        check_count("4")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"size": Variant("u", 4096)}, "size: .*type u"),
        ({"name": "bare"}, "name: .*type str"),
        ({"offsets": Variant("at", [0]), "strides": Variant("at", [])}, "offsets, strides"),
        ({"size": Variant("t", 8), "offsets": Variant("at", [8]), "strides": Variant("at", [4])}, "outside"),
        ({"size": Variant("t", 8), "offsets": Variant("at", [4, 0]), "strides": Variant("at", [4, 4])}, "order"),
    ],
)
def test_an_info_that_is_not_the_interfaces_is_refused(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(errors.BadReply, match=why):
        BufferInfo.parse(raw)


def test_keys_of_a_newer_service_are_passed_over() -> None:
    assert BufferInfo.parse({"size": Variant("t", 1), "tiling": Variant("s", "x")}) == BufferInfo(size=1)
    assert parse_properties(BUFFER_INTERFACE, {"Mood": Variant("s", "x")}) == {}


def test_a_listed_buffer_needs_its_path() -> None:
    with pytest.raises(errors.BadReply, match="no buffer"):
        ListedBuffer.parse({"size": Variant("t", 1)})


def test_a_share_believes_signals_that_came_with_the_reply() -> None:
    share = Share(contract.buffer_path("0" * 16), BufferInfo(size=4096))
    assert share.state == contract.State.EMPTY
    share.told_properties({"State": "empty", "Name": "first", "Serial": 0, "Allocator": ""})
    assert (share.info.name, share.info.serial, share.info.allocator) == ("first", None, None)
    share.expect()
    share.told_properties({"Name": "second"})
    share.told_info(BufferInfo(size=4096, serial=1, name="first", allocator="memfd"))
    assert (share.state, share.info.name, share.info.serial) == (contract.State.BACKED, "second", 1)
    share.told_properties({"State": "as yet unthought of"})
    assert share.state == "as yet unthought of"


def test_other_memory_has_another_inode() -> None:
    share = Share(contract.buffer_path("0" * 16), BufferInfo(size=4096, serial=1, inode=77))
    share.told_properties({"Serial": 1, "State": "moving"})
    moving = share.info
    share.told_properties({"Serial": 2, "State": "backed"})
    assert (moving.inode, share.info.serial, share.info.inode) == (77, 2, None)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=paths())
    return set(run.stdout.split())


def paths() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": ":".join(sys.path)}


def test_the_contract_brings_in_nothing_else() -> None:
    loaded = loaded_by("import udmabufd_client.contract")
    assert {name for name in loaded if name.startswith("udmabufd_")} == {"udmabufd_client", "udmabufd_client.contract"}
    assert not loaded & {"asyncio", "dbus_next", "dbus_fast", "mmap", "numpy"}


def test_names_of_the_package_come_when_they_are_used() -> None:
    assert udmabufd_client.Client is sync.Client
    assert udmabufd_client.aio is aio
    assert set(udmabufd_client.__all__) <= set(dir(udmabufd_client))
    for name in udmabufd_client.__all__:
        assert getattr(udmabufd_client, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = udmabufd_client.Nonsense
