# SPDX-License-Identifier: MIT
"""A heap or card whose driver does not answer: the service starts without it, and serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.bus.peer import Peer
from tests.bus.private_bus import PrivateBus
from tests.system.fake_manager import FakeManager
from udmabufd_base.errors import RemoteError

pytestmark = pytest.mark.host

DAEMON = """\
import sys, threading
from types import SimpleNamespace
from udmabufd import app
from udmabufd.__main__ import main
from udmabufd.linux import dma_heap
from udmabufd.system.udev import UdevEvents

def present(self, subsystem, names):
    if subsystem != "dma_heap":
        return []
    path = "/sys/devices/virtual/dma_heap/reserved"
    return [SimpleNamespace(
        subsystem=subsystem, sys_name="reserved", device_node="/dev/dma_heap/reserved", sys_path=path)]

def open_heap(path):
    print("opening", path, file=sys.stderr, flush=True)
    threading.Event().wait()

UdevEvents.present = present
dma_heap.open_heap = open_heap
app.PROBE_TIMEOUT = 0.5
sys.exit(main())
"""
"""udmabufd on a machine with one heap, whose driver does not return from open()."""


@pytest.fixture
def bus() -> Iterator[PrivateBus]:
    with PrivateBus() as made:
        yield made


async def test_a_heap_that_does_not_answer_keeps_nobody_waiting(bus: PrivateBus) -> None:
    with FakeManager(bus.address, command=[sys.executable, "-c", DAEMON]) as manager:
        manager.start()
        assert "opening /dev/dma_heap/reserved" in manager.log_text()
        peer = await Peer.connect(bus.address)
        _, fd, _ = await peer.allocate(size=4096, kind="memfd")
        fd.close()
        # Until it answers, there is no such allocator.
        with pytest.raises(RemoteError, match="heap:reserved") as caught:
            await peer.allocate(size=4096, allocator="heap:reserved")
        assert caught.value.name.endswith(".NoAllocator")
        peer.close()
        # No signal but this one ends a process while a driver does not return.
        manager.kill()
