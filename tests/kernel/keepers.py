# SPDX-License-Identifier: MIT
"""What can keep a dma-buf alive, one context manager each: they close the descriptor given and keep the memory."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.kernel.buffers import PAGE, bare_mapping, prime_import
from udmabufd.linux import fdstat
from udmabufd_base.fd import OwnedFd

Keeper = Callable[[OwnedFd], AbstractContextManager[None]]


@contextmanager
def duplicate(dma_buf: OwnedFd) -> Iterator[None]:
    """A second descriptor."""
    with dma_buf.dup():
        dma_buf.close()
        yield


@contextmanager
def fork(dma_buf: OwnedFd) -> Iterator[None]:
    """A child with a copy of the table."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(1)
    dma_buf.close()
    yield
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@contextmanager
def mapping(dma_buf: OwnedFd) -> Iterator[None]:
    """A mapping of a page, without a descriptor."""
    with bare_mapping(dma_buf.fileno(), PAGE):
        dma_buf.close()
        yield


@contextmanager
def in_flight(dma_buf: OwnedFd) -> Iterator[None]:
    """A descriptor on its way in a socket."""
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [dma_buf.fileno()])
        dma_buf.close()
        yield


@contextmanager
def o_path(dma_buf: OwnedFd) -> Iterator[None]:
    """A descriptor that gives no access and is in no count."""
    with OwnedFd(os.open(f"/proc/self/fd/{dma_buf.fileno()}", os.O_PATH | os.O_CLOEXEC)) as kept:
        assert fdstat.look(kept.fileno()).path_only
        dma_buf.close()
        yield


@contextmanager
def drm_import(node: Path, dma_buf: OwnedFd) -> Iterator[None]:
    """A driver that has imported it."""
    with open(node, "r+b", buffering=0) as card:
        prime_import(card.fileno(), dma_buf)
        dma_buf.close()
        yield
