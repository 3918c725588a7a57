# SPDX-License-Identifier: MIT
"""The client library against the daemon where memory really moves: contents, descriptors and who is waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.bus.service import RunningService
from udmabufd_client import Attachment, Buffer, Client, errors
from udmabufd_client.contract import Kind, State

pytestmark = pytest.mark.guest

SIZE = 2 << 20
PATTERN = np.random.default_rng(6).integers(0, 256, SIZE, dtype=np.uint8)
NULL, ZERO = "mem:null", "mem:zero"


@pytest.fixture
def client(service: RunningService) -> Iterator[Client]:
    with Client.connect(service.address, timeout=60) as client:
        yield client


@pytest.fixture
def friend(service: RunningService) -> Iterator[Client]:
    with Client.connect(service.address, timeout=60) as client:
        yield client


def written(client: Client) -> Buffer:
    """Return a buffer that holds PATTERN, which one dynamic importer uses."""
    buffer = client.allocate(size=SIZE, name="moving")
    buffer.attach(NULL, dynamic=True)
    with buffer.cpu_access(read=False) as view:
        view[:] = PATTERN.data
    return buffer


def theirs(friend: Client, buffer: Buffer) -> tuple[Buffer, Attachment]:
    """Return the buffer as another program has it, with a descriptor and a dynamic importer of its own."""
    other = friend.import_ticket(buffer.get_ticket())
    attachment = other.attach(ZERO, dynamic=True)
    other.get_fd(attachment=attachment)
    return other, attachment


def content(buffer: Buffer) -> bytes:
    with buffer.cpu_access(write=False) as view:
        return bytes(view)


def inode(buffer: Buffer) -> int:
    return os.fstat(buffer.fileno()).st_ino


def elsewhere(client: Client, buffer: Buffer) -> str | None:
    """Return an allocator that the buffer can be moved to, and is not of; None: to the same once more."""
    for allocator in client.allocators():
        if allocator.available and allocator.kind == Kind.DMA_BUF and allocator.allocator != buffer.info.allocator:
            verdicts = client.explain(size=SIZE, allocator=allocator.allocator)
            if any(verdict.ok and verdict.allocator == allocator.allocator for verdict in verdicts):
                return allocator.allocator
    return None


def test_two_programs_go_on_when_one_moves_the_buffer(client: Client, friend: Client) -> None:
    with written(client) as buffer:
        other, _ = theirs(friend, buffer)
        with other:
            before = inode(buffer)
            assert inode(other) == before
            assert buffer.move(elsewhere(client, buffer)) == 2
            assert inode(buffer) != before
            assert content(other) == content(buffer) == PATTERN.tobytes()
            assert (inode(other), other.info.serial) == (inode(buffer), 2)
            # Back again, and this time the other one asks.
            assert other.move("udmabuf") == 3
            with buffer.cpu_access() as view:
                view[:4] = b"last"
            assert content(other)[:4] == b"last"
            assert buffer.info.allocator == other.info.allocator == "udmabuf"


def test_a_map_of_another_program_is_waited_for(client: Client, friend: Client) -> None:
    with written(client) as buffer:
        other, _ = theirs(friend, buffer)
        with other:
            mapped = other.map()
            moving = threading.Thread(target=buffer.move)
            moving.start()
            moving.join(0.5)
            assert moving.is_alive()
            mapped.view[:4] = b"last"
            mapped.close()
            moving.join(60)
            assert not moving.is_alive()
            assert content(buffer)[:4] == b"last"
            assert content(other)[4:] == PATTERN.tobytes()[4:]


def test_what_is_pinned_stays(client: Client, friend: Client) -> None:
    with written(client) as buffer:
        other, attachment = theirs(friend, buffer)
        with other:
            with attachment.pinned():
                for verb in (buffer.move, buffer.evict):
                    with pytest.raises(errors.Busy, match="pinned"):
                        verb()
                assert content(buffer) == PATTERN.tobytes()
            buffer.move()
            assert content(other) == PATTERN.tobytes()


def test_a_descriptor_that_nobody_answers_for_stays(client: Client, friend: Client) -> None:
    with written(client) as buffer, friend.import_fd(buffer) as plain:
        with pytest.raises(errors.Busy, match="dynamic"):
            buffer.move()
        with plain.map():
            plain.attach(ZERO, dynamic=True)
        buffer.move()
        assert content(plain) == PATTERN.tobytes()
        assert inode(plain) == inode(buffer)


def test_an_evicted_buffer_comes_back_for_both(client: Client, friend: Client) -> None:
    with written(client) as buffer:
        other, _ = theirs(friend, buffer)
        with other:
            for ask, serial in ((buffer.evict, 2), (other.evict, 3)):
                ask()
                assert (buffer.state, buffer.has_fd, other.has_fd) == (State.EVICTED, False, False)
                assert content(other) == PATTERN.tobytes()
                assert content(buffer) == PATTERN.tobytes()
                assert (inode(buffer), buffer.info.serial) == (inode(other), serial)
            with buffer.map():
                with pytest.raises((errors.Busy, errors.MoveTimedOut)):
                    other.evict()
                assert content(other) == PATTERN.tobytes()
            held = other.dup()
            with pytest.raises(errors.Busy):
                buffer.evict()
            os.close(held)
            assert content(buffer) == content(other) == PATTERN.tobytes()


def test_one_who_attaches_and_does_not_fit_moves_it(client: Client, friend: Client) -> None:
    with written(client) as buffer:
        other, _ = theirs(friend, buffer)
        with other:
            target = elsewhere(client, buffer)
            if target is None:
                pytest.fail("the guest has one allocator of dma-bufs only")
            other.attach(NULL, {"allocators": [target]}, dynamic=True)
            assert buffer.info.allocator == target
            assert content(other) == content(buffer) == PATTERN.tobytes()
            assert inode(buffer) == inode(other)
