# SPDX-License-Identifier: MIT
"""What the process gives up by itself, as the kernel shows it of a process that has done so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from udmabufd.system import hardening

PROGRAM = """
import os, sys
if sys.argv[1] == "unit":
    os.environ["SYSTEMD_EXEC_PID"] = str(os.getpid())
from udmabufd.system import hardening
print("\\n".join(hardening.apply()))
print(open("/proc/self/status").read())
"""


@pytest.fixture
def status(request: pytest.FixtureRequest) -> dict[str, str]:
    """The lines of /proc/self/status of a process that was started as the parameter says."""
    pytest.importorskip("prctl")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "INVOCATION_ID": "0" * 32}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request.param], env=environ, capture_output=True, text=True, check=True
    )
    return dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)


@pytest.mark.root
@pytest.mark.parametrize("status", ["hand"], indirect=True)
def test_started_by_hand_it_can_gain_no_rights(status: dict[str, str]) -> None:
    assert status["Name"].strip() == "udmabufd"
    assert status["NoNewPrivs"].strip() == "1"
    assert int(status["CapBnd"], 16) == 0


@pytest.mark.root
@pytest.mark.parametrize("status", ["unit"], indirect=True)
def test_in_a_unit_the_unit_decides(status: dict[str, str]) -> None:
    assert status["Name"].strip() == "udmabufd"
    assert status["NoNewPrivs"].strip() == "0"
    assert int(status["CapBnd"], 16) != 0


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"INVOCATION_ID": "0" * 32}, False),  # a shell below a unit inherits it
        ({"SYSTEMD_EXEC_PID": str(os.getppid())}, False),
        ({"SYSTEMD_EXEC_PID": str(os.getpid())}, True),
    ],
)
def test_only_the_very_process_that_systemd_started_counts(environ: dict[str, str], expected: bool) -> None:
    assert hardening.started_by_systemd(environ) is expected


def test_what_was_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def harden(name: str, by_hand: bool) -> list[str]:
        asked.append((name, by_hand))
        return ["a line"]

    monkeypatch.setattr("udmabufd.linux.prctl.harden", harden)
    assert hardening.apply({})[1:] == ["a line"]
    assert hardening.apply({"SYSTEMD_EXEC_PID": str(os.getpid())})[1:] == ["a line"]
    assert asked == [("udmabufd", True), ("udmabufd", False)]
