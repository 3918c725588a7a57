# SPDX-License-Identifier: MIT
"""Constraints and attachments as a foreign program puts them on the bus, and devices that the tests make up.

What the service should think of them is left to the tests. Plain values go in and come out.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.bus.peer import Peer, error, plain, spec
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ALLOCATOR_INTERFACE, ATTACH_TYPES, CONSTRAINT_TYPES, GET_FD_TYPES

DROP_INS: Final = Path("/run/udmabufd/devices.d")


def demands(**values: Any) -> dict[str, Variant]:
    """Return constraints with the types of the contract."""
    return {key: Variant(CONSTRAINT_TYPES[key], value) for key, value in values.items()}


async def create(peer: Peer, **values: Any) -> str:
    """Create a buffer without memory; return its path."""
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(**values))
    return str(path)


async def share(owner: Peer, path: str, *others: Peer) -> None:
    """Make the others holders, by ticket."""
    (ticket,) = await owner.call("GetTicket", path=path)
    for other in others:
        assert (await other.call("ImportTicket", "s", ticket))[0] == path


async def attach(
    peer: Peer, path: str, device: str, *, dynamic: bool | None = None, **values: Any
) -> tuple[int, dict[str, Any]]:
    """Attach a device that demands `values` beside what is known of it; return number and merged constraints."""
    options = {} if dynamic is None else {"dynamic": Variant(ATTACH_TYPES["dynamic"], dynamic)}
    if values:
        options["constraints"] = Variant(ATTACH_TYPES["constraints"], demands(**values))
    number, merged = await peer.call("Attach", "sa{sv}", device, options, path=path)
    return number, plain(merged)


async def detach(peer: Peer, path: str, number: int) -> None:
    """End an attachment."""
    await peer.call("Detach", "u", number, path=path)


async def get_fd(peer: Peer, path: str, attachment: int | None = None) -> tuple[OwnedFd, dict[str, Any]]:
    """Get a descriptor, for an attachment if one is given, and info as plain values."""
    options = {} if attachment is None else {"attachment": Variant(GET_FD_TYPES["attachment"], attachment)}
    fd, info = await peer.call("GetFd", "a{sv}", options, path=path)
    return fd, plain(info)


async def release(peer: Peer, path: str, *fds: OwnedFd) -> None:
    """Give back the share and the descriptors."""
    for fd in fds:
        fd.close()
    await peer.call("Release", path=path)


async def attachments(peer: Peer, path: str) -> list[dict[str, Any]]:
    """Return the rows of the property, by number."""
    return sorted(map(plain, await peer.get("Attachments", path=path)), key=lambda row: row["attachment"])


async def numbers(peer: Peer, path: str) -> list[int]:
    """Return the numbers of the attachments that there are."""
    return [row["attachment"] for row in await attachments(peer, path)]


async def constraints(peer: Peer, path: str) -> dict[str, Any]:
    """Return what all that are attached demand together."""
    return plain(await peer.get("Constraints", path=path))


async def explain(peer: Peer, **values: Any) -> list[dict[str, Any]]:
    """Return the verdicts on a spec, in their order."""
    (verdicts,) = await peer.call("Explain", "a{sv}", spec(**values), interface=ALLOCATOR_INTERFACE)
    return [plain(row) for row in verdicts]


async def allocators(peer: Peer) -> list[dict[str, Any]]:
    """Return the rows of ListAllocators."""
    (rows,) = await peer.call("ListAllocators")
    return [plain(row) for row in rows]


@contextmanager
def refused(*names: str, field: str = "", devices: tuple[str, ...] = ()) -> Iterator[None]:
    """Expect one of these errors, with `field` and each of `devices` in its text."""
    with pytest.raises(RemoteError) as caught:
        yield
    assert caught.value.name in {error(name) for name in names}, caught.value
    text = str(caught.value).removeprefix(f"{caught.value.name}: ")
    assert text.startswith(f"{field}: " if field else ""), text
    for device in devices:
        assert device in text, text


def detached(peer: Peer, path: str) -> list[int]:
    """Return the attachments of which the service has told this peer that they have ended, in that order."""
    return [body[0] for header, body in peer.signals if (header.member, header.path) == ("Detached", path)]


@contextmanager
def made_up(devices: Mapping[str, Mapping[str, object]]) -> Iterator[None]:
    """Have the database say of devices of the subsystem mem (/dev/null and its like, which do no DMA) what they need.

    For services that start while it lasts.
    """
    entries = []
    for name, values in devices.items():
        entries += ["[[device]]", f'match = {{subsystem = "mem", name = "{name}"}}', 'source = "made up by a test"']
        entries += ["[device.constraints]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    DROP_INS.mkdir(parents=True, exist_ok=True)
    file = DROP_INS / "made-up.toml"
    file.write_text("\n".join(entries) + "\n")
    try:
        yield
    finally:
        file.unlink()


def modprobe(*arguments: str) -> None:
    """Load or remove a module, and wait until udev has done with it."""
    subprocess.run(["modprobe", *arguments], check=True)
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)
