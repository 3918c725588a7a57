# SPDX-License-Identifier: MIT
"""Memory pressure as the kernel tells it: who is told of whose, how often, and in the sandbox of the unit."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.test_system_files import keys
from tests.unit.tools import TOP
from udmabufd.system.pressure import MACHINE, MemoryPressure, Source

pytestmark = [pytest.mark.guest, pytest.mark.root]

TRIGGER = b"some 100000 2000000\0"
WINDOW = 2.0
PATIENCE = 120.0

LOAD = """
import mmap, os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
print("ready", flush=True)
memory = mmap.mmap(-1, 96 << 20)
while True:
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
"""

IN_SANDBOX = """
import asyncio, logging, sys
sys.path[:0] = ["/src/daemon", "/src/client"]
from udmabufd.system.pressure import MACHINE, MemoryPressure, source_from_environment
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
async def main():
    own = source_from_environment()
    with MemoryPressure(lambda: None, [source for source in (own, MACHINE) if source]) as watching:
        print(*watching.watched)
asyncio.run(main())
"""

OF_A_SERVICE_THAT_STAYS = {
    "BusName",
    "ExecStart",
    "FileDescriptorStoreMax",
    "NotifyAccess",
    "Restart",
    "RestartSec",
    "Type",
    "WatchdogSec",
}


@contextmanager
def control_group(name: str) -> Iterator[Path]:
    """A control group whose processes must give memory back beyond 16 MiB, which they cannot."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    group = Path("/sys/fs/cgroup", name)
    group.mkdir()
    try:
        (group / "memory.high").write_text(str(16 << 20))
        yield group
    finally:
        if group.exists():
            group.rmdir()


@contextmanager
def load(group: Path) -> Iterator[None]:
    """A process in it that wants more."""
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(group)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event of its own)
            await asyncio.sleep(0.05)


class Times(list[float]):
    """When there was an event."""

    def __call__(self) -> None:
        self.append(time.monotonic())


async def test_who_is_told_of_whose_pressure() -> None:
    """The group that is short of memory, and who watches the machine; not a group that has all that it needs, however
    much it holds. At most once in each window, so the loop is idle meanwhile.
    """
    pressed, idle, machine = Times(), Times(), Times()
    with control_group("udmabufd-pressed-test") as short, control_group("udmabufd-idle-test") as other:
        with (
            MemoryPressure(pressed, [Source(str(short / "memory.pressure"), TRIGGER)]) as watching,
            MemoryPressure(idle, [Source(str(other / "memory.pressure"), TRIGGER)]) as elsewhere,
            MemoryPressure(machine, [MACHINE]) as everywhere,
        ):
            assert watching.watched == [str(short / "memory.pressure")]
            assert elsewhere.watched == [str(other / "memory.pressure")]
            assert everywhere.watched == [MACHINE.path]
            began = time.monotonic()
            with load(short):
                await until(lambda: len(pressed) >= 3 and len(machine) >= 1)
            ended = time.monotonic()
            assert idle == []
            # Some tenths of a second of tolerance for a loop that comes late.
            assert len(pressed) <= (ended - began) / (WINDOW - 0.5) + 1
            (total,) = [line for line in (other / "memory.pressure").read_text().splitlines() if "some" in line]
            assert total.endswith("total=0")


async def test_the_group_is_removed() -> None:
    """Watching ends, and the loop is not kept busy by a descriptor that is ready for ever."""
    events = Times()
    with control_group("udmabufd-removed-test") as group:
        with MemoryPressure(events, [Source(str(group / "memory.pressure"), TRIGGER)]) as watching:
            group.rmdir()
            await until(lambda: watching.watched == [])
    assert events == []


@pytest.mark.parametrize("trigger", [b"nonsense\0", b"some 200000 20000000\0"])
async def test_a_trigger_that_the_kernel_refuses(trigger: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Words that are none, and a window of 20 s."""
    caplog.set_level("INFO")
    with MemoryPressure(Times(), [Source(MACHINE.path, trigger)]) as watching:
        assert watching.watched == []
    assert "the kernel refuses the threshold" in caplog.text


def in_sandbox(*more: str) -> tuple[list[str], str]:
    """Run with the settings of the unit, but for `more`; return the paths that can be watched, and what was logged."""
    settings = keys((TOP / "systemd/udmabufd.service.in").read_text())
    properties = [
        f"--property={key}={value}"
        for key, values in settings.items()
        if key not in OF_A_SERVICE_THAT_STAYS
        for value in values
    ]
    command = ["systemd-run", "--quiet", "--wait", "--pipe", *properties, *more, "python3", "-c", IN_SANDBOX]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


def test_in_the_sandbox_of_the_unit() -> None:
    """Its control groups are read-only to it, but for the one file that systemd tells it of."""
    assert keys((TOP / "systemd/udmabufd.service.in").read_text())["ProtectControlGroups"] == ["yes"]
    (own, machine), _ = in_sandbox()
    assert own.startswith("/sys/fs/cgroup/udmabufd.slice/")
    assert own.endswith(".service/memory.pressure")
    assert machine == MACHINE.path


def test_in_a_sandbox_where_it_is_off() -> None:
    """An administrator can have it so."""
    watched, log = in_sandbox("--property=MemoryPressureWatch=off")
    assert watched == [MACHINE.path]
    assert "MemoryPressureWatch= is off" in log
