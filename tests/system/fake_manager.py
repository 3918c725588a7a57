# SPDX-License-Identifier: MIT
"""FakeManager: runs the daemon as systemd does, with a store of descriptors, on machines where systemd is not PID 1.

with PrivateBus() as bus, FakeManager(bus.address, config="[limits]\\nmax_buffers = 10\\n") as manager:
    manager.start()
    ...
    manager.kill()
    manager.start()
    assert manager.stored == before
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests.system.fake_store import FakeStore

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0
"""Seconds for a start or a stop."""

FIRST_FD = 3

OURS = ("NOTIFY_SOCKET", "FDSTORE", "SYSTEMD_EXEC_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "WATCHDOG_USEC")
"""Variables that the service gets from its manager and from nobody else."""

SHELL = 'ulimit -n "$1" && shift && export LISTEN_PID=$$ SYSTEMD_EXEC_PID=$$ && exec "$@"'
"""Becomes the service: only the process itself knows its number beforehand."""


class FakeManager:
    """One service: `python -m udmabufd` on the bus at `address`, started, killed and stopped as a test says.

    `config` is what udmabufd.toml says. `command` takes the place of `python -m udmabufd`, for instance a script that
    injects a fault; it gets the arguments --bus and --config and must stay the same process (exec). `store_size` is
    FileDescriptorStoreMax=, `nofile` LimitNOFILE=, `watchdog` WatchdogSec= in seconds. The store stays over kill(),
    the death of the service and restart(); stop() discards it. Usable from any one thread; nothing here needs a loop.
    """

    def __init__(
        self,
        address: str,
        *,
        config: str = "",
        command: Sequence[str] = (sys.executable, "-m", "udmabufd"),
        environment: dict[str, str] | None = None,
        store_size: int = 3008,
        nofile: int = 5056,
        watchdog: float | None = None,
    ) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="udmabufd-")))
        """For what a test wants to have next to the service."""
        self.config = self.folder / "udmabufd.toml"
        self.config.write_text(config)
        self.log = self.folder / "log"
        self.store = self._stack.enter_context(FakeStore(self.folder / "notify", size=store_size))
        self.command = list(command)
        self.environment = {
            "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT / 'client'}",
            **(environment or {}),
        }
        self.status: int | None = None
        """How the service ended: its exit status, or the negative signal; None while it runs, or never did."""
        self._address = address
        self._nofile = nofile
        self._watchdog = watchdog
        self._pid: int | None = None
        self._reaper: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            try:
                if self.running:
                    status = self._end(signal.SIGTERM)
                    assert status == 0 or kind is not None, f"the service ended with status {status}"
            except BaseException:
                kind = kind or AssertionError
                raise
            finally:
                if kind is not None:
                    print(self.log_text(), file=sys.stderr)

    # ---- the service --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The service's process, or what it was."""
        assert self._pid is not None, "the service was never started"
        return self._pid

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._pid is not None and self.status is None

    @property
    def stored(self) -> dict[str, list[int]]:
        """The inodes of what is stored, by name, oldest first."""
        self.store.drain()
        return self.store.stored

    def spawn(self) -> None:
        """Start the service with everything that is stored, and do not wait for it."""
        assert not self.running, "the service runs already"
        self.store.drain()
        handed = self.store.hand_over()
        variables = {key: value for key, value in os.environ.items() if key not in OURS} | self.environment
        variables |= {"NOTIFY_SOCKET": self.store.address, "FDSTORE": str(self.store.size)}
        if handed:
            variables |= {"LISTEN_FDS": str(len(handed)), "LISTEN_FDNAMES": ":".join(name for name, _ in handed)}
        if self._watchdog is not None:
            variables["WATCHDOG_USEC"] = str(round(self._watchdog * 1e6))
        arguments = [*self.command, "--bus", self._address, "--config", str(self.config)]
        shell = ["/bin/sh", "-c", SHELL, "sh", str(self._nofile), *arguments]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(self.log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        self.store.ready = False
        self.status = None
        with _moved([fd for _, fd in handed]) as fds:
            actions += [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds, FIRST_FD)]
            # Held until main_pid is known: the service may speak at once.
            with self.store.paused():
                self._pid = os.posix_spawn(shell[0], shell, variables, file_actions=actions)
                self.store.main_pid = self._pid
        self._reaper = threading.Thread(target=self._reap, args=(self._pid,), daemon=True)
        self._reaper.start()

    def start(self, timeout: float = TIMEOUT) -> None:
        """Start the service with everything that is stored, and wait until it is ready."""
        self.spawn()
        self.store.wait_until(lambda: self.store.ready or not self.running, "ready", timeout)
        if not self.store.ready:
            raise AssertionError(f"the service ended before it was ready, status {self.status}\n{self.log_text()}")

    def kill(self) -> None:
        """End the service at once and without warning; what it had said is heard."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ask the service to end, as `systemctl stop` does, and discard the store; return its status."""
        status = self._end(signal.SIGTERM)
        self.store.drain()
        self.store.discard()
        return status

    def restart(self) -> None:
        """As `systemctl restart`: ask it to end, and start it with what is stored then."""
        status = self._end(signal.SIGTERM)
        assert status == 0, f"the service ended with status {status}\n{self.log_text()}"
        self.start()

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait until the service has ended by itself; return its status."""
        self.store.wait_until(lambda: not self.running, "at an end", timeout)
        assert self.status is not None
        return self.status

    def log_text(self) -> str:
        """Return what the service wrote, in all its lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something that follows from what the service tells, e.g. `lambda: "memfd" in store.status`."""
        self.store.wait_until(lambda: condition() or not self.running, what)
        assert condition(), f"the service ended, status {self.status}, before it was {what}"

    def paused(self) -> AbstractContextManager[None]:
        """Do not read what the service says: its socket gets full."""
        return self.store.paused()

    def _end(self, number: int) -> int:
        if self.running:
            os.kill(self.pid, number)
        try:
            return self.wait()
        except AssertionError:
            # Whatever it hangs in, it must not outlive the test.
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            raise

    def _reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        self.store.notice()


@contextmanager
def _moved(fds: list[int]) -> Iterator[list[int]]:
    """Yield copies of `fds` beyond the numbers that they get in the service."""
    beyond = FIRST_FD + len(fds)
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond))
        yield copies
    finally:
        for copy in copies:
            os.close(copy)
