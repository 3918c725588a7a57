# SPDX-License-Identifier: MIT
"""The client library against the daemon: every verb of both clients, shares, signals, threads, forks and ends."""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.bus.service import RunningService
from udmabufd_base.fd import OwnedFd
from udmabufd_client import ListedBuffer, Usage, aio, errors, new_request_id, sync, wrappable_memfd
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE, State
from udmabufd_client.integrations import linux_dmabuf_planes, plane_array

PAGE = mmap.PAGESIZE


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


async def ids(client: aio.Client) -> set[str]:
    """The buffers that somebody holds: what is given back lingers until its descriptors are closed."""
    return held(await client.list_buffers())


def held(buffers: list[ListedBuffer]) -> set[str]:
    return {listed.id for listed in buffers if listed.state != State.LINGERING}


async def test_a_picture_is_allocated_drawn_and_given_back(client: aio.Client, kind: str) -> None:
    async with await client.allocate(width=100, height=50, format="NV12", kind=kind, name="picture") as buffer:
        assert (buffer.name, buffer.state, buffer.info.kind) == ("picture", State.BACKED, kind)
        assert os.lseek(buffer.fileno(), 0, os.SEEK_END) == buffer.size
        luma, chroma = buffer.planes
        assert luma.stride >= 100
        assert chroma.offset >= 50 * luma.stride
        with buffer.cpu_access(read=False) as view:
            plane_array(view, luma, (50, 100))[:] = 16
            plane_array(view, chroma, (25, 50, 2))[:] = (90, 240)
        with buffer.cpu_access(write=False) as view:
            assert view[luma.stride * 49 + 99] == 16
            assert view[luma.stride * 49 + 100] == 0
            assert bytes(view[chroma.offset : chroma.offset + 4]) == bytes([90, 240, 90, 240])
        assert [plane.fd for plane in linux_dmabuf_planes(buffer)] == [buffer.fileno()] * 2
        assert buffer.id in await ids(client)
    assert buffer.id not in await ids(client)


async def test_a_set_is_allocated_in_one_call(client: aio.Client, kind: str) -> None:
    buffers = await client.allocate_many(MAX_FDS_PER_MESSAGE, {"size": PAGE}, kind=kind)
    assert len({buffer.id for buffer in buffers}) == MAX_FDS_PER_MESSAGE
    assert len({os.fstat(buffer.fileno()).st_ino for buffer in buffers}) == MAX_FDS_PER_MESSAGE
    assert [buffer.info.inode for buffer in buffers] == [os.fstat(buffer.fileno()).st_ino for buffer in buffers]
    for buffer in buffers:
        buffer.close()
    with pytest.raises(errors.InvalidSpec, match="count"):
        await client.allocate_many(MAX_FDS_PER_MESSAGE + 1, size=PAGE, kind=kind)


async def test_two_holders_share_one_buffer_by_ticket(client: aio.Client, friend: aio.Client, kind: str) -> None:
    with await client.create(size=2 * PAGE, kind=kind, name="shared") as buffer:
        assert (buffer.state, buffer.size, buffer.name, buffer.has_fd) == (State.EMPTY, 2 * PAGE, "shared", False)
        with await friend.import_ticket(await buffer.get_ticket()) as other:
            assert (other.path, other.state) == (buffer.path, State.EMPTY)
            await other.get_fd()
            # The signal to the first holder was sent before this answer.
            await buffer.refresh()
            assert (buffer.state, buffer.info.serial) == (State.BACKED, 1)
            await buffer.get_fd()
            with buffer.cpu_access() as mine, other.cpu_access() as theirs:
                mine[PAGE] = 42
                assert theirs[PAGE] == 42
            buffer.close()
            assert other.id in await ids(friend)
            assert next(listed.holders for listed in await friend.list_buffers() if listed.id == other.id) == 1
        assert other.id not in await ids(friend)


async def test_signals_keep_a_holder_fresh(client: aio.Client, friend: aio.Client, kind: str) -> None:
    with (
        await client.create(size=PAGE, kind=kind) as buffer,
        await friend.import_ticket(await buffer.get_ticket()) as other,
    ):
        await other.set_name("renamed")
        await other.get_fd()
        assert (other.name, other.state) == ("renamed", State.BACKED)
        # Any answer comes behind the signals that were sent before it.
        await buffer.get_ticket()
        assert (buffer.name, buffer.state, buffer.info.serial) == ("renamed", State.BACKED, 1)
        assert buffer.info.allocator == other.info.allocator


async def test_one_connection_can_hold_two_shares(client: aio.Client, kind: str) -> None:
    buffer = await client.allocate(size=PAGE, kind=kind)
    again = await client.import_ticket(await buffer.get_ticket())
    buffer.close()
    assert await again.get_ticket()
    await again.set_name("still here")
    again.close()
    assert buffer.id not in await ids(client)


