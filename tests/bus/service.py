# SPDX-License-Identifier: MIT
"""The service that the bus tests talk to: our own process on a private bus, or the installed one in the guest.

In the guest the tests run against udmabufd.service as systemd started it, sandbox and all, on the system bus; on any
other machine against `python -m udmabufd` on a private dbus-daemon that has the system bus's limits and our policy.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bus.private_bus import PrivateBus
from tests.kernel.witness import main_pid

IN_GUEST = os.environ.get("UDMABUFD_GUEST") == "1"
"""Whether this runs in the machine of tests/vm/run."""

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0
"""Seconds for a start or a stop; a guest without hardware virtualisation needs some of them."""


@dataclass
class RunningService:
    """Where the service is: bus address, process, and how to see its log. Without a process: the installed one."""

    address: str
    process: int | None = None
    log: Path | None = None

    @property
    def pid(self) -> int:
        """The service's process, which a test may have restarted."""
        return main_pid("udmabufd.service") if self.process is None else self.process

    def fds(self) -> dict[str, str]:
        """Return the open descriptors of the service's process and what each leads to."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found[entry.name] = str(entry.readlink())
            except OSError:
                continue  # Closed meanwhile.
        return found


@contextmanager
def own_service(
    address: str, *, config: str = "", library: str | None = None, program: Sequence[str] = ()
) -> Iterator[RunningService]:
    """Run `python -m udmabufd` on the bus at `address`; its log is shown when the test or the service fails.

    `program` are Python's arguments for another program, which takes those of the service.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="udmabufd-")))
        (folder / "udmabufd.toml").write_text(config)
        notify = stack.enter_context(_notify_socket(folder / "notify"))
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT / 'client'}",
            "NOTIFY_SOCKET": str(folder / "notify"),
        }
        if library is not None:
            environment["UDMABUFD_DBUS_LIBRARY"] = library
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *(program or ("-m", "udmabufd")),
                    "--bus",
                    address,
                    "--config",
                    str(folder / "udmabufd.toml"),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            _await_ready(process, notify)
            yield RunningService(address, process.pid, log)
        except BaseException:
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise
        finally:
            try:
                status = _terminate(process)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        if status not in (0, -signal.SIGKILL):
            print(log.read_text(errors="replace"), file=sys.stderr)
            raise AssertionError(f"the service ended with status {status}")


@contextmanager
def any_service() -> Iterator[RunningService]:
    """Yield the installed service in the guest, one of our own elsewhere."""
    if IN_GUEST:
        yield RunningService("unix:path=/run/dbus/system_bus_socket")
        return
    with PrivateBus() as bus, own_service(bus.address) as service:
        yield service


@contextmanager
def _notify_socket(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.setblocking(False)
        yield listener.fileno()


def _terminate(process: subprocess.Popen[bytes]) -> int:
    """Ask the process to stop, unless a test has done so, and return its status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait(TIMEOUT)


def _await_ready(process: subprocess.Popen[bytes], notify: int) -> None:
    """Wait for READY=1, or for the end of the process."""
    pidfd = os.pidfd_open(process.pid)
    try:
        deadline = time.monotonic() + TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([notify, pidfd], [], [], left)
            if notify in readable and b"READY=1" in os.read(notify, 4096).split(b"\n"):
                return
            if pidfd in readable:
                raise AssertionError(f"the service ended before it was ready, status {process.wait()}")
        raise AssertionError(f"the service was not ready within {TIMEOUT} s")
    finally:
        os.close(pidfd)
