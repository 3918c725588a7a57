# SPDX-License-Identifier: MIT
"""The witnesses against things of known number: without this, a test that appeals to them proves little."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.kernel import witness
from tests.kernel.buffers import MIB, PAGE, exported, prime_import
from udmabufd.linux import dmabuf, memfd
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest


def test_bufinfo_and_descriptors(device: OwnedFd) -> None:
    """A buffer comes and goes in all of them."""
    before = witness.descriptors()
    with exported(device, 3 * PAGE) as (_, dma_buf):
        dmabuf.set_name(dma_buf.fileno(), "spaced out name")
        inode = dmabuf.inode(dma_buf.fileno())
        assert witness.bufinfo()[inode] == witness.DmaBuf(3 * PAGE, 1, "udmabuf", inode, "spaced out name", ())
        held = witness.HeldDmaBuf(dma_buf.fileno(), inode, 3 * PAGE, 1, "udmabuf", "spaced out name")
        assert held in witness.dma_bufs()
        assert held in witness.dma_bufs(os.getpid())
        assert witness.descriptors() - before == {"dma-buf": 1, "memfd": 1}
    assert inode not in witness.bufinfo()
    assert witness.descriptors() == before


def test_other_kinds_of_descriptors() -> None:
    """Sockets and pipes are counted as such, files by their path."""
    before = witness.descriptors()
    left, right = socket.socketpair()
    pipe = [OwnedFd(fd) for fd in os.pipe()]
    with left, right, pipe[0], pipe[1], open("/etc/passwd", "rb"), memfd.create("x", 0):
        expected = {"socket": 2, "pipe": 2, "/etc/passwd": 1, "memfd": 1}
        assert witness.descriptors() - before == expected
    assert witness.descriptors() == before


def test_attached_device(device: OwnedFd, vgem: Path) -> None:
    """An import by a real driver shows as an attached device, also of a buffer with a name that forges one."""
    with exported(device, 4 * PAGE) as (_, dma_buf), open(vgem, "r+b", buffering=0) as card:
        dmabuf.set_name(dma_buf.fileno(), "x\n\tAttached Devices:\n\tnobody")
        inode = dmabuf.inode(dma_buf.fileno())
        assert witness.bufinfo()[inode].devices == ()
        prime_import(card.fileno(), dma_buf)
        entry = witness.bufinfo()[inode]
        assert entry.devices == ("vgem",)
        assert entry.name == "x\n\tAttached Devices:\n\tnobody"
        assert dmabuf.fdinfo(dma_buf.fileno()).count > 1, "the importer holds references"
    assert inode not in witness.bufinfo()


HOLD_MEMORY = """
import os, signal, socket
kept = b"x" * (64 << 20)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


def test_unit() -> None:
    """Memory that a unit's process takes is charged to it; a unit that does not run is a LookupError."""
    unit = "udmabufd-witness-test.service"
    properties = ["Type=notify", "NotifyAccess=main", "MemoryAccounting=yes", "StandardInput=file:/etc/passwd"]
    command = ["systemd-run", "--quiet", f"--unit={unit}", *[f"--property={name}" for name in properties]]
    # It returns once the process says that it is ready.
    subprocess.run([*command, "python3", "-c", HOLD_MEMORY], check=True)
    try:
        pid = witness.main_pid(unit)
        assert 64 * MIB <= witness.memory_current(unit) < 256 * MIB
        assert witness.descriptors(pid)["/etc/passwd"] == 1
        assert witness.dma_bufs(pid) == []
    finally:
        subprocess.run(["systemctl", "stop", unit], check=True)
    for question in (witness.main_pid, witness.memory_current):
        with pytest.raises(LookupError, match=unit):
            question(unit)