async def test_release_leaves_the_descriptor(client: aio.Client, kind: str) -> None:
    with await client.allocate(size=PAGE, kind=kind) as buffer:
        await buffer.release()
        assert buffer.id not in await ids(client)
        with buffer.cpu_access() as view:
            view[0] = 1
        with pytest.raises(errors.NoSuchBuffer):
            await buffer.get_ticket()


async def test_a_stolen_descriptor_is_replaced(client: aio.Client, kind: str) -> None:
    with await client.allocate(size=PAGE, kind=kind) as buffer:
        stolen = buffer.steal_fd()
        await buffer.get_fd()
        assert os.path.sameopenfile(stolen, buffer.fileno()) or kind == "memfd"
        assert os.fstat(stolen).st_ino == os.fstat(buffer.fileno()).st_ino
        os.close(stolen)
        first, second = await asyncio.gather(buffer.get_fd(), buffer.get_fd())
        assert first == second == buffer.fileno()


@pytest.mark.parametrize(
    ("spec", "cls", "text"),
    [
        ({}, errors.InvalidSpec, "size"),
        ({"size": 0}, errors.InvalidSpec, "size"),
        ({"size": PAGE, "width": 3}, errors.InvalidSpec, "width|size"),
        ({"width": 3, "height": 3, "format": "nope!"}, errors.InvalidSpec, "format"),
        ({"size": PAGE, "name": ""}, errors.InvalidSpec, "name"),
        ({"size": PAGE, "kind": "shm"}, errors.InvalidSpec, "kind"),
    ],
)
async def test_refusals_are_typed(
    client: aio.Client, spec: dict[str, object], cls: type[errors.UdmabufError], text: str
) -> None:
    before = await client.properties()
    for verb in (client.allocate, client.create):
        with pytest.raises(cls, match=text):
            (await verb(spec)).close()
    after = await client.properties()
    # Fewer, where what lingered of other tests was freed meanwhile.
    assert after["Bytes"] <= before["Bytes"]
    assert after["Buffers"] <= before["Buffers"]


async def test_what_only_the_memory_shows_is_refused_with_it(client: aio.Client) -> None:
    with pytest.raises(errors.CacheUnavailable, match="uncached"):
        await client.allocate(size=PAGE, kind="memfd", cache="uncached", cache_policy="require")
    limits = await client.limits()
    assert limits.max_bytes_per_user is not None
    with pytest.raises((errors.QuotaExceeded, errors.NoAllocator, errors.OutOfMemory)):
        await client.allocate(size=limits.max_bytes_per_user + PAGE, kind="memfd")


async def test_a_false_ticket_is_no_such_buffer(client: aio.Client) -> None:
    with pytest.raises(LookupError):
        await client.import_ticket("0" * 32)
    with pytest.raises(errors.InvalidSpec, match="ticket"):
        await client.import_ticket(5)  # type: ignore[arg-type]


async def test_limits_are_those_of_the_properties(client: aio.Client) -> None:
    limits, properties = await client.limits(), await client.properties()
    assert limits.max_buffer_size == properties["MaxBufferSize"]
    assert limits.max_fds_per_message == MAX_FDS_PER_MESSAGE
    assert limits.call_window_usec == properties["CallWindowUSec"]
    assert "memfd" in properties["Allocators"]


async def test_the_end_of_a_client_gives_all_shares_back(
    service: RunningService, friend: aio.Client, kind: str
) -> None:
    async with aio.Client.connect(service.address) as client:
        kept = await client.allocate(size=PAGE, kind=kind)
        assert kept.id in await ids(friend)
    async with asyncio.timeout(30):
        while kept.id in await ids(friend):
            pass
    with kept.cpu_access() as view:
        view[0] = 1
    kept.close()


async def test_many_calls_at_once_get_each_their_own(client: aio.Client) -> None:
    buffers = await asyncio.gather(*(client.allocate(size=PAGE, kind="memfd", name=f"n{n}") for n in range(64)))
    assert [buffer.name for buffer in buffers] == [f"n{n}" for n in range(64)]
    assert len({os.fstat(buffer.fileno()).st_ino for buffer in buffers}) == 64
    for buffer in buffers:
        buffer.close()


