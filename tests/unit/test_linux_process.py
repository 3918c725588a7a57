# SPDX-License-Identifier: MIT
"""linux.process with real processes: the one that is meant, one that has gone, and one that has its number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from udmabufd.linux import process
from udmabufd.linux.process import cgroup_of
from udmabufd_base.fd import OwnedFd

NOBODY = 65534
SLEEP = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]


def of_proc(pid: int | str) -> str:
    """Return what the file says, read by itself."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started
        started.kill()


def pidfd_of(pid: int) -> OwnedFd:
    return OwnedFd(os.pidfd_open(pid))


def test_with_a_pidfd(child: subprocess.Popen[bytes]) -> None:
    with pidfd_of(child.pid) as pidfd:
        assert cgroup_of(child.pid, pidfd, uid=4242) == of_proc(child.pid)
        assert not pidfd.closed


def test_without_a_pidfd_the_user_must_be_the_one(child: subprocess.Popen[bytes]) -> None:
    assert cgroup_of(child.pid, None, uid=os.geteuid()) == of_proc(child.pid)
    assert cgroup_of(child.pid, None, uid=os.geteuid() + 1) is None


def test_a_process_that_has_ended(child: subprocess.Popen[bytes]) -> None:
    with pidfd_of(child.pid) as pidfd:
        child.send_signal(signal.SIGKILL)
        # Ended, but its number is still its own: nobody has waited for it.
        os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}").exists()
        assert cgroup_of(child.pid, pidfd, uid=os.geteuid()) is None
        child.wait()
        assert cgroup_of(child.pid, pidfd, uid=os.geteuid()) is None
    assert cgroup_of(child.pid, None, uid=os.geteuid()) is None


def test_another_that_has_the_number(child: subprocess.Popen[bytes]) -> None:
    """The pidfd is that of one process, the number that of another, as after it was used again."""
    with pidfd_of(os.getpid()) as pidfd:
        assert cgroup_of(child.pid, pidfd, uid=os.geteuid()) is None


def test_what_is_no_pidfd_proves_nothing(child: subprocess.Popen[bytes]) -> None:
    for fd in (os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), os.memfd_create("x"), os.pipe2(os.O_CLOEXEC)):
        ends = fd if isinstance(fd, tuple) else (fd,)
        for end in ends:
            with OwnedFd(end) as wrong:
                assert cgroup_of(child.pid, wrong, uid=os.geteuid()) is None


def test_numbers_that_nobody_has() -> None:
    for pid in (-1, 0, 2**22 + 1, 2**31):
        assert cgroup_of(pid, None, uid=os.geteuid()) is None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")
def test_an_undumpable_process_of_another_user() -> None:
    """Its files in /proc are root's, its folder its own; its cgroup is anybody's to read."""
    # It becomes that user itself, who may not be let to this Python.
    program = f"""
import ctypes, os, signal
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
assert ctypes.CDLL(None).prctl(4, 0) == 0
print(flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as stranger:
        try:
            assert stranger.stdout is not None
            stranger.stdout.readline()
            assert Path(f"/proc/{stranger.pid}/cgroup").stat().st_uid == 0
            expected = of_proc(stranger.pid)
            os.seteuid(1)
            try:
                assert cgroup_of(stranger.pid, None, uid=NOBODY) == expected
                assert cgroup_of(stranger.pid, None, uid=0) is None
                with pidfd_of(stranger.pid) as pidfd:
                    assert cgroup_of(stranger.pid, pidfd, uid=0) == expected
            finally:
                os.seteuid(0)
        finally:
            stranger.kill()


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (b"0::/\n", "/"),
        (b"0::/system.slice/foo.service\n", "/system.slice/foo.service"),
        (b"12:pids:/a\n1:name=systemd:/b\n0::/c:0::/d\n", "/c:0::/d"),
        (b"0::/gone.scope (deleted)\n", "/gone.scope"),
        (b"0::/a\xff\x1b\n", "/a\udcff\x1b"),
        (b"0::/../../elsewhere\n", "/../../elsewhere"),
        (b"4:memory:/0::/x\n", None),
        (b"", None),
        (b"\n\n", None),
    ],
)
def test_the_line_of_the_unified_hierarchy(content: bytes, path: str | None) -> None:
    assert process._unified(content) == path
