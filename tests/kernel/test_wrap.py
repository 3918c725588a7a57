# SPDX-License-Identifier: MIT
"""WrapMemfd of the installed service: who pays, what the dma-buf shows, what is refused, and how long it is charged.

Where the kernel zeroes every page that it allocates, users may wrap, too: see test_wrap_race.py.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from tests.bus.memfds import SEALS, clients_memfd, entries, peer_of, reopened, until, usage, wrap
from tests.bus.peer import Peer, error
from tests.bus.service import RunningService
from tests.kernel.buffers import MIB, PAGE, mapped, one_fallocate, poison_free_memory, sealed_memfd
from tests.kernel.hugepools import HUGE, huge_pages
from tests.kernel.keepers import duplicate, in_flight, mapping
from tests.kernel.witness import bufinfo, descriptors, memory_current
from udmabufd.linux import memfd
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

SLICE = "udmabufd.slice"
ALICE = 1000
SIZE = 8 * PAGE
GROUP = Path("/sys/fs/cgroup/udmabufd-wrap-test")

Keeper = Callable[[OwnedFd], AbstractContextManager[None]]


async def get_fd(peer: Peer, path: str) -> OwnedFd:
    fd, _ = await peer.call("GetFd", "a{sv}", {}, path=path)
    assert isinstance(fd, OwnedFd)
    return fd


async def uncharged(peer: Peer, uid: int) -> None:
    """Wait until `uid` pays for nothing: a moment after the buffer has gone, when it is closed."""

    async def over() -> bool:
        return (await usage(peer, uid))["bytes"] == 0

    await until(over)


async def gone(peer: Peer, path: str) -> None:
    """Wait until the buffer is known no more."""

    async def over() -> bool:
        return path not in await entries(peer)

    await until(over)


@pytest.fixture
async def quiet(peer: Peer) -> AsyncIterator[None]:
    """What tests before left has ended, and afterwards nothing of this one is left."""

    async def nothing() -> bool:
        return bool(await peer.get("Buffers") == 0)

    await until(nothing)
    yield
    assert not await entries(peer)


# ---- who pays -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_group() -> Iterator[Callable[[], int]]:
    """Be in a control group of our own; yield what tells the bytes that are charged to it."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    (before,) = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    GROUP.mkdir()
    pid = str(os.getpid())
    (GROUP / "cgroup.procs").write_text(pid)
    try:
        yield lambda: int((GROUP / "memory.current").read_text())
    finally:
        Path(f"/sys/fs/cgroup{before}", "cgroup.procs").write_text(pid)
        GROUP.rmdir()


