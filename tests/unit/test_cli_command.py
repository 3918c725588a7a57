# SPDX-License-Identifier: MIT
"""Running a command with a buffer: signals that come too early or are ignored, and commands that cannot be run."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client.buffer import BufferBase
from udmabufd_client.cli.command import run_with
from udmabufd_client.contract import BUFFER_PATH_PREFIX
from udmabufd_client.info import BufferInfo
from udmabufd_client.service import Service
from udmabufd_client.share import Share


class Deaf:
    """The one member of Service that a local buffer uses."""

    def give_back_soon(self, share: Share) -> None:
        pass


@pytest.fixture
def buffer() -> Iterator[BufferBase]:
    fd = OwnedFd(os.memfd_create("buffer"))
    os.ftruncate(fd.fileno(), mmap.PAGESIZE)
    share = Share(BUFFER_PATH_PREFIX + "0" * 16, BufferInfo(size=mmap.PAGESIZE, kind="memfd", serial=1))
    with BufferBase(cast(Service, Deaf()), share, fd) as made:
        yield made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_before_the_command_is_passed_on(
    buffer: BufferBase, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **keys: Any) -> None:
            super().__init__(*arguments, **keys)
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    before = signal.getsignal(number)
    assert run_with(buffer, ["sleep", "60"]) == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ignored_signal_is_ignored_by_the_command_too(buffer: BufferBase, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_with(buffer, ["sh", "-c", f"kill -{int(number)} $$; exit 5"]) == 5
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_command_that_the_kernel_does_not_take_is_status_126(
    buffer: BufferBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"neither ELF nor a script")
    program.chmod(0o755)
    assert run_with(buffer, [str(program)]) == 126
    assert capsys.readouterr().err == f"udmabufctl: {program}: Exec format error\n"
    # One argument may have 128 KiB (MAX_ARG_STRLEN).
    assert run_with(buffer, ["true", "x" * (129 << 10)]) == 126
    assert capsys.readouterr().err == "udmabufctl: true: Argument list too long\n"
    assert run_with(buffer, [str(tmp_path / "missing")]) == 127
    assert capsys.readouterr().err == f"udmabufctl: {tmp_path}/missing: No such file or directory\n"
