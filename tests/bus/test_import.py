# SPDX-License-Identifier: MIT
"""Import: whoever presents a descriptor of ours is a holder, whatever else is presented is refused by its name.

And request_id, by which a call that is repeated brings another share and no second buffer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.bus.fake_bus import FakeBus, service_on
from tests.bus.memfds import clients_memfd, entries, peer_of, reopened, send, until, usage, wrap
from tests.bus.peer import Peer, error, spec
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from tests.bus.service import RunningService, own_service
from udmabufd.linux import memfd
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUFFER_INTERFACE, OBJECT_PATH, REQUEST_GRACE

pytestmark = pytest.mark.root

PAGE = mmap.PAGESIZE
ALICE, BOB = 65534, 1
ASKING, MINE, YOURS, KEPT, FREE = 2, 3, 4, 5, 6
"""Users that every system has: what is asked for by request_id stays its user's for a while."""

DBUS = "org.freedesktop.DBus.Error."


@pytest.fixture
async def alice(service: RunningService) -> AsyncIterator[Peer]:
    """A connection of one user."""
    async with peer_of(service.address, ALICE) as peer:
        yield peer


@pytest.fixture
async def bob(service: RunningService) -> AsyncIterator[Peer]:
    """A connection of another."""
    async with peer_of(service.address, BOB) as peer:
        yield peer


@asynccontextmanager
async def nothing_kept(service: RunningService) -> AsyncIterator[None]:
    """Wait afterwards until the service has no more files open than before, of any kind."""
    before = kinds(service)
    yield

    async def as_before() -> bool:
        return kinds(service) <= before

    await until(as_before)


def kinds(service: RunningService) -> Counter[str]:
    """Count what the service's descriptors lead to."""
    return Counter(target.partition(":")[0] for target in service.fds().values())


# ---- sharing --------------------------------------------------------------------------------------------------------


async def test_two_users_share_by_descriptor(peer: Peer, alice: Peer, bob: Peer, kind: str) -> None:
    """One memory for both; it is charged to who made it, then to who is left; the importer has a buffer more."""
    size = 3 * PAGE
    path, fd, info = await alice.allocate(size=size, kind=kind, name="shared")
    before = await usage(peer, BOB)
    imported, said = await bob.import_fd(fd)
    assert (imported, said) == (path, info)
    got, _ = await bob.call("GetFd", "a{sv}", {}, path=path)
    with mmap.mmap(fd.fileno(), size) as ours, mmap.mmap(got.fileno(), size) as theirs:
        ours[:5] = b"hello"
        assert theirs[:5] == b"hello"
    (entry,) = (await entries(bob)).values()
    assert (entry["buffer"], entry["holders"], entry["state"]) == (path, 2, "backed")

    async def charged(uid: int) -> tuple[int, int]:
        now = await usage(peer, uid)
        return now["buffers"], now["bytes"]

    assert (before["buffers"], before["bytes"]) == (0, 0)
    assert await charged(ALICE) == (1, size)
    assert await charged(BOB) == (1, 0)
    await alice.call("Release", path=path)
    assert await charged(ALICE) == (0, 0)
    assert await charged(BOB) == (1, size)
    assert not await entries(alice)
    with pytest.raises(RemoteError) as caught:
        await alice.get("State", path=path)
    assert caught.value.name == error("NoSuchBuffer")
    # By the same possession it comes back, as a share and no charge.
    assert (await alice.import_fd(fd))[0] == path
    assert await charged(ALICE) == (1, 0)
    bob.close()

    async def passed_on() -> bool:
        return await charged(ALICE) == (1, size)

    await until(passed_on)
    assert await charged(BOB) == (0, 0)
    fd.close()
    await alice.call("Release", path=path)


async def test_each_import_is_a_share(alice: Peer, bob: Peer, kind: str) -> None:
    path, fd, _ = await alice.allocate(size=PAGE, kind=kind)
    with reopened(fd, os.O_RDWR) if kind == "memfd" else fd.dup() as again:
        for one in (fd, again, fd):
            assert (await bob.import_fd(one))[0] == path
    for _ in range(3):
        assert await bob.get("State", path=path) == "backed"
        await bob.call("Release", path=path)
    with pytest.raises(RemoteError) as caught:
        await bob.call("Release", path=path)
    assert caught.value.name == error("NoSuchBuffer")
    await alice.call("Release", path=path)


