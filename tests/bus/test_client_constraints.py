# SPDX-License-Identifier: MIT
"""Constraints and attachments through the client against the daemon: what is merged, refused, explained and shown.

Where the service has no dma-bufs, which alone are attached, memfds show the same constraints.
"""

from __future__ import annotations

import json
import mmap
import os
import pwd
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.bus.service import RunningService
from udmabufd_client import Verdict, aio, errors, sync
from udmabufd_client.contract import ALLOCATOR_TYPES, CONSTRAINT_KEYS, DEVICE_TYPES, State

PAGE = mmap.PAGESIZE

DEVICES = ("mem:null", "mem:zero")
"""Two that every machine has; nothing is known of what they need."""


@pytest.fixture
async def client(service: RunningService) -> AsyncIterator[aio.Client]:
    async with aio.Client.connect(service.address, timeout=60) as client:
        yield client


@pytest.fixture
async def friend(service: RunningService) -> AsyncIterator[aio.Client]:
    async with aio.Client.connect(service.address, timeout=60) as client:
        yield client


@pytest.fixture
def blocking(service: RunningService) -> Iterator[sync.Client]:
    with sync.Client.connect(service.address, timeout=60) as client:
        yield client


def first(verdicts: list[Verdict]) -> str:
    """Return the name of the first allocator that suits."""
    return next(verdict.allocator for verdict in verdicts if verdict.ok)


async def test_a_layout_obeys_constraints(client: aio.Client, kind: str) -> None:
    constraints = {"stride_alignment": 1536, "height_alignment": 64, "tail_padding": 12345, "size_alignment": 3 * PAGE}
    spec: dict[str, Any] = {"width": 100, "height": 50, "format": "NV12", "kind": kind, "constraints": constraints}
    verdicts = await client.explain(spec)
    with await client.allocate(spec) as buffer:
        assert buffer.info.allocator == first(verdicts)
        assert buffer.constraints == constraints
        assert buffer.attachments == ()
        luma, chroma = buffer.planes
        assert (luma.stride, chroma.stride) == (1536, 1536)
        assert chroma.offset >= 64 * 1536
        assert buffer.size >= chroma.offset + 32 * 1536 + 12345
        assert buffer.size % (3 * PAGE) == 0
        assert os.fstat(buffer.fileno()).st_size == buffer.size


async def test_what_is_asked_for_in_vain_is_explained_by_every_allocator(client: aio.Client, kind: str) -> None:
    # Sixteen bits of address are 64 KiB of memory, which no machine has free there.
    spec: dict[str, Any] = {"size": PAGE, "kind": kind, "constraints": {"address_bits": 16}}
    verdicts = await client.explain(spec)
    assert [verdict.allocator for verdict in verdicts] == [each.allocator for each in await client.allocators()]
    assert not any(verdict.ok for verdict in verdicts)
    assert all(verdict.reason for verdict in verdicts)
    assert ("address_bits", "spec") in {(verdict.field, verdict.device) for verdict in verdicts}
    before = await client.list_buffers()
    with pytest.raises(errors.NoAllocator, match="address_bits"):
        await client.allocate(spec)
    with pytest.raises(errors.NoAllocator, match="address_bits"):
        await client.create(spec)
    assert len(await client.list_buffers()) <= len(before)


@pytest.mark.parametrize(
    ("constraints", "why"),
    [
        ({"alignment": 0}, r"constraints\.alignment"),
        ({"segment_boundary": 3 * PAGE}, r"constraints\.segment_boundary"),
        ({"address_bits": 65}, r"constraints\.address_bits"),
        ({"max_segments": 0}, r"constraints\.max_segments"),
        ({"cache": []}, r"constraints\.cache"),
        ({"cache": ["lukewarm"]}, r"constraints\.cache"),
        ({"allocators": ["heap:*", "no such"]}, r"constraints\.allocators"),
    ],
)
async def test_a_constraint_that_makes_no_sense_is_named(
    client: aio.Client, kind: str, constraints: dict[str, Any], why: str
) -> None:
    for verb in (client.allocate, client.create, client.explain):
        with pytest.raises(errors.InvalidSpec, match=why):
            await verb(size=PAGE, kind=kind, constraints=constraints)


