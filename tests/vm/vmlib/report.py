# SPDX-License-Identifier: MIT
"""What is said to the user while things take their time, always on stderr: stdout belongs to the command."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HEARTBEAT_SECONDS = 10.0
TAIL_LINES = 40


class VmError(Exception):
    """Ends the run. The message names the cause and the next step; status is the exit status (125: broken guest)."""

    def __init__(self, message: str, status: int = 125) -> None:
        super().__init__(message)
        self.status = status


class Report:
    """Prints lines with the seconds since the run began; quiet keeps all but errors back, verbose adds detail."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Prints one line of progress."""
        if not self.quiet:
            print(f"vm: [{time.monotonic() - self._began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Prints what went wrong, with --quiet too."""
        print(f"vm: {text}", file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Prints one line only with --verbose."""
        if self.verbose:
            self.say(text)


def run_step(report: Report, what: str, argv: Sequence[str | Path], *, hint: str = "") -> None:
    """Runs one long step without its output, says every 10 s how far its log is, shows the log's end if it fails.

    Raises VmError with the log's last lines and the hint.
    """
    report.say(what)
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while True:
                try:
                    status = child.wait(HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    lines = _lines(log.fileno())
                    report.say(f"{what}: {lines[-1][:90]}" if lines else f"{what}: still at it")
        except BaseException:
            child.terminate()
            child.wait()
            raise
        if status:
            tail = "\n".join(f"    {line}" for line in _lines(log.fileno())[-TAIL_LINES:])
            raise VmError(f"{what}: failed with status {status}. The last it said:\n{tail}\n{hint}".rstrip())


def _lines(fd: int) -> list[str]:
    text = Path(f"/proc/self/fd/{fd}").read_bytes().decode(errors="replace")
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
