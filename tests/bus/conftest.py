# SPDX-License-Identifier: MIT
"""Fixtures for tests on a real bus. That no test leaves a file descriptor behind is checked for all tiers, above."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from tests.bus.echo_service import EchoService
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from udmabufd_base.codec import LIBRARY
from udmabufd_base.connection import Connection


def pytest_report_header() -> str:
    """Name the D-Bus library of this run: the tier is run once with each."""
    return f"D-Bus library: {LIBRARY}"


@pytest.fixture
def private_bus() -> Iterator[PrivateBus]:
    """A bus with the rules and limits of a system bus, and the project's policy."""
    with PrivateBus() as bus:
        yield bus


@pytest.fixture
def open_bus() -> Iterator[PrivateBus]:
    """A bus with the limits of a system bus on which anybody may call anybody."""
    with PrivateBus(policies=[], extra_policy=OPEN_POLICY) as bus:
        yield bus


@pytest.fixture
async def connect(open_bus: PrivateBus) -> AsyncIterator[Callable[..., Awaitable[Connection]]]:
    """Open connections to `open_bus` that are closed at the end; arguments are those of Connection.open."""
    connections: list[Connection] = []

    async def _connect(receive_fds: bool = True, **arguments: Any) -> Connection:
        connections.append(await Connection.open(open_bus.address, receive_fds=receive_fds, **arguments))
        return connections[-1]

    yield _connect
    for connection in connections:
        connection.close()


@pytest.fixture
async def echo_service(connect: Callable[..., Awaitable[Connection]]) -> EchoService:
    """An echo service on `open_bus`."""
    service = EchoService()
    service.connection = await connect(handler=service.handle)
    return service