async def test_attachments_are_merged_and_end(client: aio.Client, friend: aio.Client, kind: str) -> None:
    null, zero = DEVICES
    with await client.create(size=PAGE, kind=kind, constraints={"size_alignment": 2 * PAGE}) as buffer:
        assert buffer.constraints == {"size_alignment": 2 * PAGE}
        if kind == "memfd":
            with pytest.raises(errors.NotSupported, match="memfd"):
                await buffer.attach(null)
            assert (buffer.attachments, buffer.own_attachments) == ((), ())
            return
        with await friend.import_ticket(await buffer.get_ticket()) as other:
            one = await buffer.attach(null, {"size_alignment": 3 * PAGE, "cache": ["cached", "uncached"]})
            two = await other.attach(zero, {"cache": ["cached"]})
            # Behind the signal, on the same connection.
            await client.list_buffers()
            assert (buffer.attachments, buffer.constraints) == (None, two.constraints)
            assert dict(two.constraints) == {"size_alignment": 6 * PAGE, "cache": ["cached"]}
            # The signal to the first holder was sent before this answer.
            await buffer.refresh()
            assert buffer.constraints == other.constraints == two.constraints
            assert buffer.attachments is not None
            assert [(row.number, row.device, row.own) for row in buffer.attachments] == [
                (1, null, True),
                (2, zero, False),
            ]
            with pytest.raises(errors.IncompatibleConstraints) as raised:
                await other.attach(zero, {"cache": ["write-combine"]})
            assert "cache" in str(raised.value)
            assert null in str(raised.value)
            assert zero in str(raised.value)
            with pytest.raises(errors.NoAllocator, match="address_bits"):
                await buffer.attach(null, {"address_bits": 16})
            with pytest.raises(errors.InvalidSpec, match=r"constraints\.alignment"):
                await buffer.attach(null, {"alignment": 0})
            with pytest.raises(errors.InvalidSpec, match="attachment"):
                await buffer.get_fd(attachment=two.number)
            assert other.state == State.EMPTY
            await buffer.get_fd(attachment=one)
            await other.get_fd(attachment=two)
            assert os.fstat(buffer.fileno()).st_ino == os.fstat(other.fileno()).st_ino
            assert buffer.size % (6 * PAGE) == 0
            with pytest.raises(errors.Busy):
                await other.attach(zero, {"size_alignment": 5 * PAGE})
            await two.detach()
            await buffer.refresh()
            assert buffer.constraints == {"size_alignment": 6 * PAGE, "cache": ["cached", "uncached"]}
            assert [row.number for row in buffer.attachments or ()] == [1]
            buffer.close()
            # Behind the release on the same connection.
            await client.list_buffers()
            await other.refresh()
            assert (one.ended, other.attachments, other.constraints) == (True, (), {"size_alignment": 2 * PAGE})


async def test_devices_that_nobody_knows_are_refused(client: aio.Client, kind: str) -> None:
    if kind == "memfd":
        with pytest.raises(errors.InvalidSpec, match="devices"):
            await client.allocate(size=PAGE, kind=kind, devices=["mem:null"])
        return
    for device, cls in (
        ("/dev/no-such-node", errors.NoSuchDevice),
        ("mem:no-such-device", errors.NoSuchDevice),
        ("relative/path", errors.InvalidSpec),
        ("", errors.InvalidSpec),
    ):
        with pytest.raises(cls):
            await client.allocate(size=PAGE, devices=["mem:null", device])
        with await client.create(size=PAGE) as buffer:
            with pytest.raises(cls):
                await buffer.attach(device)
            assert buffer.own_attachments == ()


async def test_devices_of_a_spec_are_the_callers_attachments(client: aio.Client, kind: str) -> None:
    if kind == "memfd":
        # Of the decision alone: there is no dma-buf to be had.
        assert not any(verdict.ok for verdict in await client.explain(size=PAGE, devices=DEVICES))
        return
    for buffer in (
        await client.allocate(size=PAGE, devices=DEVICES),
        await client.create(size=PAGE, devices=DEVICES),
        *await client.allocate_many(2, size=PAGE, devices=DEVICES),
    ):
        assert [(each.number, each.device) for each in buffer.own_attachments] == [(1, DEVICES[0]), (2, DEVICES[1])]
        rows = buffer.attachments
        await buffer.refresh()
        assert buffer.attachments == rows
        assert [row.own for row in rows or ()] == [True, True]
        await buffer.own_attachments[0].detach()
        third = await buffer.attach(DEVICES[0])
        assert (third.number, buffer.attachments) == (3, None)
        await buffer.refresh()
        assert [(row.number, row.device) for row in buffer.attachments or ()] == [(2, DEVICES[1]), (3, DEVICES[0])]
        buffer.close()


async def test_what_the_machine_has_is_told_with_its_sources(client: aio.Client) -> None:
    allocators = await client.allocators()
    assert {each.allocator for each in allocators if each.available} == set((await client.properties())["Allocators"])
    for allocator in allocators:
        assert set(allocator.sources) <= set(ALLOCATOR_TYPES)
        assert allocator.available or allocator.reason
    for device in await client.devices():
        assert set(device.as_dict()) <= set(DEVICE_TYPES)
        assert set(device.constraints) <= set(CONSTRAINT_KEYS)
        assert set(device.sources) <= set(CONSTRAINT_KEYS) | set(DEVICE_TYPES)