def test_the_blocking_client_has_every_verb(blocking: sync.Client) -> None:
    available = blocking.properties()["UdmabufAvailable"]
    kind = "dma-buf" if available else "memfd"
    with blocking.allocate(width=64, height=16, format="XR24", kind=kind) as buffer:
        array = np.asarray(buffer)
        with buffer.cpu_access() as view:
            view[5] = 77
            assert array[5] == 77
        del array
        buffer.set_name("blocking")
        with blocking.import_ticket(buffer.get_ticket()) as other:
            other.get_fd()
            assert other.name == "blocking"
            assert os.fstat(other.fileno()).st_ino == buffer.info.inode
        assert buffer.id in held(blocking.list_buffers())
        buffer.release()
        assert buffer.id not in held(blocking.list_buffers())
    with blocking.create(size=PAGE, kind=kind) as empty:
        assert empty.state == State.EMPTY
        empty.get_fd()
        empty.refresh()
        assert empty.state == State.BACKED
    for one in blocking.allocate_many(3, size=PAGE, kind=kind):
        one.close()
    assert blocking.limits().max_fds_per_message == MAX_FDS_PER_MESSAGE
    with pytest.raises(errors.InvalidSpec, match="colour"):
        blocking.allocate({"colour": "red"})
    with pytest.raises(errors.InvalidSpec, match="size"):
        blocking.allocate(size=0)


def test_signals_flow_while_the_program_does_something_else(service: RunningService, blocking: sync.Client) -> None:
    with (
        sync.Client.connect(service.address) as friend,
        blocking.create(size=PAGE, kind="memfd") as buffer,
        friend.import_ticket(buffer.get_ticket()) as other,
    ):
        other.set_name("from elsewhere")
        seen = threading.Event()
        watcher = threading.Thread(target=lambda: wait_for_name(buffer, "from elsewhere", seen))
        watcher.start()
        assert seen.wait(30)
        watcher.join()


def wait_for_name(buffer: sync.Buffer, name: str, seen: threading.Event) -> None:
    """Wait without any call of this client: what comes must be taken by its own thread."""
    while buffer.name != name and not seen.wait(0.001):
        pass
    seen.set()


def test_threads_share_a_client(blocking: sync.Client) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                with blocking.allocate(size=PAGE, kind="memfd", name=f"t{number}.{turn}") as buffer:
                    assert buffer.name == f"t{number}.{turn}"
                    with buffer.cpu_access() as view:
                        assert bytes(view) == bytes(PAGE)
                        view[:] = bytes([number]) * PAGE
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_closing_twice_and_calling_afterwards(service: RunningService) -> None:
    client = sync.Client.connect(service.address)
    buffer = client.allocate(size=PAGE, kind="memfd")
    client.close()
    client.close()
    with pytest.raises(errors.ServiceUnavailable, match="closed"):
        client.limits()
    with buffer.map() as view:
        view[0] = 1
    buffer.close()


def test_a_dropped_blocking_client_warns_and_ends_its_thread(service: RunningService) -> None:
    clients = [sync.Client.connect(service.address)]
    before = threading.active_count()
    with pytest.warns(ResourceWarning, match="unclosed Client"):
        clients.clear()
    assert threading.active_count() == before - 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_the_memory_and_not_the_connection(blocking: sync.Client) -> None:
    with blocking.allocate(size=PAGE, kind="memfd") as buffer, buffer.map() as view:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=in_the_child, args=(blocking, buffer, view))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert view[0] == 99
        # What the child closed was its own.
        assert buffer.get_ticket()
        assert buffer.id in {listed.id for listed in blocking.list_buffers()}


def in_the_child(client: sync.Client, buffer: sync.Buffer, view: memoryview) -> None:
    view[0] = 99
    try:
        client.limits()
    except errors.ServiceUnavailable as error:
        assert "fork" in str(error)
    else:
        raise AssertionError("a child used its parent's connection")
    view.release()
    import warnings

    warnings.simplefilter("ignore", ResourceWarning)
    buffer.close()
    client.close()


UNTIDY = """
import sys
from udmabufd_client import Client
client = Client.connect(sys.argv[1])
buffer = client.allocate(size=4096, kind="memfd")
view = buffer.map().view
print("ready", flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt", "import os; os.fork(); sys.exit(3)"])
def test_a_program_that_closes_nothing_still_ends(service: RunningService, end: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNTIDY.format(end=end), service.address],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore"},
    )
    assert run.stdout.startswith("ready")
    assert run.returncode == {"": 0, "raise KeyboardInterrupt": -2}.get(end, 3)
    assert "Fatal" not in run.stderr
    assert "Exception ignored" not in run.stderr


def test_a_tidy_program_is_silent_under_python_dev_mode(service: RunningService) -> None:
    code = """
import asyncio, sys
from udmabufd_client import Client, aio
with Client.connect(sys.argv[1]) as client, client.allocate(size=4096, kind="memfd") as buffer:
    with buffer.cpu_access() as view:
        view[0] = 1
async def main():
    async with aio.Client.connect(sys.argv[1]) as client:
        async with await client.allocate(size=4096, kind="memfd") as buffer:
            with buffer.map() as view:
                view[0] = 1
