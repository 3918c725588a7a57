# SPDX-License-Identifier: MIT
"""core.lingering: what nobody holds stays charged until its memory is free, and no longer; whatever happens meanwhile.

The memfds and their seals are the kernel's; see tests/unit/machine.py for the dma-bufs.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import mmap
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.machine import Killed, Life, Machine, clients_memfd, install, path_of
from tests.unit.time_loop import OneThread, TimeLoop, at_rest, run
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.errors import NoSuchBuffer
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK, LAST_PROOF
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.store import STATE_NAME
from udmabufd.linux import dmabuf, memfd
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import State

SIZE = 4 * PAGE_SIZE
SPEC = {"size": SIZE}
ALICE, BOB = 1000, 1001


class World:
    """A life on a machine, with two users."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.life: Life

    async def begin(self) -> None:
        """Start the service; both connections have lived on."""
        self.life = await Life.begin(self.machine, (":1.1", ":1.2"))
        self.alice, self.bob = self.life.holder(":1.1", ALICE), self.life.holder(":1.2", BOB)

    async def again(self) -> None:
        """Kill the service and start it again."""
        await self.life.kill()
        await self.begin()

    async def allocate(self, holder: Holder) -> tuple[Buffer, OwnedFd]:
        """Make a buffer; return it and its descriptor."""
        (grant,) = await self.life.service.allocate(holder, SPEC)
        return grant.buffer, grant.fd

    def charged(self, uid: int = ALICE) -> tuple[int, int]:
        """Bytes and buffers."""
        amounts = self.life.ledger.account(Owner(uid, "")).amounts
        return amounts[Resource.BYTES] + amounts[Resource.WRAPPED], amounts[Resource.BUFFERS]

    @property
    def stored(self) -> set[str]:
        """Names under which anything but the state is stored."""
        self.machine.handle_messages()
        return set(self.machine.stored) - {STATE_NAME}

    def nothing_is_left(self) -> None:
        """Check that the last buffer has gone without a trace."""
        assert self.charged() == self.charged(BOB) == (0, 0)
        assert not self.stored
        assert len(self.life.custody.registry) == 0
        assert len(self.life.custody.lingering) == 0


Scene = Callable[[World], Awaitable[None]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scene], None]:
    """Play a scene in a world of its own."""

    def play(scene: Scene) -> None:
        async def main() -> None:
            machine = Machine(Limits())
            install(monkeypatch, machine)
            world = World(machine)
            await world.begin()
            try:
                await scene(world)
            finally:
                await world.life.kill()
                machine.close()

        run(main())

    return play


Play = Callable[[Scene], None]


def test_a_buffer_that_nobody_references_is_gone_with_its_release(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        assert world.charged() == (SIZE, 1)
        assert len(world.stored) == 1
        fd.close()
        await world.life.service.release(world.alice, buffer.id)
        world.nothing_is_left()

    play(scene)


@pytest.mark.parametrize("kind", ["descriptor", "O_PATH", "mapping"])
def test_whatever_is_left_stays_charged_until_it_goes(play: Play, kind: str) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        assert buffer.memory is not None
        assert buffer.memory.memfd is not None
        mapping = None
        if kind == "mapping":
            # What the kernel refuses to seal: F_ADD_SEALS itself says EBUSY.
            mapping = mmap.mmap(buffer.memory.memfd.fileno(), SIZE)
        elif kind == "O_PATH":
            fd, whole = path_of(fd), fd
            whole.close()
        if mapping is not None:
            fd.close()
        loop = asyncio.get_running_loop()
        started = loop.time()
        await world.life.service.release(world.alice, buffer.id)
        assert loop.time() == started, "Release waits for one look, and for no reference to go"
        for _ in range(100):
            await asyncio.sleep(10)
            assert buffer.state is State.LINGERING
            assert world.charged() == (SIZE, 1)
            assert world.life.ledger.usage()[0].lingering == SIZE
            assert len(world.stored) == 1
        # Only who has a descriptor keeps the dma-buf; otherwise the witness alone is left, an open file of its own.
        assert (buffer.memory.dma_buf is None) == (kind != "descriptor")
        if mapping is not None:
            mapping.close()
        fd.close()
        await asyncio.sleep(LAST_LOOK if kind == "descriptor" else LAST_PROOF)
        world.nothing_is_left()

    play(scene)


def test_nothing_is_scheduled_while_nothing_lingers(play: Play) -> None:
    async def scene(world: World) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TimeLoop)
        buffer, fd = await world.allocate(world.alice)
        empty = await world.life.service.create(world.alice, SPEC)
        await at_rest()
        assert loop.timers == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await world.life.service.release(world.alice, buffer.id)
        await at_rest()
        assert loop.timers == 1
        fd.close()
        await asyncio.sleep(LAST_LOOK)
        await world.life.service.release(world.alice, empty.id)
        await at_rest()
        world.nothing_is_left()
        assert loop.timers == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene)