@pytest.mark.host
async def test_imports_count_as_buffers_of_the_importer() -> None:
    """Its quota is told with figures, and one buffer imported twice is one."""
    with PrivateBus() as bus, own_service(bus.address, config="[limits]\nmax_buffers_per_user = 2\n"):
        async with peer_of(bus.address, ALICE) as one, peer_of(bus.address, BOB) as importer:
            async with peer_of(bus.address, 2) as other:
                first, second = await one.allocate(size=1, kind="memfd"), await one.allocate(size=1, kind="memfd")
                third = await other.allocate(size=1, kind="memfd")
                for _, fd, _ in (first, second, first):
                    await importer.import_fd(fd)
                with pytest.raises(RemoteError, match=r"\b2\b.*max_buffers_per_user|max_buffers_per_user.*\b2\b") as e:
                    await importer.import_fd(third[1])
                assert e.value.name == error("QuotaExceeded")
                await importer.call("Release", path=second[0])
                assert (await importer.import_fd(third[1]))[0] == third[0]


async def test_a_memfd_that_nobody_holds_any_more_is_forgotten(alice: Peer, bob: Peer) -> None:
    path, fd, _ = await alice.allocate(size=PAGE, kind="memfd")
    await alice.call("Release", path=path)
    for peer in (alice, bob):
        with pytest.raises(RemoteError) as caught:
            await peer.import_fd(fd)
        assert caught.value.name == error("NoSuchBuffer")


# ---- what is refused ------------------------------------------------------------------------------------------------


def pipe_end() -> OwnedFd:
    reader, writer = os.pipe()
    os.close(writer)
    return OwnedFd(reader)


def own_socket() -> OwnedFd:
    return OwnedFd(socket.socket(socket.AF_UNIX).detach())


def epoll() -> OwnedFd:
    with select.epoll() as poll:
        return OwnedFd(fcntl.fcntl(poll.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))


def regular_file() -> OwnedFd:
    """A file of the file system that memfds are of, too, but not of their mount."""
    return OwnedFd(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC))


FOREIGN: dict[str, Callable[[], OwnedFd]] = {
    "regular file": regular_file,
    "file on disk": lambda: OwnedFd(os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)),
    "directory": lambda: OwnedFd(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)),
    "path of a directory": lambda: OwnedFd(os.open("/", os.O_PATH | os.O_CLOEXEC)),
    "device": lambda: OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
    "pipe": pipe_end,
    "socket": own_socket,
    "eventfd": lambda: OwnedFd(os.eventfd(0)),
    "epoll": epoll,
    "pidfd": lambda: OwnedFd(os.pidfd_open(os.getpid())),
    "proc": lambda: OwnedFd(os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)),
}


@pytest.mark.host
async def test_what_is_neither_dma_buf_nor_memfd(service: RunningService, alice: Peer) -> None:
    await alice.get("Version")
    async with nothing_kept(service):
        for what, make in FOREIGN.items():
            with make() as fd, pytest.raises(RemoteError, match="fd: is neither a dma-buf nor a memfd") as caught:
                await alice.import_fd(fd)
            assert caught.value.name == error("InvalidSpec"), what


@pytest.mark.host
async def test_descriptors_of_ours_that_do_not_give_a_share(service: RunningService, alice: Peer, bob: Peer) -> None:
    """Whoever may only read, or not even that, cannot make itself a holder, who may write."""
    path, fd, _ = await alice.allocate(size=PAGE, kind="memfd")
    await bob.get("Version")
    async with nothing_kept(service):
        for flags, text in (
            (os.O_PATH, "fd: was opened O_PATH"),
            (os.O_RDONLY, "fd: is not open for both reading and writing"),
            (os.O_WRONLY, "fd: is not open for both reading and writing"),
        ):
            # The service's memfds can be opened by root alone, as any memfd by its owner.
            with reopened(fd, flags) as less, pytest.raises(RemoteError, match=text) as caught:
                await bob.import_fd(less)
            assert caught.value.name == error("AccessDenied")
    assert not await entries(bob)
    assert (await entries(alice))[path]["holders"] == 1


@pytest.mark.host
async def test_memfds_of_others_are_no_buffers(service: RunningService, alice: Peer) -> None:
    await alice.get("Version")
    async with nothing_kept(service):
        makers: list[Callable[[], OwnedFd]] = [
            lambda: clients_memfd(PAGE),
            lambda: memfd.create("empty", 0),
            lambda: memfd.create("huge", 2 << 20, huge_page=2 << 20),
        ]
        for make in makers:
            with make() as fd, pytest.raises(RemoteError) as caught:
                await alice.import_fd(fd)
            assert caught.value.name == error("NoSuchBuffer")


