# SPDX-License-Identifier: MIT
"""Unprivileged users, and programs that run as one of them: with no groups and no environment of the caller's."""

from __future__ import annotations

import pwd
import subprocess
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds that a program may take; an emulated machine under load is slow."""


class User:
    """A user of this machine by name. Raises LookupError if there is none, ValueError if it is root."""

    def __init__(self, name: str) -> None:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise LookupError(f"there is no user {name} on this machine") from None
        self.name, self.uid, self.gid = name, entry.pw_uid, entry.pw_gid
        if self.uid == 0:
            raise ValueError(f"{name} is root, not an unprivileged user")

    def start(
        self, command: list[str], *, home: Path = Path("/"), environment: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start `command` in the folder `home`; `options` are Popen's."""
        basic = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(home)}
        return subprocess.Popen(
            command,
            env=basic | (environment or {}),
            cwd=home,
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            umask=0o007,
            **options,
        )

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end and return its status, stdout and stderr as text."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(command, **(pipes | options)) as process:
            try:
                out, err = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())