@pytest.mark.usefixtures("quiet")
async def test_the_caller_pays_with_its_own_pages(peer: Peer, own_group: Callable[[], int]) -> None:
    """The kernel charges the caller's group from the first touch to the end of the dma-buf, and the service's slice
    never; the ledger charges the caller's user as long. What the service allocates is the contrast.
    """
    size, slack = 64 * MIB, 20 * MIB

    def charged() -> tuple[int, int]:
        return own_group(), memory_current(SLICE)

    caller, service = charged()
    with clients_memfd(size) as own:
        assert own_group() - caller > size - slack, "the pages are there, and ours"
        before = charged()
        path, info = await wrap(peer, [own], [(0, 0, size)])
        fd = await get_fd(peer, path)
        assert info["size"] == size
        assert all(abs(now - then) < slack for now, then in zip(charged(), before, strict=True))
        assert (await entries(peer))[path]["charged"] == size
        assert (await usage(peer, 0))["bytes"] == size
    # The memfd is closed: the dma-buf alone has the pages, and they are charged where they were.
    assert own_group() - caller > size - slack
    assert memory_current(SLICE) - service < slack
    await peer.call("Release", path=path)
    assert (await usage(peer, 0))["lingering"] == size
    assert own_group() - caller > size - slack
    fd.close()
    await gone(peer, path)
    await uncharged(peer, 0)
    assert own_group() - caller < slack

    path, fd, _ = await peer.allocate(size=size, allocator="udmabuf")
    assert own_group() - caller < slack
    assert memory_current(SLICE) - service > size - slack
    await peer.call("Release", path=path)
    fd.close()
    await gone(peer, path)


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
async def test_ranges_of_several_memfds_in_their_order(service: RunningService, peer: Peer) -> None:
    """What is written to one is read in the other, both ways; the service keeps no memfd, and says what it made."""
    held = descriptors(service.pid)["memfd"]
    with clients_memfd(SIZE, content=b"first ") as first, clients_memfd(SIZE, content=b"second") as second:
        fds = [first, second]
        ranges = [(1, 4 * PAGE, 2 * PAGE), (0, 0, PAGE), (0, 0, 2 * PAGE), (1, 5 * PAGE, 3 * PAGE)]
        path, info = await wrap(peer, fds, ranges, name="guest memory")
        fd = await get_fd(peer, path)
        whole = 8 * PAGE
        assert (info["size"], info["allocator"], info["kind"], info["name"], info["serial"]) == (
            whole,
            "wrapped",
            "dma-buf",
            "guest memory",
            1,
        )
        known = bufinfo()[info["inode"]]
        assert (known.size, known.exporter, known.name) == (whole, "udmabuf", "guest memory")
        assert os.lseek(fd.fileno(), 0, os.SEEK_END) == whole
        assert (await peer.get("Allocator", path), await peer.get("State", path)) == ("wrapped", "backed")
        with mapped(fd, whole) as view:
            assert view.tobytes() == b"".join(os.pread(fds[i].fileno(), size, offset) for i, offset, size in ranges)
            view[2 * PAGE : 2 * PAGE + 6] = b"to the"
            assert os.pread(first.fileno(), 6, 0) == b"to the"
            assert view[3 * PAGE : 3 * PAGE + 6].tobytes() == b"to the", "the same page once more"
            os.pwrite(second.fileno(), b"and back", 8 * PAGE - 8)
            assert view[whole - 8 :].tobytes() == b"and back"
        # The closing of what came with the call may take a moment.
        await until_memfds(service, held)
        await peer.call("Release", path=path)
        fd.close()
        await gone(peer, path)


async def until_memfds(service: RunningService, count: int) -> None:
    async def closed() -> bool:
        return descriptors(service.pid)["memfd"] == count

    await until(closed)


@pytest.mark.usefixtures("quiet")
async def test_a_repeated_request_wraps_once(peer: Peer) -> None:
    """The same memfds and ranges are the same request, by whatever descriptors; others are another."""
    with clients_memfd(SIZE) as own, clients_memfd(SIZE) as other:
        asked = {"request_id": "wrapped-only-once-1"}
        path, info = await wrap(peer, [own], [(0, 0, SIZE)], **asked)
        with reopened(own, os.O_RDWR) as again:
            assert await wrap(peer, [again], [(0, 0, SIZE)], **asked) == (path, info)
        for fd, ranges in ((other, [(0, 0, SIZE)]), (own, [(0, 0, PAGE)])):
            with pytest.raises(RemoteError, match=": request_id: ") as caught:
                await wrap(peer, [fd], ranges, **asked)
            assert caught.value.name == error("InvalidSpec")
        assert (await usage(peer, 0))["bytes"] == SIZE
        await peer.call("Release", path=path)
        assert await peer.get("State", path) == "backed"
        await peer.call("Release", path=path)
        await gone(peer, path)


# ---- what is refused ------------------------------------------------------------------------------------------------


async def refused(peer: Peer, cause: str, fds: list[OwnedFd], ranges: list[tuple[int, int, int]]) -> None:
    with pytest.raises(RemoteError, match=f"BadMemfd: {cause}") as caught:
        await wrap(peer, fds, ranges)
    assert caught.value.name == error("BadMemfd")


