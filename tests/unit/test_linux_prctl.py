# SPDX-License-Identifier: MIT
"""linux.prctl in processes of their own, for nothing of it can be taken back; /proc says what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DAEMON = Path(__file__).resolve().parents[2] / "daemon"

PROGRAM = """
import ctypes, json, os, sys
before, harden = sys.argv[1:]
exec(before)
from udmabufd.linux import prctl
lines = prctl.harden("hardened-process-name", by_hand=harden == "by_hand")
fields = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
fields["dumpable"] = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
print(json.dumps([lines, fields]))
"""

BECOME_NOBODY = """
import prctl  # While the interpreter's folders, which may be root's alone, can still be read.
from udmabufd.linux import prctl
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
"""


def hardened(by_hand: bool, before: str = "pass") -> tuple[list[str], dict[str, Any]]:
    """Run harden() in a new process, after the statements `before`; return its lines and the process's status."""
    arguments = [sys.executable, "-c", PROGRAM, before, "by_hand" if by_hand else "by_unit"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DAEMON), *sys.path])}
    output = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    lines, fields = json.loads(output)
    return lines, fields


def test_in_a_unit() -> None:
    """Name and dumpable only: the rest is the unit's."""
    lines, fields = hardened(by_hand=False)
    assert lines == ["process name hardened-process-name: applied", "not dumpable: applied"]
    assert fields["Name"] == "hardened-proces"
    assert fields["dumpable"] == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="dropping from the bounding set needs CAP_SETPCAP; run as root")
def test_by_hand_as_root() -> None:
    """The bounding set is empty, of capabilities too that python-prctl has never heard of."""
    lines, fields = hardened(by_hand=True)
    assert len(lines) == 4
    assert all(line.endswith(": applied") for line in lines)
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapBnd"], 16) == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_by_hand_as_a_user() -> None:
    """Without CAP_SETPCAP the bounding set stays, and the line says so; no_new_privs is set all the same."""
    lines, fields = hardened(by_hand=True, before=BECOME_NOBODY)
    assert lines[2] == "no_new_privs: applied"
    assert lines[3].startswith("empty capability bounding set: not applied: ")
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapBnd"], 16) != 0


def test_without_python_prctl() -> None:
    """Nothing is claimed, and the line says what to install."""
    lines, fields = hardened(by_hand=True, before="sys.modules['prctl'] = None")
    assert len(lines) == 1
    assert "nothing was given up; install python3-prctl" in lines[0]
    assert fields["NoNewPrivs"] == "0"
    assert fields["dumpable"] == 1