@pytest.mark.host
async def test_calls_that_do_not_fit_their_descriptors(service: RunningService, alice: Peer) -> None:
    """Neither more, nor others, nor elsewhere; nothing of it is kept."""
    _, fd, _ = await alice.allocate(size=PAGE, kind="memfd")
    with ExitStack() as stack:
        many = [stack.enter_context(fd.dup()) for _ in range(16)]
        async with nothing_kept(service):
            for name, signature, body, fds in (
                ("16 for one", "h", [0], many),
                ("two for one", "h", [0], many[:2]),
                ("another signature", "ah", [[0]], [fd]),
                ("a text", "s", ["fd"], []),
                ("a text and a descriptor", "s", ["fd"], [fd]),
                ("nothing", "", [], [fd]),
            ):
                with pytest.raises(RemoteError) as caught:
                    await send(alice, "Import", signature, body, fds)
                assert caught.value.name == DBUS + "InvalidArgs", name
            for interface in ("", BUFFER_INTERFACE):
                # The bus's policy has no rule that lets these through.
                with pytest.raises(RemoteError) as caught:
                    await send(alice, "Import", "h", [0], [fd], interface)
                assert caught.value.name == DBUS + "AccessDenied"
    (entry,) = (await entries(alice)).values()
    assert entry["holders"] == 1


class LosingBus(FakeBus):
    """A bus that announces descriptors and passes none on."""

    async def _write(self, data: bytes, fds: Sequence[int]) -> None:
        await super()._write(data, [])


@pytest.mark.host
async def test_descriptors_that_are_named_and_did_not_come(tmp_path: Path) -> None:
    """No true bus passes such a call on; here that means that they were not taken."""
    async with LosingBus(tmp_path) as bus, service_on(bus):
        name = bus.join(ALICE)
        with clients_memfd(PAGE) as fd:
            for member, signature, body in (
                ("Import", "h", [0]),
                ("WrapMemfd", "aha(utt)a{sv}", [[0], [[0, 0, PAGE]], {}]),
            ):
                for _ in range(2):  # From a caller not known yet, and from one that is.
                    with pytest.raises(RemoteError) as caught:
                        await bus.call(
                            name, OBJECT_PATH, ALLOCATOR_INTERFACE, member, signature, body, fds=[fd.fileno()]
                        )
                    assert caught.value.name == error("RateLimited")


@pytest.mark.host
async def test_without_an_interface_where_the_bus_lets_it_through() -> None:
    """The specification lets a call leave its interface out: the member alone says what is meant."""
    with PrivateBus(extra_policy=OPEN_POLICY) as bus, own_service(bus.address) as service:
        async with peer_of(bus.address, ALICE) as alice, peer_of(bus.address, BOB) as bob:
            path, fd, info = await alice.allocate(size=PAGE, kind="memfd")
            imported, said = await send(bob, "Import", "h", [0], [fd], "")
            assert (imported, said["inode"].value) == (path, info["inode"])
            with pytest.raises(RemoteError) as caught:
                await send(bob, "Import", "h", [0], [fd], BUFFER_INTERFACE)
            assert caught.value.name == DBUS + "UnknownInterface"

            async def closed() -> bool:
                return kinds(service)["/memfd"] <= 2  # The state's and the buffer's.

            await until(closed)


# ---- request_id -----------------------------------------------------------------------------------------------------

REQUEST = "a-random-request-id-1"


async def refused(peer: Peer, member: str, signature: str, *body: object) -> str:
    """Return the text of the InvalidSpec that the call ends in."""
    with pytest.raises(RemoteError, match=": request_id: ") as caught:
        await peer.call(member, signature, *body)
    assert caught.value.name == error("InvalidSpec")
    return caught.value.message


