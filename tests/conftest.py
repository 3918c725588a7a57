# SPDX-License-Identifier: MIT
"""What every tier shares: where it runs, strictness about skips, and the check that no descriptor is left open."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.bus.peer import Peer
from tests.bus.service import IN_GUEST, RunningService, any_service

STRICT = "UDMABUFD_STRICT"
"""Set by tests/run: a skipped test fails the run, for there everything that a test needs has been installed."""


def pytest_configure() -> None:
    """Take SIGINT and SIGHUP, which whoever starts a test run in the background may have made this process ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs the guest elsewhere, and what only --long asks for."""
    unzeroed = "init_on_alloc=0" in Path("/proc/cmdline").read_text().split()
    elsewhere = {"guest": not IN_GUEST, "host": IN_GUEST, "unzeroed": not unzeroed, "zeroed": unzeroed}
    left_out = [
        item
        for item in items
        if any(absent and item.get_closest_marker(marker) for marker, absent in elsewhere.items())
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Have the collection of garbage after each test pass over what is there before the first: it was the most of the
    time of many.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under tests/run no skip is expected."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(STRICT) and exitstatus == 0 and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line(f"{STRICT} is set: the skips below fail this run", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def long_run() -> bool:
    """Whether the full counts were asked for (tests/run --long)."""
    return os.environ.get("UDMABUFD_LONG") == "1"


def open_fds() -> set[str]:
    """Return the open descriptors of this process, each with what it leads to."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} -> {entry.readlink()}")
        except OSError:
            continue  # The descriptor of this very listing.
    return found


@pytest.fixture(autouse=True)
def no_fd_left_open() -> Iterator[None]:
    """Fail a test after which this process has descriptors open that it had not before."""
    before = open_fds()
    yield
    gc.collect()
    left = open_fds() - before
    assert not left, f"left open: {sorted(left)}"


@pytest.fixture(scope="session")
def service() -> Iterator[RunningService]:
    """The service that runs for all tests: the installed one in the guest, one on a private bus elsewhere."""
    with any_service() as running:
        yield running


@pytest.fixture
async def peer(service: RunningService) -> AsyncIterator[Peer]:
    """A connection to the service."""
    peer = await Peer.connect(service.address)
    yield peer
    peer.close()


@pytest.fixture
async def other(service: RunningService) -> AsyncIterator[Peer]:
    """Another one."""
    peer = await Peer.connect(service.address)
    yield peer
    peer.close()


@pytest.fixture
async def kind(peer: Peer) -> str:
    """The kind of buffer that shows most here: a dma-buf where the service can make one."""
    return "dma-buf" if await peer.get("UdmabufAvailable") else "memfd"
