# SPDX-License-Identifier: MIT
"""Two processes of two users share one buffer by ticket; what the service holds for it, and until when."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.interop.remote import AgentError, RemoteAgent
from tests.interop.users import User
from tests.kernel.witness import bufinfo, descriptors, dma_bufs, main_pid

UNIT = "udmabufd.service"

pytestmark = [pytest.mark.guest, pytest.mark.root]

Start = Callable[..., RemoteAgent]
Eventually = Callable[[Callable[[], object]], None]


def held_by_service(inode: int) -> int:
    """How many descriptors of this dma-buf the service has."""
    return [held.inode for held in dma_bufs(main_pid(UNIT))].count(inode)


def memory_fds() -> tuple[int, int]:
    """How many memfds and dma-bufs the service has open."""
    counts = descriptors(main_pid(UNIT))
    return counts["memfd"], counts["dma-buf"]


@pytest.fixture(params=["dbus-next", "dbus-fast"])
def library(request: pytest.FixtureRequest) -> str:
    """The D-Bus library that the clients use."""
    return str(request.param)


def test_one_buffer_of_two_users(start_agent: Start, library: str, eventually: Eventually) -> None:
    """From a buffer without memory to its last descriptor: one buffer, whoever looks."""
    memfds, dmabufs = memory_fds()
    others = bufinfo().keys()
    alice = start_agent("alice", UDMABUFD_DBUS_LIBRARY=library)
    bob = start_agent("bob", UDMABUFD_DBUS_LIBRARY=library)

    # No memory yet: the ticket works, and the kernel knows nothing.
    alice("create", {"size": 65536, "name": "shared-by-ticket"})
    bob("import_ticket", alice("ticket", 0))
    assert bob("info", 0)["state"] == "empty"
    assert bufinfo().keys() == others
    assert memory_fds() == (memfds, dmabufs)

    # The first descriptor brings memory, the second is of the same.
    got = alice("get_fd", 0)
    assert got["size"] == 65536
    assert bob("get_fd", 0) == got
    assert bob("info", 0)["state"] == "backed"
    inode = got["inode"]
    assert bufinfo().keys() - others == {inode}
    entry = bufinfo()[inode]
    assert (entry.name, entry.size, entry.exporter) == ("shared-by-ticket", 65536, "udmabuf")
    assert memory_fds() == (memfds + 1, dmabufs + 1)
    assert held_by_service(inode) == 1
    for agent in (alice, bob):
        assert [held.inode for held in dma_bufs(agent.process.pid)] == [inode]

    # What one writes the other reads, both ways.
    from_alice, from_bob = os.urandom(5000).hex(), os.urandom(300).hex()
    alice("write", 0, 4000, from_alice)
    assert bob("read", 0, 4000, 5000) == from_alice
    bob("write", 0, 65000, from_bob)
    assert alice("read", 0, 65000, 300) == from_bob
    assert alice("read", 0, 0, 4000) == "00" * 4000

    # The creator goes, the buffer stays: the other holds a share.
    alice.end()
    assert bob("read", 0, 4000, 5000) == from_alice
    assert memory_fds() == (memfds + 1, dmabufs + 1)

    # The last share goes: the descriptor that was handed out stays good, and charged, until it is closed.
    bob("release", 0)
    assert held_by_service(inode) == 1
    assert bob("read", 0, 65000, 300) == from_bob
    bob("close", 0)
    eventually(lambda: bufinfo().keys() == others)
    eventually(lambda: memory_fds() == (memfds, dmabufs))
    bob.end()


def test_a_killed_holder_leaves_nothing(start_agent: Start, eventually: Eventually) -> None:
    """Shares end with the connection, however it ends."""
    before = memory_fds(), bufinfo().keys()
    alice, bob = start_agent("alice"), start_agent("bob")
    alice("allocate", {"size": 8192})
    bob("import_ticket", alice("ticket", 0))
    alice.kill()
    assert bob("get_fd", 0)["size"] == 8192
    bob.kill()
    eventually(lambda: (memory_fds(), bufinfo().keys()) == before)


def test_memfd_is_one_descriptor(start_agent: Start, eventually: Eventually) -> None:
    """For kind=memfd the service holds one memfd and the kernel lists no dma-buf."""
    memfds, dmabufs = memory_fds()
    others = bufinfo().keys()
    alice, bob = start_agent("alice"), start_agent("bob")
    alice("allocate", {"size": 8192, "kind": "memfd"})
    bob("import_ticket", alice("ticket", 0))
    assert bob("get_fd", 0) == alice("get_fd", 0)
    assert memory_fds() == (memfds + 1, dmabufs)
    assert bufinfo().keys() == others
    alice("write", 0, 0, "0123")
    assert bob("read", 0, 0, 2) == "0123"
    alice("release", 0)
    bob("release", 0)
    eventually(lambda: memory_fds() == (memfds, dmabufs))


def test_a_ticket_is_the_only_way_in(start_agent: Start) -> None:
    """Neither a guessed ticket nor the object's path opens another user's buffer."""
    alice, bob = start_agent("alice"), start_agent("bob")
    path = alice("allocate", {"size": 4096})["paths"][0]
    ticket = alice("ticket", 0)
    guess = f"{int(ticket, 16) ^ 1:032x}"
    with pytest.raises(AgentError) as caught:
        bob("import_ticket", guess)
    assert caught.value.kind == "NoSuchBuffer"
    never = path[:-16] + f"{int(path[-16:], 16) ^ 1:016x}"
    call = ["gdbus", "call", "--system", "--dest", "org.udmabufd.Allocator1", "--object-path"]
    for member, arguments in (
        ("org.udmabufd.Buffer1.GetFd", ["@a{sv} {}"]),
        ("org.udmabufd.Buffer1.GetTicket", []),
        ("org.udmabufd.Buffer1.Release", []),
        ("org.udmabufd.Buffer1.SetName", ["mine"]),
        ("org.freedesktop.DBus.Properties.Get", ["org.udmabufd.Buffer1", "Size"]),
        ("org.freedesktop.DBus.Properties.GetAll", ["org.udmabufd.Buffer1"]),
        ("org.freedesktop.DBus.Introspectable.Introspect", []),
    ):
        # What does not belong to the caller answers as what never was.
        answers = [User("bob").run([*call, of, "--method", member, *arguments]) for of in (path, never)]
        assert [answer.returncode for answer in answers] == [1, 1]
        assert "org.udmabufd.Error.NoSuchBuffer" in answers[0].stderr
        assert answers[0].stderr.replace(path, never) == answers[1].stderr
    bob("import_ticket", ticket)
    assert bob("info", 0)["path"] == path


def test_every_descriptor_is_closed_at_exec(start_agent: Start, library: str) -> None:
    """However a descriptor came, programs that the client starts do not inherit it."""
    alice = start_agent("alice", UDMABUFD_DBUS_LIBRARY=library)
    bob = start_agent("bob", UDMABUFD_DBUS_LIBRARY=library)
    alice("allocate", {"size": 4096})
    alice("allocate", {"size": 4096, "kind": "memfd"})
    alice("allocate_many", 5, {"size": 4096})
    alice("create", {"size": 4096})
    alice("get_fd", 7)
    bob("import_ticket", alice("ticket", 0))
    bob("get_fd", 0)
    for agent, count in ((alice, 8), (bob, 1)):
        assert agent("cloexec") == [True] * (2 * count)
        own = [target for target in agent("own_descriptors") if target.startswith(("/dmabuf:", "/memfd:"))]
        assert len(own) == count
        inherited = agent("child_descriptors")
        assert len(inherited) >= 3, "the child lists what it has"
        assert not [target for target in inherited if target.startswith(("/dmabuf:", "/memfd:", "socket:"))]
