# SPDX-License-Identifier: MIT
"""Import of dma-bufs by the installed service: those of ours by whatever way they came, and none of others."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bus.memfds import SEALS, clients_memfd, entries, peer_of, reopened, until, wrap
from tests.bus.peer import Peer, error
from tests.bus.service import RunningService
from tests.kernel.buffers import PAGE, exported, mapped
from tests.kernel.exporters import dumb_buffer, heap_buffer
from tests.kernel.witness import descriptors, dma_bufs
from tests.system.test_policy import as_user
from udmabufd.linux import fdstat, memfd
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import buffer_path

pytestmark = pytest.mark.guest

ALICE = 1000
SIZE = 4 * PAGE


@pytest.fixture
async def alice(service: RunningService) -> AsyncIterator[Peer]:
    """A user's connection."""
    async with peer_of(service.address, ALICE) as peer:
        yield peer


async def refused(peer: Peer, fd: OwnedFd, name: str) -> None:
    """Import `fd` in vain; close it, and see that the service has closed it, too."""
    inode = fdstat.look(fd.fileno()).inode
    with fd, pytest.raises(RemoteError) as caught:
        await peer.import_fd(fd)
    assert caught.value.name == error(name), caught.value
    assert str(inode) not in str(caught.value)


async def test_dma_bufs_of_others(
    service: RunningService, peer: Peer, alice: Peer, device: OwnedFd, vgem: Path
) -> None:
    """Of whatever exporter, udmabuf too: they are dma-bufs, and none of ours; and not kept."""
    path, fd, _ = await peer.allocate(size=SIZE, allocator="udmabuf")
    before = descriptors(service.pid)["dma-buf"]
    with exported(device, SIZE) as (_, foreign):
        makers: list[Callable[[], OwnedFd]] = [
            lambda: heap_buffer(SIZE),
            lambda: dumb_buffer(vgem, 64),
            foreign.dup,
        ]
        for make in makers:
            await refused(alice, make(), "NoSuchBuffer")

    async def closed() -> bool:
        return descriptors(service.pid)["dma-buf"] == before

    await until(closed)
    fd.close()
    await peer.call("Release", path=path)


async def test_dma_bufs_that_give_less_than_a_share(peer: Peer, alice: Peer, vgem: Path) -> None:
    """Read-only ones and O_PATH descriptors, of ours as of others: what it is of is not even looked for."""
    path, fd, _ = await peer.allocate(size=SIZE, allocator="udmabuf")
    makers: list[Callable[[], OwnedFd]] = [
        lambda: heap_buffer(SIZE, os.O_RDONLY),
        lambda: dumb_buffer(vgem, 64, os.O_RDONLY),
        lambda: reopened(fd, os.O_PATH),
    ]
    for make in makers:
        await refused(alice, make(), "AccessDenied")
    assert (await entries(peer))[path]["holders"] == 1
    fd.close()
    await peer.call("Release", path=path)


IMPORTER = """
import json, mmap, os, socket, sys
from udmabufd_client.sync import Client
with socket.socket(fileno=0) as sock:
    _, (fd,), _, _ = socket.recv_fds(sock, 1, 1)
with Client.connect() as client, client.import_fd(fd) as buffer:
    with buffer.cpu_access(read=True, write=True) as view:
        read = bytes(view[:4])
        view[4:8] = b"pong"
    print(json.dumps([os.getuid(), buffer.path, read.decode()]))
"""


async def test_ours_by_whatever_way_it_came(service: RunningService, peer: Peer, alice: Peer) -> None:
    """A duplicate, and a descriptor that another user's process was sent; each becomes a holder by it."""
    path, fd, info = await peer.allocate(size=SIZE, allocator="udmabuf")
    with mapped(fd, SIZE) as view:
        view[:4] = b"ping"
        with fd.dup() as second:
            assert (await alice.import_fd(second))[1]["inode"] == info["inode"]
        left, right = socket.socketpair()
        with left, right:
            socket.send_fds(left, [b"x"], [fd.fileno()])
            entry = pwd.getpwuid(1001)
            done = subprocess.run(
                [sys.executable, "-c", IMPORTER],
                stdin=right.fileno(),
                stdout=subprocess.PIPE,
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=[],
                check=True,
                text=True,
            )
        assert json.loads(done.stdout) == [1001, path, "ping"]
        assert view[4:8].tobytes() == b"pong"
    for one in (peer, alice):
        await one.call("Release", path=path)
    fd.close()

    async def gone() -> bool:
        return path not in await entries(peer)

    await until(gone)


async def test_the_services_own_memfd_cannot_be_had(service: RunningService, peer: Peer, alice: Peer) -> None:
    """It is the witness that the memory is free, so nobody may hold it: no user can take it from the process, and who
    is root and can does not become a holder by it, nor get another dma-buf of it.
    """
    path, fd, info = await peer.allocate(size=SIZE, allocator="udmabuf", name="witnessed")
    (own,) = [one for one in dma_bufs(service.pid) if one.inode == info["inode"]]
    (number,) = [key for key, target in service.fds().items() if target.startswith("/memfd:witnessed")]
    link = f"/proc/{service.pid}/fd/{number}"
    with as_user(ALICE):
        for target in (link, f"/proc/{service.pid}/fd/{own.fd}"):
            with pytest.raises(PermissionError):
                os.open(target, os.O_RDWR)
    with ExitStack() as stack:
        taken = stack.enter_context(OwnedFd(os.open(link, os.O_RDWR | os.O_CLOEXEC)))
        assert memfd.get_seals(taken.fileno()) & memfd.F_SEAL_SHRINK
        await refused(peer, taken.dup(), "NoSuchBuffer")
        await refused(alice, taken.dup(), "NoSuchBuffer")
        with pytest.raises(RemoteError, match="memfd 0 lacks the seal F_SEAL_SEAL") as caught:
            await wrap(peer, [taken], [(0, 0, SIZE)])
        assert caught.value.name == error("BadMemfd")
    fd.close()
    await peer.call("Release", path=path)


async def test_what_is_wrapped_is_imported_by_its_dma_buf_alone(peer: Peer, alice: Peer) -> None:
    """The client's memfd stands for nothing."""
    with clients_memfd(SIZE, SEALS) as own:
        path, _ = await wrap(peer, [own], [(0, 0, SIZE)])
        fd, info = await peer.call("GetFd", "a{sv}", {}, path=path)
        await refused(alice, own.dup(), "NoSuchBuffer")
        imported, said = await alice.import_fd(fd)
        assert (imported, said["inode"], said["allocator"]) == (path, info["inode"].value, "wrapped")
        assert path == buffer_path(path.rpartition("/")[2])
        for one in (peer, alice):
            await one.call("Release", path=path)
        fd.close()