def test_it_looks_ever_more_rarely(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    async def scene(world: World) -> None:
        loop = asyncio.get_running_loop()
        buffer, fd = await world.allocate(world.alice)

        def fdinfo(fd: int) -> dmabuf.Fdinfo:
            looks.append(loop.time())
            return world.machine.fdinfo(fd)

        monkeypatch.setattr(dmabuf, "fdinfo", fdinfo)
        await world.life.service.release(world.alice, buffer.id)
        await asyncio.sleep(3600)
        fd.close()

    play(scene)
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert len(looks) < 3600 / LAST_LOOK + 15
    assert gaps[0] < 0.1
    assert all(later > earlier - 1e-6 for earlier, later in itertools.pairwise(gaps))
    assert max(gaps) == pytest.approx(LAST_LOOK)


def test_a_forged_or_transient_count_is_only_a_hint(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof a wrong count would end the charge, and the memory would stay."""

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        assert buffer.memory is not None
        unread = buffer.memory.inode
        fdinfo = world.machine.fdinfo
        monkeypatch.setattr(
            dmabuf,
            "fdinfo",
            lambda fd: dmabuf.Fdinfo(2, SIZE, "udmabuf", "", unread),
        )
        await world.life.service.release(world.alice, buffer.id)
        await asyncio.sleep(600)
        assert world.charged() == (SIZE, 1)
        monkeypatch.setattr(dmabuf, "fdinfo", fdinfo)
        fd.close()
        await asyncio.sleep(LAST_PROOF)
        world.nothing_is_left()

    play(scene)


def test_a_count_that_cannot_be_read_frees_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        fd.close()

        def fails(fd: int) -> None:
            raise OSError(errno.EACCES, "")

        with monkeypatch.context() as patch:
            patch.setattr(dmabuf, "fdinfo", fails)
            await world.life.service.release(world.alice, buffer.id)
            await asyncio.sleep(60)
            assert world.charged() == (SIZE, 1)
        await asyncio.sleep(LAST_LOOK)
        world.nothing_is_left()

    play(scene)


@pytest.mark.parametrize("error", [OSError(errno.ENOBUFS, "full"), OSError(errno.EMFILE, "no descriptor")])
def test_a_store_that_takes_nothing_for_a_while_only_delays(play: Play, error: OSError) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        fd.close()
        world.machine.store_errors = [error] * 3
        await world.life.service.release(world.alice, buffer.id)
        assert world.charged() == (SIZE, 1)
        await asyncio.sleep(LAST_LOOK)
        world.nothing_is_left()

    play(scene)


def test_a_store_that_does_not_tell_leaves_nothing_open(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        fd.close()

        async def fails(name: str | None = None) -> None:
            raise OSError(errno.ECONNREFUSED, "")

        with monkeypatch.context() as patch:
            patch.setattr(type(world.life.service.custody._store), "settled", lambda _, name="": fails(name))
            await world.life.service.release(world.alice, buffer.id)
            await asyncio.sleep(LAST_PROOF)
        world.nothing_is_left()

    play(scene)


def test_wrapped_memory_has_the_hint_alone(play: Play) -> None:
    async def scene(world: World) -> None:
        with clients_memfd(SIZE) as backing:
            buffer = await world.life.service.wrap(world.alice, [backing], [(0, 0, SIZE)], {})
            grant = await world.life.service.get_fd(world.alice, buffer.id)
            await world.life.service.release(world.alice, buffer.id)
            await asyncio.sleep(600)
            assert buffer.state is State.LINGERING
            assert world.life.ledger.total(Resource.WRAPPED) == SIZE
            with path_of(grant.fd):
                grant.fd.close()
                await asyncio.sleep(LAST_LOOK)
                world.nothing_is_left()
            # The seals are the client's own.
            assert not memfd.get_seals(backing.fileno()) & memfd.F_SEAL_WRITE

    play(scene)


def test_whoever_presents_a_descriptor_brings_it_back_to_life(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        ticket = buffer.ticket
        await world.life.service.release(world.alice, buffer.id)
        await asyncio.sleep(60)
        assert await world.life.service.import_fd(world.bob, fd) is buffer
        assert buffer.state is State.BACKED
        assert (world.charged(), world.charged(BOB)) == ((0, 0), (SIZE, 1))
        assert world.life.ledger.usage()[0].lingering == 0
        await at_rest()
        await asyncio.sleep(LAST_LOOK)
        assert len(world.life.custody.lingering) == 0
        assert await world.life.service.import_ticket(world.alice, ticket) is buffer
        world.life.service.drop(world.alice)
        world.life.service.drop(world.bob)
        fd.close()
        await asyncio.sleep(LAST_LOOK)
        world.nothing_is_left()

    play(scene)


@pytest.mark.parametrize("kept", ["descriptor", "O_PATH"])
def test_a_ticket_brings_it_back_while_there_is_a_dma_buf(play: Play, kept: str) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        if kept == "O_PATH":
            fd, whole = path_of(fd), fd
            whole.close()
        await world.life.service.release(world.alice, buffer.id)
        await world.again()
        await asyncio.sleep(LAST_LOOK)
        if kept == "O_PATH":
            # Its dma-buf is given up; what an importer got would be other memory.
            with pytest.raises(NoSuchBuffer):
                await world.life.service.import_ticket(world.bob, buffer.ticket)
            assert world.charged() == (SIZE, 1)
        else:
            found = await world.life.service.import_ticket(world.bob, buffer.ticket)
            assert (found.id, found.state) == (buffer.id, State.BACKED)
            assert world.charged(BOB) == (SIZE, 1)
            world.life.service.drop(world.bob)
        fd.close()
        await asyncio.sleep(LAST_PROOF)
        world.nothing_is_left()

    play(scene)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_charge_ends_when_the_last_descriptor_is_closed(
    play: Play, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's, too, which the service manager closes in its own time."""

    async def scene(world: World) -> None:
        if wrapped:
            with clients_memfd(SIZE) as backing:
                buffer = await world.life.service.wrap(world.alice, [backing], [(0, 0, SIZE)], {})
        else:
            buffer, fd = await world.allocate(world.alice)
            fd.close()
        gate, real = Gate(), world.life.store.settled

        async def slow(name: str = "") -> None:
            await gate()
            await real(name)

        monkeypatch.setattr(world.life.store, "settled", slow)
        releasing = asyncio.create_task(world.life.service.release(world.alice, buffer.id))
        await gate.reached.wait()
        assert world.charged()[0] == SIZE
        gate.open()
        await releasing
        world.nothing_is_left()

    play(scene)


def test_a_refused_caller_is_not_held_up_by_what_its_user_let_go_of(play: Play) -> None:
    """Before a quota refuses, what lingers of that user is looked at: nobody has to wait for the next look."""

    async def scene(world: World) -> None:
        world.machine.limits = Limits(max_bytes_per_user=SIZE)
        await world.again()
        loop = asyncio.get_running_loop()
        _, fd = await world.allocate(world.alice)
        world.life.service.drop(world.alice)
        alice = world.life.holder(":1.3", ALICE)
        await asyncio.sleep(600)
        fd.close()
        before = loop.time()
        again, fd = await world.allocate(alice)
        assert loop.time() == before
        assert world.charged() == (SIZE, 1)
        fd.close()
        await world.life.service.release(alice, again.id)
        world.nothing_is_left()

    play(scene)


def test_a_user_with_many_proofs_that_fail_holds_up_nobody_else(play: Play) -> None:
    """Each takes the kernel up to 400 ms, and there is one thread: users take turns."""

    async def scene(world: World) -> None:
        await world.life.kill()
        world.life = await Life.begin(world.machine, (":1.1", ":1.2"), prover=OneThread(0.4))
        alice, bob = world.life.holder(":1.4", ALICE), world.life.holder(":1.5", BOB)
        loop = asyncio.get_running_loop()
        shadows = []
        for _ in range(100):
            _, fd = await world.allocate(alice)
            shadows.append(path_of(fd))
            fd.close()
        theirs = [await world.allocate(bob) for _ in range(10)]
        world.life.service.drop(alice)
        longest = 0.0
        await asyncio.sleep(1)
        for buffer, fd in theirs:
            fd.close()
            started = loop.time()
            await world.life.service.release(bob, buffer.id)
            longest = max(longest, loop.time() - started)
            await asyncio.sleep(3)
        assert longest <= 4 * 0.4, f"a Release took {longest} s"
        for shadow in shadows:
            shadow.close()
        await asyncio.sleep(100 * 0.4 + 2 * LAST_PROOF)
        world.nothing_is_left()

    play(scene)


class Gate:
    """Stops one kind of call at its beginning until open() is called."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._go = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self._go.wait()

    def open(self) -> None:
        self._go.set()


@pytest.mark.parametrize("ends", [False, True], ids=["stays", "ends again"])
@pytest.mark.parametrize("step", ["put", "settled"])
def test_an_import_during_the_withdrawal(play: Play, step: str, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that reaches the service after it has counted the references: as long as the dma-buf is there, the
    importer has it; afterwards there is nothing to import, and the charge stays for as long as that descriptor.
    """

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        assert buffer.memory is not None
        inode = buffer.memory.inode
        gate, real = Gate(), getattr(world.life.store, step)

        async def slow(*args: object) -> None:
            await gate()
            await real(*args)

        fdinfo = world.machine.fdinfo
        # What was read before the message with the descriptor arrived.
        monkeypatch.setattr(dmabuf, "fdinfo", lambda _: dmabuf.Fdinfo(2, SIZE, "udmabuf", "", inode))
        monkeypatch.setattr(world.life.store, step, slow)
        releasing = asyncio.create_task(world.life.service.release(world.alice, buffer.id))
        await gate.reached.wait()
        if step == "put":
            monkeypatch.setattr(dmabuf, "fdinfo", fdinfo)
            assert await world.life.service.import_fd(world.bob, fd) is buffer
            if ends:
                world.life.service.drop(world.bob)
        else:
            with pytest.raises(NoSuchBuffer):
                await world.life.service.import_fd(world.bob, fd)
        gate.open()
        await releasing
        await asyncio.sleep(LAST_PROOF)
        assert len(world.stored) == 1
        if step == "put":
            assert (world.charged(), world.charged(BOB)) == ((0, 0), (SIZE, 1))
            assert buffer.memory.dma_buf is not None
            assert buffer.memory.memfd is not None
            assert not memfd.get_seals(buffer.memory.memfd.fileno()) & memfd.F_SEAL_WRITE
            assert (buffer.state is State.LINGERING) == ends
            assert len(world.life.custody.lingering) == ends
            if not ends:
                world.life.service.drop(world.bob)
        else:
            assert world.charged() == (SIZE, 1)
        fd.close()
        await asyncio.sleep(LAST_PROOF)
        world.nothing_is_left()

    play(scene)


def test_the_witness_keeps_its_charge_while_it_is_proved_and_cannot_be_imported(play: Play) -> None:
    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        shadow = path_of(fd)
        fd.close()
        await world.life.service.release(world.alice, buffer.id)
        await asyncio.sleep(1)
        assert buffer.memory is not None
        assert buffer.memory.dma_buf is None
        assert buffer.memory.memfd is not None
        # Nobody was ever given the memfd; even with it there is nothing to be had.
        with buffer.memory.memfd.dup() as stolen, pytest.raises(Exception, match="No such buffer"):
            await world.life.service.import_fd(world.bob, stolen)
        assert world.charged() == (SIZE, 1)
        shadow.close()
        await asyncio.sleep(LAST_PROOF)
        world.nothing_is_left()

    play(scene)


def _effects_of_a_release(play: Play, reference: bool) -> int:
    counted: list[int] = []

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(world.alice)
        shadow = path_of(fd) if reference else None
        fd.close()
        world.machine.effects.clear()
        await world.life.service.release(world.alice, buffer.id)
        await asyncio.sleep(LAST_PROOF)
        counted.append(len(world.machine.effects))
        if shadow is not None:
            shadow.close()

    play(scene)
    return counted[0]


@pytest.mark.parametrize("reference", [False, True], ids=["free", "opened O_PATH"])
def test_killed_between_any_two_steps_of_a_release(play: Play, reference: bool) -> None:
    steps = _effects_of_a_release(play, reference)
    assert steps >= (6 if reference else 9)
    for number in range(1, steps + 1):

        async def scene(world: World, number: int = number) -> None:
            buffer, fd = await world.allocate(world.alice)
            shadow = path_of(fd) if reference else None
            fd.close()
            world.machine.effects.clear()
            world.machine.kill_after = number
            try:
                await world.life.service.release(world.alice, buffer.id)
                await asyncio.sleep(LAST_PROOF)
            except Killed:
                pass
            await world.again()
            await asyncio.sleep(LAST_PROOF)
            held = [b for b in world.life.custody.registry if world.alice in b.shares]
            if held:
                # The record of the share had not been erased: it was never released.
                assert number == 1, f"killed after {number} of {steps}: {world.machine.effects}"
                await world.life.service.release(world.alice, buffer.id)
                await asyncio.sleep(LAST_PROOF)
            if shadow is not None:
                assert world.charged() == (SIZE, 1), f"killed after {number} of {steps}"
                assert len(world.stored) == 1
                shadow.close()
                await asyncio.sleep(LAST_PROOF)
            world.nothing_is_left()

        play(scene)
