# SPDX-License-Identifier: MIT
"""The examples of the README do what it says, word for word, for an unprivileged user."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.interop.users import User

pytestmark = pytest.mark.guest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_client_in_python() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ran = User("alice").run([sys.executable, "-c", program])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[:2] == ["1228800", "udmabuf"]


def test_the_same_by_busctl() -> None:
    (command,) = re.findall(r"^    \$ (busctl call (?:.*\\\n)*.*)$", README, re.MULTILINE)
    ran = User("alice").run(["sh", "-c", command])
    assert ran.returncode == 0, ran.stderr
    assert re.match(r'oha\{sv\} "/org/udmabufd/Allocator1/buffer/[0-9a-f]{16}" \d+ 17 "size" t 1228800 ', ran.stdout)
