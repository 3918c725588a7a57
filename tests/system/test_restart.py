# SPDX-License-Identifier: MIT
"""The daemon killed between any two steps of what it does: after the next start everything agrees and nothing is lost.

Each operation is done again and again: killed before its first step, before its second, and so on, until it is
through. On a machine without udmabuf pipes stand in for dma-bufs (stepper.py).
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.bus.private_bus import PrivateBus
from tests.system import stepper
from tests.system.fake_manager import FakeManager
from tests.system.operations import OPERATIONS, Operation
from tests.system.world import SIZE, World, trapped
from udmabufd_client.contract import buffer_id

pytestmark = pytest.mark.host

MOST_STEPS = 60


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with PrivateBus() as made:
        yield made


@pytest.fixture
def manager(bus: PrivateBus) -> Iterator[FakeManager]:
    with trapped(bus) as made:
        made.start()
        yield made


@pytest.fixture
async def world(manager: FakeManager, bus: PrivateBus) -> AsyncIterator[World]:
    world = World(manager, bus.address)
    await world.open()
    await world.begin()
    yield world
    world.close()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_a_kill_between_any_two_steps(world: World, operation: type[Operation]) -> None:
    await world.end()
    for step in range(1, MOST_STEPS):
        if await world.run(operation(), step):
            break
    else:
        pytest.fail(f"not through after {MOST_STEPS} steps")
    print(f"{operation.__name__}: {step - 1} kills")
    assert step > 1, "no step was seen"


async def test_a_kill_between_any_two_steps_of_the_start(world: World, manager: FakeManager, long_run: bool) -> None:
    """There is much to be done: a caller died, another's buffers were not recorded, one that lingers is free."""
    await world.end()
    for step in range(1, MOST_STEPS, 1 if long_run else 3):
        await world.begin()
        gone, *_ = await world.first.allocate(size=SIZE, name="gone")
        lingers, *_ = await world.first.allocate(size=SIZE, name="lingers")
        kept, fd, _ = await world.second.allocate(size=SIZE, name="kept")
        world.stepper.reference(1)
        await world.first.call("Release", path=lingers)
        # Stored, and killed before the record.
        world.stepper.arm(2)
        with pytest.raises(Exception, match="without replying"):
            await world.first.allocate(size=SIZE, name="never told")
        assert manager.wait() == -signal.SIGKILL
        world.first.close()
        manager.environment[stepper.ARMED] = str(step)
        manager.spawn()
        manager.store.wait_until(lambda: manager.store.ready or not manager.running, "ready or dead")
        through = manager.running and await world.quiet()
        del manager.environment[stepper.ARMED]
        if not through:
            assert manager.wait() == -signal.SIGKILL
            manager.start()
        listed = await world.check()
        assert buffer_id(kept) in listed
        assert not {buffer_id(gone), buffer_id(lingers)} & set(listed)
        assert (await world.second.import_fd(fd))[0] == kept
        await world.end()
        if through:
            break
    else:
        pytest.fail(f"not through after {MOST_STEPS} steps")
    print(f"start: up to step {step}")
    assert step > 5, "few steps were seen"