def test_the_blocking_client_has_them_too(blocking: sync.Client) -> None:
    kind = "dma-buf" if blocking.properties()["UdmabufAvailable"] else "memfd"
    verdicts = blocking.explain(size=PAGE, kind=kind, constraints={"size_alignment": 2 * PAGE})
    with blocking.allocate(size=PAGE, kind=kind, constraints={"size_alignment": 2 * PAGE}) as buffer:
        assert (buffer.info.allocator, buffer.size) == (first(verdicts), 2 * PAGE)
        if kind == "dma-buf":
            with buffer.attach("mem:null") as attachment:
                buffer.refresh()
                assert [row.device for row in buffer.attachments or ()] == ["mem:null"]
                assert buffer.get_fd(attachment=attachment) == buffer.fileno()
            assert attachment.ended
        else:
            with pytest.raises(errors.NotSupported):
                buffer.attach("mem:null")


Ctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ctl(service: RunningService) -> Ctl:
    """Run udmabufctl and return what it said."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "udmabufd_client.cli", "--bus", service.address, "--timeout", "60", *words]
        environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    return run


@contextmanager
def pretender(buffer_id: str) -> Iterator[None]:
    """Have another user's process answer in the place of a holder."""
    program = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("\\0udmabufctl/" + sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    while True:
        with listener.accept()[0] as peer:
            peer.sendall(b'{"constraints": {"alignment": 1}}\\n')
            peer.recv(100)
"""
    nobody = pwd.getpwnam("nobody")
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program, buffer_id],
        stdout=subprocess.PIPE,
        cwd="/",
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            process.kill()


def test_udmabufctl_decides_as_the_service_does(ctl: Ctl, blocking: sync.Client) -> None:
    kind = "dma-buf" if blocking.properties()["UdmabufAvailable"] else "memfd"
    wanted = ["--kind", kind, "--size", "64K", "--constraint", "size-alignment=128K"]
    explained = ctl("explain", *wanted, "--json")
    assert explained.returncode == 0, explained.stderr
    suiting = [row["allocator"] for row in json.loads(explained.stdout) if row["ok"]]
    got = ctl("alloc", *wanted, "--json")
    shown = json.loads(got.stdout)
    assert (shown["allocator"], shown["size"]) == (suiting[0], 128 << 10)
    assert shown["constraints"] == {"size_alignment": 128 << 10}
    assert f"*  {suiting[0]} " in ctl("explain", *wanted).stdout
    refused = ctl("explain", *wanted, "--constraint", "address_bits=16")
    assert (refused.returncode, refused.stderr) == (1, "")
    assert refused.stdout.endswith("No allocator suits.\n")
    wrong = ctl("explain", *wanted, "--constraint", "max_segments=0")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("udmabufctl: constraints.max_segments: ")
    for verb in ("devices", "allocators"):
        assert ctl(verb).returncode == 0
        assert isinstance(json.loads(ctl(verb, "--json").stdout), list)


def test_info_shows_what_a_holder_knows(ctl: Ctl, blocking: sync.Client) -> None:
    kind = "dma-buf" if blocking.properties()["UdmabufAvailable"] else "memfd"
    devices = ["--device", "mem:null", "--device", "mem:zero"] if kind == "dma-buf" else []
    words = ["--kind", kind, "--size", "64K", "--constraint", "size-alignment=128K", *devices]
    held = json.loads(ctl("alloc", *words, "--background", "--json").stdout)
    try:
        shown = json.loads(ctl("info", held["id"], "--json").stdout)
        assert held["constraints"] == shown["constraints"] == {"size_alignment": 128 << 10}
        assert [row["device"] for row in shown.get("attachments", [])] == devices[1::2]
        text = ctl("info", held["id"]).stdout
        assert "size_alignment 128 KiB" in text
        if devices:
            assert "1: mem:null, 2: mem:zero\n" in text
    finally:
        assert ctl("release", held["id"]).returncode == 0
    with blocking.allocate(size=PAGE, kind=kind, constraints={"size_alignment": 2 * PAGE}) as other:
        # Nobody is there to be asked.
        assert "constraints" not in json.loads(ctl("info", other.id, "--json").stdout)
        if os.geteuid() == 0:
            # Another user's process of that name could tell root anything.
            with pretender(other.id):
                run = ctl("info", other.id, "--json")
            assert (run.returncode, "constraints" in json.loads(run.stdout)) == (0, False)