@pytest.mark.usefixtures("quiet")
async def test_every_refusal_names_its_cause(service: RunningService, peer: Peer) -> None:
    """And leaves nothing behind: neither descriptors, nor charges, nor memory in the caller's memfd."""
    held = descriptors(service.pid)
    whole = (0, 0, SIZE)
    with clients_memfd(SIZE) as good:
        for flags, cause in (
            (os.O_RDONLY, "memfd 0 is not open for reading and writing"),
            (os.O_WRONLY, "memfd 0 is not open for reading and writing"),
            (os.O_PATH, "memfd 0 is an O_PATH descriptor"),
        ):
            with reopened(good, flags) as fd:
                await refused(peer, cause, [fd], [whole])
        for seals, cause in (
            (memfd.F_SEAL_SEAL, "memfd 1 lacks the seal F_SEAL_SHRINK"),
            (memfd.F_SEAL_SHRINK, "memfd 1 lacks the seal F_SEAL_SEAL"),
            (SEALS | memfd.F_SEAL_WRITE, "memfd 1 has the seal F_SEAL_WRITE"),
            (SEALS | memfd.F_SEAL_FUTURE_WRITE, "memfd 1 has the seal F_SEAL_FUTURE_WRITE"),
        ):
            with clients_memfd(SIZE, seals) as fd:
                await refused(peer, cause, [good, fd], [whole, (1, 0, PAGE)])
        for part, cause in (
            ((0, 512, PAGE), f"range 1: offset 512 and size {PAGE} must be multiples of {PAGE}"),
            ((0, 0, PAGE - 1), f"range 1: offset 0 and size {PAGE - 1} must be multiples of {PAGE}"),
            ((0, PAGE, 0), "range 1 is empty"),
            ((0, PAGE, SIZE), f"range 1: bytes {PAGE} to {SIZE + PAGE} of a memfd of {SIZE}"),
        ):
            await refused(peer, cause, [good], [whole, part])
        with OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as null:
            await refused(peer, "memfd 1 is no memfd", [good, null], [whole, (1, 0, PAGE)])
        path, dma_buf, _ = await peer.allocate(size=SIZE, allocator="udmabuf")
        await refused(peer, "memfd 0 is no memfd", [dma_buf], [whole])
        await peer.call("Release", path=path)
        dma_buf.close()
        await gone(peer, path)
        with pytest.raises(RemoteError, match="memfds: memfd 1 is in no range") as caught:
            await wrap(peer, [good, good], [whole])
        assert caught.value.name == error("InvalidSpec")
    with memfd.create("holey", SIZE) as holey:
        os.pwrite(holey.fileno(), bytes(3 * PAGE), 0)
        memfd.add_seals(holey.fileno(), SEALS)
        await refused(peer, f"memfd 0 has a hole at byte {3 * PAGE}", [holey], [whole])
        assert os.fstat(holey.fileno()).st_blocks * 512 == 3 * PAGE, "nothing was populated"
    with sealed_memfd(SIZE, SEALS, prepare=one_fallocate) as allocated:
        await refused(peer, "memfd 0 has a hole at byte 0", [allocated], [whole])

    async def as_before() -> bool:
        return descriptors(service.pid) == held

    await until(as_before)
    await uncharged(peer, 0)


@pytest.mark.usefixtures("quiet")
async def test_huge_pages_are_wrapped_whole(peer: Peer) -> None:
    """The kernel pins all of such a page for any part of it."""
    with huge_pages(2), memfd.create("huge", 2 * HUGE, huge_page=HUGE) as own:
        with mmap.mmap(own.fileno(), 2 * HUGE) as view:
            view[:4] = b"huge"
            view[HUGE : HUGE + 4] = b"huge"
        memfd.add_seals(own.fileno(), SEALS)
        for offset, size in ((0, PAGE), (PAGE, HUGE), (HUGE, HUGE - PAGE)):
            cause = f"range 0: offset {offset} and size {size} must be multiples of {HUGE}"
            await refused(peer, cause, [own], [(0, offset, size)])
        path, info = await wrap(peer, [own], [(0, HUGE, HUGE)])
        fd = await get_fd(peer, path)
        assert info["size"] == (await entries(peer))[path]["charged"] == HUGE
        with mapped(fd, HUGE) as shown:
            assert shown[:4].tobytes() == b"huge"
        await peer.call("Release", path=path)
        fd.close()
        await gone(peer, path)