@pytest.mark.host
async def test_a_repeated_request_brings_another_share(service: RunningService, peer: Peer) -> None:
    """The same buffer and one share more, for each member that makes any; all else by that id is refused."""
    async with peer_of(service.address, ASKING) as alice:
        asked = {"size": 2 * PAGE, "kind": "memfd", "name": "once", "request_id": REQUEST}
        path, fd, info = await alice.allocate(**asked)
        again, fd_again, info_again = await alice.allocate(**asked)
        assert (again, info_again) == (path, info)
        assert os.fstat(fd.fileno()).st_ino == os.fstat(fd_again.fileno()).st_ino
        told = await usage(peer, ASKING)
        assert (told["buffers"], told["bytes"]) == (1, 2 * PAGE)
        for other in ({"size": PAGE}, {"name": "twice"}, {"cache": "uncached"}):
            assert "another spec" in await refused(alice, "Allocate", "a{sv}", spec(**(asked | other)))
        assert "Allocate" in await refused(alice, "CreateBuffer", "a{sv}", spec(**asked))
        assert "Allocate" in await refused(alice, "AllocateMany", "a{sv}u", spec(**asked), 1)
        await alice.call("Release", path=path)
        assert await alice.get("State", path=path) == "backed"

        many = spec(size=PAGE, kind="memfd", request_id=REQUEST + "many")
        paths, fds, _ = await alice.call("AllocateMany", "a{sv}u", many, 3)
        assert (await alice.call("AllocateMany", "a{sv}u", many, 3))[0] == paths
        assert len(fds) == len(set(paths)) == 3
        for count in (2, 4):
            assert f"not {count}" in await refused(alice, "AllocateMany", "a{sv}u", many, count)
        empty = spec(size=PAGE, kind="memfd", request_id=REQUEST + "empty")
        assert await alice.call("CreateBuffer", "a{sv}", empty) == await alice.call("CreateBuffer", "a{sv}", empty)
        assert (await usage(peer, ASKING))["buffers"] == 5
        for wrong in ("", "x" * 15, "x" * 65, "with spaces in it", "é" * 16, "line\nbreak-line-break"):
            assert "printable" in await refused(
                alice, "Allocate", "a{sv}", spec(size=PAGE, kind="memfd", request_id=wrong)
            )


@pytest.mark.host
async def test_a_request_id_is_its_users_own(service: RunningService) -> None:
    asked = {"size": PAGE, "kind": "memfd", "request_id": REQUEST + "mine"}
    async with peer_of(service.address, MINE) as mine, peer_of(service.address, YOURS) as yours:
        path, _, info = await mine.allocate(**asked)
        other, _, said = await yours.allocate(**asked)
        assert other != path
        assert info["inode"] != said["inode"]
        with pytest.raises(RemoteError):
            await mine.get("State", path=other)
        # Nor does it refuse anything of the other's.
        await yours.allocate(**(asked | {"request_id": REQUEST + "more"}))
        await mine.allocate(**(asked | {"request_id": REQUEST + "more", "size": 2 * PAGE}))


@pytest.mark.host
async def test_a_request_that_may_be_repeated_outlives_its_last_holder(
    service: RunningService, peer: Peer, bob: Peer
) -> None:
    """By 10 s, charged, for another connection of the same user: so that nothing is made twice. And no longer."""
    asked = {"size": PAGE, "kind": "memfd", "request_id": REQUEST + "kept"}
    async with peer_of(service.address, KEPT) as first:
        path, handed_out, info = await first.allocate(**asked)
        fd = handed_out.dup()

    async def unheld() -> bool:
        return bool((await entries(peer))[path]["holders"] == 0)

    await until(unheld)
    async with peer_of(service.address, KEPT) as second:
        assert (await second.allocate(**asked))[0] == path
        await second.call("Release", path=path)
    told = await usage(peer, KEPT)
    assert (told["buffers"], told["bytes"]) == (1, PAGE)
    # Whoever has a descriptor can import it meanwhile, and its time begins anew.
    with fd:
        assert (await bob.import_fd(fd))[1]["inode"] == info["inode"]
    await bob.call("Release", path=path)
    left = time.monotonic()

    async def gone() -> bool:
        return path not in await entries(peer)

    await until(gone, REQUEST_GRACE + 5)
    assert REQUEST_GRACE - 1 < time.monotonic() - left < REQUEST_GRACE + 2
    assert (await usage(peer, KEPT))["buffers"] == 0
    async with peer_of(service.address, KEPT) as third:
        # From here on it is another request.
        assert (await third.allocate(**asked))[0] != path


@pytest.mark.host
async def test_no_request_is_known_by_what_was_refused(service: RunningService) -> None:
    """A call that made nothing leaves its id free."""
    asked = {"size": PAGE, "kind": "memfd", "request_id": REQUEST + "free"}
    async with peer_of(service.address, FREE) as alice:
        with pytest.raises(RemoteError):
            await alice.allocate(**(asked | {"size": 1 << 60}))
        if not Path("/dev/udmabuf").exists():
            with clients_memfd(PAGE) as fd, pytest.raises(RemoteError) as caught:
                await wrap(alice, [fd], [(0, 0, PAGE)], request_id=REQUEST + "free")
            assert caught.value.name == error("UdmabufUnavailable")
        await alice.allocate(**asked)
