# SPDX-License-Identifier: MIT
"""A former run from which the daemon cannot simply go on: a damaged state, a store too small, another bus."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.bus.peer import Peer, plain, spec
from tests.bus.private_bus import PrivateBus
from tests.system import stepper
from tests.system.books import agreed, entries, inode
from tests.system.fake_manager import FakeManager
from tests.system.world import PATTERN, SIZE, trapped
from tests.unit.test_state import OLD_FILE
from udmabufd.core import restore
from udmabufd.core.buffer import Holder
from udmabufd.core.ledger import Ledger, Owner
from udmabufd.core.limits import Limits
from udmabufd.core.registry import Registry
from udmabufd.core.spec import Request
from udmabufd.core.state import StateFile
from udmabufd.core.store import NoStore
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client import aio
from udmabufd_client.contract import ADMIN_INTERFACE, buffer_id

pytestmark = pytest.mark.host

GRACE = 3
"""Seconds in the place of 30."""


@pytest.fixture
def bus() -> Iterator[PrivateBus]:
    with PrivateBus() as made:
        yield made


@pytest.fixture
def manager(bus: PrivateBus) -> Iterator[FakeManager]:
    with trapped(bus, **{stepper.GRACE: str(GRACE)}) as made:
        made.start()
        yield made


@pytest.fixture
async def root(bus: PrivateBus, manager: FakeManager) -> AsyncIterator[Peer]:
    """Who looks on, and recovers."""
    peer = await Peer.connect(bus.address)
    yield peer
    peer.close()


@pytest.fixture
async def client(bus: PrivateBus, manager: FakeManager) -> AsyncIterator[Peer]:
    peer = await Peer.connect(bus.address)
    yield peer
    peer.close()


def state_fd(manager: FakeManager) -> int:
    """Return the stored state's descriptor, borrowed."""
    (fd,) = (fd for name, fd in manager.store.hand_over() if name == "_s")
    return fd


def damage_record(manager: FakeManager, name: str) -> None:
    """Damage the last record that a buffer of this name has; the one before it stays as it is."""
    fd = state_fd(manager)
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.pwrite(fd, b"*****", data.index(f'"name":"{name}"'.encode()))


async def refused(peer: Peer, reason: str) -> None:
    """Everything that would change something is refused, and says what to do."""
    for make in (peer.allocate(size=SIZE), peer.call("CreateBuffer", "a{sv}", spec(size=SIZE))):
        with pytest.raises(RemoteError, match=f"{reason}.*udmabufctl recover") as caught:
            await make
        assert caught.value.name.endswith(".UdmabufUnavailable")


async def recover(root: Peer, **options: bool) -> list[dict[str, object]]:
    keys = {key: Variant("b", value) for key, value in options.items()}
    (rows,) = await root.call("Recover", "a{sv}", keys, interface=ADMIN_INTERFACE)
    return [plain(row) for row in rows]


async def test_a_damaged_record_costs_only_what_it_told(manager: FakeManager, root: Peer, client: Peer) -> None:
    path, _, info = await client.allocate(size=SIZE, kind="memfd", name="known")
    (ticket,) = await client.call("GetTicket", path=path)
    lost, lost_fd, lost_info = await client.allocate(size=SIZE, kind="memfd", name="unnamed")
    await client.call("SetName", "s", "forgotten", path=lost)
    os.pwrite(lost_fd.fileno(), PATTERN, 0)
    exported, *_ = await client.allocate(size=SIZE, name="exported")
    before, stored = await entries(root), manager.stored
    damage_record(manager, "forgotten")
    manager.kill()
    manager.start()
    assert manager.stored == stored
    await refused(client, "slot [0-9]+ is damaged")
    assert await entries(root) == {}
    manager.until(lambda: "cannot be read" in manager.store.status, "refusing")
    with pytest.raises(RemoteError, match="NoSuchBuffer|no such buffer"):
        await client.call("GetTicket", path=path)

    # Again, for nothing has been decided.
    manager.kill()
    manager.start()
    assert manager.stored == stored
    rows = {row["inode"]: row for row in await recover(root)}
    assert rows[info["inode"]]["action"] == "restored"
    kept = rows[lost_info["inode"]]
    assert kept["action"] == "kept"
    for one in (path, exported):
        assert (await entries(root))[buffer_id(one)] == before[buffer_id(one)]
    assert await client.call("GetTicket", path=path) == [ticket]
    # Of what is not known any more the descriptor is enough.
    found, _ = await client.import_fd(lost_fd)
    assert found == kept["buffer"] != lost
    again, _ = await client.call("GetFd", "a{sv}", {}, path=found)
    assert os.pread(again.fileno(), len(PATTERN), 0) == PATTERN
    listed = await agreed(root, lambda: manager.stored)
    assert len(listed) == 3
    with pytest.raises(RemoteError, match="nothing to recover"):
        await recover(root)
    # All that belongs to a connection ends with it, as if nothing had been.
    client.close()
    async with asyncio.timeout(20):
        assert await agreed(root, lambda: manager.stored) == {}