@pytest.mark.usefixtures("quiet")
async def test_what_one_user_may_have_wrapped(peer: Peer) -> None:
    """MaxWrappedBytesPerUser, told with figures; what lingers counts, and what is free by now does not."""
    limit = await peer.get("MaxWrappedBytesPerUser")
    size = 64 * MIB
    held = []
    with clients_memfd(size) as own:
        for _ in range(limit // size):
            path, _ = await wrap(peer, [own], [(0, 0, size)])
            held.append((path, await get_fd(peer, path)))
        path, kept = held[-1]
        await peer.call("Release", path=path)
        for _ in range(2):
            with pytest.raises(RemoteError) as caught:
                await wrap(peer, [own], [(0, 0, PAGE)])
            assert caught.value.name == error("QuotaExceeded")
            for figure in ("max_wrapped_bytes_per_user", str(limit), str(PAGE)):
                assert figure in str(caught.value)
        # Another user's are its own, and so is memory of the service's.
        path, fd, _ = await peer.allocate(size=PAGE, allocator="udmabuf")
        await peer.call("Release", path=path)
        fd.close()
        kept.close()
        path, _ = await wrap(peer, [own], [(0, 0, size)])
        held[-1] = path, await get_fd(peer, path)
        for path, fd in held:
            fd.close()
            await peer.call("Release", path=path)
        for path, _ in held:
            await gone(peer, path)
    await uncharged(peer, 0)


# ---- how long it is charged -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("keeper", [duplicate, mapping, in_flight])
async def test_what_is_wrapped_is_charged_while_it_is_referenced(peer: Peer, keeper: Keeper) -> None:
    """The hint alone decides: there is no memfd of the service's that could be the proof."""
    with clients_memfd(MIB) as own:
        path, info = await wrap(peer, [own], [(0, 0, MIB)])
    fd = await get_fd(peer, path)
    with keeper(fd):
        await peer.call("Release", path=path)
        for _ in range(10):
            entry = (await entries(peer))[path]
            assert (entry["state"], entry["holders"], entry["charged"]) == ("lingering", 0, MIB)
            told = await usage(peer, 0)
            assert (told["bytes"], told["lingering"]) == (MIB, MIB)
    await gone(peer, path)
    await uncharged(peer, 0)

    async def freed() -> bool:
        return info["inode"] not in bufinfo()

    # The service's own references, and its store's, end last.
    await until(freed)


# ---- on a kernel that does not zero pages ---------------------------------------------------------------------------


@pytest.mark.unzeroed
async def test_users_are_refused_and_told_why(service: RunningService, peer: Peer) -> None:
    """After their memfds were looked at; and nothing of them is touched."""
    async with peer_of(service.address, ALICE) as alice:
        with clients_memfd(SIZE) as own:
            with pytest.raises(RemoteError, match="Only root may wrap .* boot with init_on_alloc=1") as caught:
                await wrap(alice, [own], [(0, 0, SIZE)])
            assert caught.value.name == error("AccessDenied")
            path, _ = await wrap(peer, [own], [(0, 0, SIZE)])
            await peer.call("Release", path=path)
            await gone(peer, path)
        await uncharged(peer, ALICE)


@pytest.mark.unzeroed
async def test_roots_undisturbed_shows_nothing_stale(peer: Peer) -> None:
    """A memfd of zeros, of memory that was full of something else, is zeros through the dma-buf."""
    size = 32 * MIB
    poison_free_memory(512 * MIB)
    with sealed_memfd(size, SEALS) as own:
        path, _ = await wrap(peer, [own], [(0, 0, size)])
        fd = await get_fd(peer, path)
        with mapped(fd, size) as view:
            assert not np.count_nonzero(np.frombuffer(view, dtype=np.uint8))
        await peer.call("Release", path=path)
        fd.close()
        await gone(peer, path)
