# SPDX-License-Identifier: MIT
"""What the tests with other people's programs share: compiled programs, and remote-controlled holders of buffers."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.remote import RemoteAgent
from tests.interop.users import User

HERE = Path(__file__).parent

LIBRARIES = {"sdbus_client": ["libsystemd"], "fd_probe.so": []}
"""What is compiled here, and the pkg-config names of what it links with."""


@pytest.fixture
def start_agent() -> Iterator[Callable[..., RemoteAgent]]:
    """A function that starts an agent as a user; those that still run are ended after the test."""
    with ExitStack() as stack:

        def start(user: str, **environment: str) -> RemoteAgent:
            agent = RemoteAgent(User(user), environment)
            stack.callback(lambda: agent.kill() if agent.process.returncode is None else None)
            return agent

        yield start


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that compiles a program of this folder, or a library to preload, where every user can run it."""
    # pytest's own folders are for their owner alone.
    folder = Path("/tmp/udmabufd-interop")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)

    def compile_program(name: str) -> Path:
        made = folder / name
        if not made.exists():
            command = ["cc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(made)]
            command += ["-shared", "-fPIC"] if made.suffix == ".so" else []
            command.append(str(HERE / f"{made.stem}.c"))
            for package in LIBRARIES[name]:
                flags = subprocess.run(
                    ["pkg-config", "--cflags", "--libs", package], check=True, stdout=subprocess.PIPE, text=True
                )
                command += flags.stdout.split()
            subprocess.run(command, check=True)
        return made

    return compile_program


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """A function that waits until a condition holds (neither returns False nor fails an assertion), or fails.

    For what the kernel and the bus do in their own time, such as ending a connection, without telling anybody.
    """

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert condition() is not False
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    return wait