async def test_a_state_that_is_none_can_be_given_up(manager: FakeManager, root: Peer, client: Peer) -> None:
    await client.allocate(size=SIZE, kind="memfd")
    await client.allocate(size=SIZE)
    os.pwrite(state_fd(manager), b"nonsense", 0)
    manager.kill()
    manager.start()
    await refused(root, "does not begin as a state of this service does")
    rows = await recover(root, discard=True)
    assert [row["action"] for row in rows] == ["discarded"] * 2
    assert await agreed(root, lambda: manager.stored) == {}
    await client.allocate(size=SIZE)
    manager.kill()
    manager.start()
    assert len(await agreed(root, lambda: manager.stored)) == 1


async def test_without_a_state_everything_is_kept(manager: FakeManager, root: Peer, client: Peer) -> None:
    _, fd, info = await client.allocate(size=SIZE, kind="memfd")
    os.pwrite(state_fd(manager), b"nonsense", 0)
    manager.kill()
    manager.start()
    (row,) = await recover(root)
    assert (row["action"], row["inode"]) == ("kept", info["inode"])
    # What was decided holds over a kill.
    manager.kill()
    manager.start()
    path, _ = await client.import_fd(fd)
    assert path == row["buffer"]
    assert len(await agreed(root, lambda: manager.stored)) == 1


async def test_a_state_of_the_first_version_is_gone_on_with(manager: FakeManager, root: Peer) -> None:
    manager.kill()
    fd = state_fd(manager)
    os.ftruncate(fd, len(OLD_FILE))
    os.pwrite(fd, OLD_FILE, 0)
    manager.start()
    # Of its one buffer nothing is stored here; that it was read shows in that it is missed.
    assert "its descriptors did not come back" in manager.log_text()
    path, *_ = await root.allocate(size=SIZE)
    before = await agreed(root, lambda: manager.stored)
    manager.kill()
    manager.start()
    assert await agreed(root, lambda: manager.stored) == before
    assert list(before) == [buffer_id(path)]


def test_a_holder_that_has_called_already_stays_the_same() -> None:
    ledger = Ledger(Limits(), time.monotonic)
    owner = Owner(0, "")
    registry = Registry(ledger, 10, StateFile.create(), lambda _: None)
    for name in (":1.1", ":1.2"):
        registry.create(Request.from_spec({"size": SIZE}), Holder(name, owner), recorded=True)
    state = StateFile.open(registry.recorder.state.fd)
    again = Registry(Ledger(Limits(), time.monotonic), 10, state, lambda _: None)
    caller = Holder(":1.1", owner)
    result = restore.restore(restore.parse(state), again, {}, NoStore(), {":1.1": caller}.get)
    state.close()
    assert len(result.buffers) == 2
    assert again.holders()[0] is caller
    assert [holder.name for holder in again.holders()] == [":1.1", ":1.2"]


@pytest.mark.parametrize(
    ("limit", "says"), [(1001, "takes 3011 descriptors .* has room for 3008"), (20_000, "of 10918 buffers only")]
)
def test_more_buffers_than_can_be_kept_are_refused(bus: PrivateBus, limit: int, says: str) -> None:
    with FakeManager(bus.address, config=f"[limits]\nmax_buffers = {limit}\n") as manager:
        manager.spawn()
        assert manager.wait() == 78
        manager_log = manager.log_text()
    assert re.search(f"max_buffers is {limit}.*{says}.*udmabufd.toml", manager_log), manager_log


async def test_buffers_wait_for_clients_of_a_bus_that_ended(bus: PrivateBus, manager: FakeManager) -> None:
    address = bus.address
    other = await Peer.connect(address)
    async with aio.Client.connect(address) as client:
        by_fd = await client.allocate(size=SIZE, kind="memfd", name="by fd")
        os.pwrite(by_fd.fileno(), PATTERN, 0)
        by_ticket = await client.create(size=SIZE, kind="memfd", name="by ticket")
        # Its client leaves with the bus.
        await other.allocate(size=SIZE, kind="memfd", name="left")
        inodes = manager.stored
        bus.restart()
        other.close()
        assert manager.wait() == 1
        manager.start()
        # Killed while they wait: they wait anew.
        manager.kill()
        manager.start()
        started = asyncio.get_running_loop().time()
        root = await Peer.connect(address)
        try:
            await by_fd.refresh()
            await by_ticket.refresh()
            assert not by_fd.lost
            assert not by_ticket.lost
            listed = {entry["name"]: entry for entry in (await entries(root)).values()}
            assert {name: entry["holders"] for name, entry in listed.items()} == {
                "by fd": 1,
                "by ticket": 1,
                "left": 0,
            }
            assert manager.stored == inodes
            assert (listed["by fd"]["buffer"], listed["by fd"]["inode"]) == (by_fd._share.path, inode(by_fd))
            kept = await agreed(root, lambda: manager.stored)
            assert asyncio.get_running_loop().time() - started > GRACE - 1
            assert {entry["name"] for entry in kept.values()} == {"by fd", "by ticket"}
            fd = await by_ticket.get_fd()
            assert os.fstat(fd).st_size == SIZE
            assert os.pread(by_fd.fileno(), len(PATTERN), 0) == PATTERN
            by_fd.close()
            by_ticket.close()
        finally:
            root.close()
