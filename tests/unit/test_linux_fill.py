# SPDX-License-Identifier: MIT
"""linux.fill: the child does what memfd.populate does, and whatever becomes of it is an OSError.

That it dies in the place of its parent under a memory limit is shown on the real kernel (tests/kernel).
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from udmabufd.linux import fill, memfd
from udmabufd.linux.errors import HintedOSError

PAGE = mmap.PAGESIZE


def test_fills() -> None:
    """Every page is up to date, and the content that was there stays."""
    with memfd.create("filled", 64 * PAGE) as fd:
        os.pwrite(fd.fileno(), b"kept", PAGE)
        fill.populate_in_child(fd.fileno(), 64 * PAGE)
        assert memfd.first_hole(fd.fileno(), 0, 64 * PAGE) is None
        assert os.pread(fd.fileno(), 64 * PAGE, 0) == bytes(PAGE) + b"kept" + bytes(63 * PAGE - 4)


def test_fills_ranges() -> None:
    """More of them than fit into an argument, and nothing but them."""
    count = 8192
    with memfd.create("ranges", 2 * count * PAGE) as fd:
        fill.populate_ranges_in_child(fd.fileno(), [(2 * page * PAGE, PAGE) for page in range(count)])
        assert os.fstat(fd.fileno()).st_blocks * 512 == count * PAGE
        assert memfd.first_hole(fd.fileno(), 0, 3 * PAGE) == PAGE
        assert memfd.first_hole(fd.fileno(), 2 * (count - 1) * PAGE, PAGE) is None


def test_the_kernels_answer_arrives() -> None:
    """EPERM of a seal is EPERM, as if no child were between."""
    with memfd.create("sealed", PAGE) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_GROW)
        with pytest.raises(HintedOSError, match="child process") as caught:
            fill.populate_in_child(fd.fileno(), 2 * PAGE)
        assert caught.value.errno == errno.EPERM


def test_full_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC, which is how shmem says that there is no memory."""
    monkeypatch.setattr(fill, "_FILL", "print(28)")
    with memfd.create("full", PAGE) as fd, pytest.raises(HintedOSError, match="no memory for it") as caught:
        fill.populate_in_child(fd.fileno(), PAGE)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("_FILL", "import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("_FILL", "raise SystemExit(3)", "ended with status 3"),
        ("_FILL", "import nothing_like_that", "ended with status 1"),
        ("_VICTIM", "kill -9 $$", "killed by signal 9"),
        ("_VICTIM", "exit 7", "ended with status 7"),
        ("_TIMEOUT", 0.001, "did not end within"),
    ],
)
def test_children_that_fail(monkeypatch: pytest.MonkeyPatch, name: str, value: str | float, hint: str) -> None:
    """Whatever happened to the child, there was no memory."""
    monkeypatch.setattr(fill, name, value)
    with memfd.create("failed", PAGE) as fd, pytest.raises(HintedOSError, match=hint) as caught:
        fill.populate_in_child(fd.fileno(), PAGE)
    assert caught.value.errno == errno.ENOMEM
    assert isinstance(caught.value, fill.FillKilled) == ("signal" in hint)


def test_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that cannot be had is ENOMEM with the reason."""

    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "run", refuse)
    with memfd.create("none", PAGE) as fd, pytest.raises(HintedOSError, match="TasksMax=") as caught:
        fill.populate_in_child(fd.fileno(), PAGE)
    assert caught.value.errno == errno.ENOMEM


def test_the_child_is_the_victim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has the highest score there is, no descriptor but the memfd and its own three, no environment; we stay."""
    report = tmp_path / "report"
    monkeypatch.setattr(
        fill,
        "_FILL",
        f"import os\nfds = os.listdir('/proc/self/fd')\nscore = open('/proc/self/oom_score_adj').read().strip()\n"
        f"open({str(report)!r}, 'w').write(f'{{score}} {{len(fds)}} {{sorted(os.environ)}}')\nprint(0)",
    )
    monkeypatch.setenv("UDMABUFD_TEST_SECRET", "not for children")
    before = Path("/proc/self/oom_score_adj").read_text()
    with memfd.create("victim", PAGE) as fd, open("/dev/null", "rb") as other:
        os.set_inheritable(other.fileno(), True)
        fill.populate_in_child(fd.fileno(), PAGE)
    score, fds, environment = report.read_text().split(" ", 2)
    # The three, the memfd, and that of the listing.
    assert (score, fds) == ("1000", "5")
    assert "UDMABUFD" not in environment
    assert Path("/proc/self/oom_score_adj").read_text() == before


def test_the_interpreter_is_ours() -> None:
    """Not one that PATH has: there is none in the child's environment."""
    assert Path(sys.executable).is_absolute()
