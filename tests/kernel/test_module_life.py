# SPDX-License-Identifier: MIT
"""The module loaded and unloaded over and over, and used by several processes at once: the kernel warns of nothing."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from tests.kernel import areas, frames, modules
from tests.kernel.areas import area
from tests.kernel.buffers import PAGE
from tests.kernel.cachebuffers import ATTRIBUTES, EXCLUSIVE, create, create_list, is_free, memory
from tests.kernel.hugepools import HUGE
from tests.kernel.pagetables import PageTables
from udmabufd.linux import dmabuf, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

LOADS = 100
PAGES = 64
SIZE = PAGES * PAGE
PROCESSES = 4


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """The kernel may warn of none of this."""
    watch = modules.Watch()
    yield
    watch.assert_silent()


def test_a_hundred_times() -> None:
    """Loaded, used with each attribute, unloaded."""
    with memory("shmem", SIZE) as backing:
        for turn in range(LOADS):
            modules.load()
            with udmabuf.open_device(str(modules.NODE)) as cache:
                for attribute in ATTRIBUTES:
                    with create(cache, backing, attribute, SIZE) as made, mmap.mmap(made.fileno(), SIZE) as view:
                        view[turn * 7 % SIZE] = turn
                        assert os.pread(backing.fileno(), 1, turn * 7 % SIZE) == bytes([turn])
            modules.unload()
            assert not modules.NODE.exists()
        assert is_free(backing)


def test_a_module_in_use_stays() -> None:
    """With the device open, and for as long as there is a buffer, mapped or not."""
    with memory("shmem", SIZE) as backing, modules.udmabuf_cache() as node:
        with udmabuf.open_device(str(node)) as cache:
            assert not removable()
            made = create(cache, backing, "write-combine", SIZE)
        with area(made.fileno(), SIZE) as address:
            made.close()
            assert not removable()
            areas.write(address, SIZE)
            assert os.pread(backing.fileno(), SIZE, 0)[::PAGE] == b"\1" * PAGES


def removable() -> bool:
    """Try to unload the module."""
    return not subprocess.run(["rmmod", modules.NAME], stderr=subprocess.DEVNULL, check=False).returncode


def test_parameters_at_loading() -> None:
    """Given to insmod, and told by the kernel."""
    with modules.udmabuf_cache(list_limit=3, size_limit_mb=5):
        assert udmabuf.read_limits(modules.PARAMETERS) == udmabuf.Limits(list_limit=3, size_limit_mb=5)


def test_several_processes(long_run: bool) -> None:
    """They fight over some pages and have others to themselves; mappings, faults, forks and ends in any order."""
    rounds = 300 if long_run else 40
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    with modules.udmabuf_cache() as node, memory("shmem", SIZE) as shared, memory("hugetlb", HUGE) as huge:
        where = frames.of_file(shared.fileno(), SIZE) + frames.of_file(huge.fileno(), HUGE)
        with ExitStack() as children:
            for number in range(PROCESSES):
                children.enter_context(child(partial(fight, str(node), shared, huge, seed + number, rounds)))
        with PageTables() as tables:
            assert {page.kind for page in tables.direct_maps(address // PAGE for address in where)} == {"WB"}
        assert is_free(shared)
        assert is_free(huge)


@contextmanager
def child(work: Callable[[], None]) -> Iterator[None]:
    """A process that does the work, and must have done it without an error by the end of the block."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield
    finally:
        _, status = os.waitpid(pid, 0)
        assert status == 0, "a process failed; its words are beside this"


def fight(node: str, shared: OwnedFd, huge: OwnedFd, seed: int, rounds: int) -> None:
    """What each of the processes does."""
    dice = random.Random(seed)
    made = 0
    with udmabuf.open_device(node) as cache, memory("shmem", SIZE) as own:
        for _ in range(rounds):
            backing = dice.choice([shared, huge, own])
            attribute = dice.choice(list(ATTRIBUTES))
            pages = [dice.randrange(PAGES) * PAGE for _ in range(dice.randrange(1, 9))]
            try:
                if dice.random() < 0.5:
                    buffer = create_list(cache, [(backing, offset, PAGE) for offset in pages], attribute)
                    size = len(pages) * PAGE
                else:
                    size = SIZE - pages[0]
                    buffer = create(cache, backing, attribute, size, pages[0])
            except OSError as error:
                # Somebody else has such a page with another attribute, or to himself.
                assert backing is not own
                assert error.errno == errno.EINVAL
                continue
            made += 1
            use(buffer, size, dice)
        for attribute in EXCLUSIVE:
            create(cache, own, attribute, SIZE).close()
        assert is_free(own)
    assert made > rounds // 4, f"only {made} of {rounds} buffers came about"


def use(buffer: OwnedFd, size: int, dice: random.Random) -> None:
    """Map a buffer, and end it while it is in use."""
    with ExitStack() as stack:
        address = stack.enter_context(area(buffer.fileno(), size))
        if dice.random() < 0.3:
            toucher = threading.Thread(target=areas.write, args=(address, size))
            toucher.start()
            buffer.close()
            areas.read(address, size)
            toucher.join()
            return
        with buffer:
            second = stack.enter_context(area(buffer.fileno(), size))
            dmabuf.sync_start(buffer.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
            areas.write(second, size)
            dmabuf.sync_end(buffer.fileno(), dmabuf.DMA_BUF_SYNC_WRITE)
        if dice.random() < 0.3:
            with areas.child(address, size):
                stack.close()
        elif dice.random() < 0.3:
            with areas.moved(address, size) as there:
                areas.read(there, size)