asyncio.run(main())
"""
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, service.address],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    # That a slow machine is slow is not what is asked.
    said = [line for line in run.stderr.splitlines() if not re.fullmatch("Executing <.*> took [0-9.]+ seconds", line)]
    assert (run.returncode, run.stdout, said) == (0, "", [])


async def test_a_buffer_is_shared_by_its_descriptor(client: aio.Client, friend: aio.Client, kind: str) -> None:
    with await client.allocate(size=PAGE, kind=kind, name="passed on") as buffer:
        with await friend.import_fd(buffer) as other:
            assert (other.path, other.name, other.state) == (buffer.path, "passed on", State.BACKED)
            assert other.info == buffer.info
            with buffer.cpu_access() as mine, other.cpu_access() as theirs:
                mine[7] = 9
                assert theirs[7] == 9
            await buffer.release()
            assert other.id in await ids(friend)
        assert other.id not in await ids(friend)


async def test_descriptors_of_nothing_are_refused(client: aio.Client, tmp_path: Path) -> None:
    with wrappable_memfd("foreign", PAGE) as foreign, pytest.raises(errors.NoSuchBuffer):
        await client.import_fd(foreign)
    with open(tmp_path / "file", "w+b") as file, pytest.raises(errors.InvalidSpec):
        await client.import_fd(file)


async def test_the_same_request_is_the_same_buffer(client: aio.Client, friend: aio.Client, kind: str) -> None:
    request_id = new_request_id()
    one = await client.allocate(size=PAGE, kind=kind, request_id=request_id)
    two = await friend.allocate(size=PAGE, kind=kind, request_id=request_id)
    assert one.path == two.path
    assert os.fstat(one.fileno()).st_ino == os.fstat(two.fileno()).st_ino
    with pytest.raises(errors.InvalidSpec, match="request_id"):
        await client.allocate(size=2 * PAGE, kind=kind, request_id=request_id)
    one.close()
    two.close()


async def test_memory_of_ones_own_becomes_a_buffer(client: aio.Client) -> None:
    available = (await client.properties())["UdmabufAvailable"]
    with wrappable_memfd("mine", 4 * PAGE) as memfd:
        os.pwrite(memfd.fileno(), b"here", 2 * PAGE)
        if not available:
            with pytest.raises(errors.UdmabufUnavailable):
                await client.wrap([memfd])
            return
        ranges = [(0, 2 * PAGE, PAGE), (0, 0, PAGE)]
        with await client.wrap([memfd], ranges, name="wrapped here") as buffer:
            assert (buffer.info.kind, buffer.info.allocator, buffer.size) == ("dma-buf", "wrapped", 2 * PAGE)
            assert (buffer.name, buffer.has_fd) == ("wrapped here", False)
            await buffer.get_fd()
            with buffer.cpu_access() as view:
                assert bytes(view[:4]) == b"here"
                view[PAGE] = 5
            assert os.pread(memfd.fileno(), 1, 0) == b"\5"
    with OwnedFd(os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as plain:
        os.ftruncate(plain.fileno(), PAGE)
        with pytest.raises(errors.BadMemfd, match="SHRINK"):
            await client.wrap([plain])


async def test_usage_counts_what_this_user_has(client: aio.Client, kind: str) -> None:
    def mine(rows: list[Usage]) -> int:
        return sum(row.bytes for row in rows if row.uid == os.geteuid())

    before = mine(await client.usage())
    with await client.allocate(size=16 * PAGE, kind=kind):
        assert mine(await client.usage()) == before + 16 * PAGE
    with pytest.raises(errors.NotSupported, match="nothing to recover"):
        await client.recover()


def test_the_blocking_client_lends_descriptors_too(service: RunningService, blocking: sync.Client) -> None:
    with (
        sync.Client.connect(service.address, timeout=60) as friend,
        blocking.allocate(size=PAGE, kind="memfd", request_id=new_request_id()) as buffer,
        friend.import_fd(buffer.fileno()) as other,
    ):
        assert other.path == buffer.path
        assert other.fileno() != buffer.fileno()
        assert any(row.buffers for row in friend.usage())
        with pytest.raises(errors.NoSuchBuffer), wrappable_memfd("foreign", PAGE) as foreign:
            friend.import_fd(foreign)
        with pytest.raises(errors.UdmabufError), OwnedFd(os.memfd_create("unsealed", os.MFD_CLOEXEC)) as plain:
            os.ftruncate(plain.fileno(), PAGE)
            friend.wrap([plain])
    closed = sync.Client.connect(service.address, timeout=60)
    closed.close()
    with wrappable_memfd("mine", PAGE) as memfd:
        calls: list[Callable[[], sync.Buffer]] = [lambda: closed.import_fd(memfd), lambda: closed.wrap([memfd])]
        for call in calls:
            with pytest.raises(errors.ServiceUnavailable, match="closed"):
                call()
