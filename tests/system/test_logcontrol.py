# SPDX-License-Identifier: MIT
"""Level and target of the log, by their names at systemd."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from udmabufd.system.logcontrol import LEVELS, ConsoleHandler, LogControl, stderr_is_journal

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host


log = logging.getLogger("udmabufd.test")


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    """Give logging's root back as it was."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    for handler in root.handlers[:]:
        if handler not in before[1]:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(before[0])


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind(str(tmp_path / "journal"))
    yield made
    made.close()


def test_levels_are_systemds_in_its_order() -> None:
    assert list(LEVELS) == ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
    assert sorted(LEVELS.values(), reverse=True) == list(LEVELS.values())


@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    control = LogControl(environ={})
    assert control.level == "info"
    control.level = level
    assert control.level == level
    assert [name for name in LEVELS if log.isEnabledFor(LEVELS[name])] == list(LEVELS)[: list(LEVELS).index(level) + 1]


@pytest.mark.parametrize("level", ["", "error", "INFO", "7", "10", "notset"])
def test_unknown_levels_are_refused_and_change_nothing(level: str) -> None:
    control = LogControl("warning", environ={})
    with pytest.raises(ValueError, match="emerg, alert, crit, err, warning, notice, info, debug"):
        control.level = level
    assert control.level == "warning"
    with pytest.raises(ValueError, match="log level"):
        LogControl(level, environ={})


@pytest.mark.parametrize("target", ["", "kmsg", "syslog", "JOURNAL", "null"])
def test_unknown_targets_are_refused_and_change_nothing(target: str) -> None:
    control = LogControl(environ={})
    with pytest.raises(ValueError, match="auto, journal, console"):
        control.target = target
    assert control.target == "auto"


def test_the_target_can_be_changed_while_it_runs(journal: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    control = LogControl(environ={}, journal_socket=journal.getsockname())
    log.info("one")
    control.target = "journal"
    log.info("two")
    control.target = "console"
    log.info("three")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("<6>")] == ["<6>one", "<6>three"]
    assert b"MESSAGE=two\n" in journal.recv(65536)
    with pytest.raises(BlockingIOError):
        journal.recv(65536)
    control.close()
    control.close()


def test_no_journal_is_said_and_the_target_stays(tmp_path: Path) -> None:
    control = LogControl(environ={}, journal_socket=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="journal cannot be reached"):
        control.target = "journal"
    assert control.target == "auto"


@pytest.mark.parametrize(
    ("environ", "argument", "expected"),
    [
        ({"SYSTEMD_LOG_LEVEL": "debug"}, None, "debug"),
        ({"SYSTEMD_LOG_LEVEL": "3"}, None, "err"),
        ({"SYSTEMD_LOG_LEVEL": "debug"}, "warning", "warning"),
        ({"SYSTEMD_LOG_LEVEL": "loud"}, None, "info"),
        ({"SYSTEMD_LOG_LEVEL": "8"}, None, "info"),
    ],
)
def test_level_from_the_environment(environ: dict[str, str], argument: str | None, expected: str) -> None:
    assert LogControl(argument, environ=environ).level == expected


def test_target_from_the_environment(journal: socket.socket) -> None:
    path = journal.getsockname()
    assert LogControl(environ={"SYSTEMD_LOG_TARGET": "journal"}, journal_socket=path).target == "journal"
    assert LogControl(environ={"SYSTEMD_LOG_TARGET": "kmsg"}, journal_socket=path).target == "auto"


def test_auto_is_the_journal_where_stderr_leads_there(journal: socket.socket, tmp_path: Path) -> None:
    # In a process of its own: pytest has a stderr of its own.
    program = (
        "import logging, os, sys\n"
        "from udmabufd.system.logcontrol import LogControl\n"
        "status = os.fstat(2)\n"
        "environ = {'JOURNAL_STREAM': f'{status.st_dev}:{status.st_ino}'} if sys.argv[2] == 'yes' else {}\n"
        "LogControl(environ=environ, journal_socket=sys.argv[1])\n"
        "logging.getLogger('udmabufd').info('hello')\n"
    )

    def run(argument: str) -> str:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", program, journal.getsockname(), argument]
        return subprocess.run(command, env=environ, stderr=subprocess.PIPE, text=True, check=True).stderr

    assert run("no") == "<6>hello\n"
    assert run("yes") == ""
    assert b"MESSAGE=hello\n" in journal.recv(65536)


def test_stderr_is_the_journal_only_if_device_and_inode_agree(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as file:
        status = os.fstat(file.fileno())
        assert stderr_is_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, file.fileno())
        assert not stderr_is_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}, file.fileno())
        assert not stderr_is_journal({}, file.fileno())
        assert not stderr_is_journal({"JOURNAL_STREAM": "no numbers"}, file.fileno())


@pytest.fixture
def console() -> Iterator[logging.Logger]:
    """A logger whose handlers are removed afterwards."""
    made = logging.getLogger("udmabufd.test_console")
    made.propagate = False
    yield made
    for handler in made.handlers[:]:
        made.removeHandler(handler)
    made.propagate = True


def test_each_line_on_the_console_has_its_priority(console: logging.Logger) -> None:
    stream = io.StringIO()
    console.addHandler(ConsoleHandler(stream))
    console.error("name %s", "a\n<0>the sky falls")
    try:
        raise ValueError("first\n<0>second")
    except ValueError:
        console.exception("failed %s", "\udcff")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "<3>name a\\n<0>the sky falls"
    assert lines[1] == "<3>failed \\udcff"
    assert all(re.match(r"<3>    ", line) for line in lines[2:])
    assert len(lines) > 4


def test_a_terminal_gets_no_priorities(console: logging.Logger) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console.addHandler(ConsoleHandler(stream))
    console.warning("careful")
    assert stream.getvalue() == "udmabufd: careful\n"
