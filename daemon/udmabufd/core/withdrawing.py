# SPDX-License-Identifier: MIT
"""Giving up the dma-buf of memory, and keeping its memfd: of a buffer that lingers, as a witness that its pages are
free; of one that is evicted, as what it comes back from.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from udmabufd.core.memory import Memory
from udmabufd.core.store import Store
from udmabufd.core.workers import Workers
from udmabufd.linux import memfd

log = logging.getLogger(__name__)


async def withdraw(
    store: Store,
    workers: Workers,
    memory: Memory,
    former: str,
    uid: int,
    commit: Callable[[Memory, str], bool],
) -> bool:
    """Put the memfd of `memory`, which is stored as `former`, in its place, and close the rest; return whether that
    was done. `uid` is whose turn at the store it is; `commit` takes the memory that is left and its name in the
    store, or says that it is not to be. Raises OSError, and has done nothing.

    FDSTOREREMOVE takes all descriptors of a name, so the memfd is stored under another one first, as an open file of
    its own: the store takes no file twice. Whenever the service is killed, one of the two is there.
    """
    assert memory.memfd is not None
    kept = memfd.reopen(memory.memfd.fileno())
    stored_as = store.take_name()
    try:
        await store.put(stored_as, [kept], uid)
        done = commit(dataclasses.replace(memory, memfd=kept, dma_buf=None, hold=None), stored_as)
    except BaseException:
        kept.close()
        store.drop(stored_as)
        raise
    if not done:
        store.drop(stored_as)
        kept.close()
        return False
    store.drop(former)
    # The store's reference to the dma-buf ends with the name.
    await settled(store, former)
    await workers.submit(memory.close)
    return True


async def settled(store: Store, name: str) -> None:
    """Wait until the store has dropped `name`; where that cannot be asked, what follows is done all the same."""
    try:
        await store.settled(name)
    except OSError as error:
        log.warning("The service manager does not tell whether it has dropped descriptors: %s", error)
