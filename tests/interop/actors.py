# SPDX-License-Identifier: MIT
"""The demo's two processes, each as an unprivileged user of its own: the compositor and the client.

Starting them, waiting for what they say, ending them. The order of things, and what to think of the result, is
demo.py's affair.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.interop.users import PATIENCE, User

HERE = Path(__file__).parent


class DemoError(Exception):
    """The demo cannot go on, or shows something wrong; the text says what, and what to do."""


class Compositor:
    """Weston, headless, drawing with GL in software, with the client's window over the whole screen."""

    def __init__(self, user: User, client: User, work: Path, size: tuple[int, int]) -> None:
        self._user = user
        self._size = size
        self._home = work / "compositor"
        self._home.mkdir(mode=0o700)
        os.chown(self._home, user.uid, user.gid)
        # The compositor makes its socket in a folder whose group is the client's, so that the client may connect.
        meeting = work / "display"
        meeting.mkdir()
        os.chown(meeting, user.uid, client.gid)
        meeting.chmod(0o2750)
        self.display = meeting / "wayland"
        self._environment = {"XDG_RUNTIME_DIR": str(self._home), "WAYLAND_DISPLAY": str(self.display)}
        self.log = work / "weston.log"

    @contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """Start the compositor; what is yielded waits until it serves clients. Raises DemoError."""
        command = ["weston", "--no-config", "--backend=headless", "--renderer=gl", "--shell=kiosk", "--idle-time=0"]
        command += [f"--width={self._size[0]}", f"--height={self._size[1]}", f"--socket={self.display}"]
        # --debug lets weston-screenshooter in; systemd-notify.so says when the compositor is ready.
        command += ["--debug", "--modules=systemd-notify.so"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("wb") as log:
            path = self._home / "notify"
            ready.bind(str(path))
            os.chown(path, self._user.uid, self._user.gid)
            environment = self._environment | {"NOTIFY_SOCKET": str(path)}
            del environment["WAYLAND_DISPLAY"]
            process = self._user.start(
                command, home=self._home, environment=environment, stdout=log, stderr=subprocess.STDOUT
            )

            def wait_until_ready() -> None:
                ready.settimeout(1.0)
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline and process.poll() is None:
                    try:
                        if b"READY=1" in ready.recv(4096).splitlines():
                            return
                    except TimeoutError:
                        continue
                raise DemoError("Weston did not start" if process.poll() is not None else "Weston does not get ready")

            try:
                yield wait_until_ready
            finally:
                end(process)

    def screenshot(self) -> Path:
        """Have the compositor write what is on its screen, and return the PNG. Raises DemoError."""
        command = ["weston-screenshooter"]
        with self.log.open("ab") as log:
            process = self._user.start(
                command, home=self._home, environment=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise DemoError("the screenshot was not taken in time") from None
            finally:
                end(process)
        pictures = list(self._home.glob("*.png"))
        if status or len(pictures) != 1:
            raise DemoError(f"weston-screenshooter ended with status {status} and {len(pictures)} pictures")
        return pictures[0]


class Client:
    """The client's process: its reports, one after the other, and its end."""

    def __init__(self, user: User, work: Path, display: Path, seed: str, inset: list[int]) -> None:
        home = work / "client"
        home.mkdir(mode=0o700)
        os.chown(home, user.uid, user.gid)
        self.log = work / "client.log"
        # The source tree may lie where only its owner can look.
        code = work / "code" / "tests" / "interop"
        code.mkdir(parents=True)
        for name in ("wayland_client.py", "picture.py"):
            shutil.copy(HERE / name, code)
        command = [sys.executable, "-B", "-m", "tests.interop.wayland_client", "--display", str(display)]
        command += ["--seed", seed, "--inset", *map(str, inset)]
        with self.log.open("wb") as errors:
            self.process = user.start(
                command,
                home=home,
                environment={"PYTHONPATH": str(work / "code")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def report(self, event: str) -> dict[str, Any]:
        """Wait for the client's next report, which has to be `event`. Raises DemoError."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise DemoError(f"the client ended with status {self.process.wait()} before it reported: {event}")
        said: dict[str, Any] = json.loads(line)
        if said["event"] == "failed":
            raise DemoError(f"the client failed: {said['reason']}")
        if said["event"] != event:
            raise DemoError(f"the client reported {said['event']} where {event} was expected")
        return said

    def finish(self) -> None:
        """Tell the client to end, and wait for it. Raises DemoError."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.report("ended")
        if status := self.process.wait(PATIENCE):
            raise DemoError(f"the client ended with status {status}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and wait for it; harmless when it has ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
