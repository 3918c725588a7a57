# SPDX-License-Identifier: MIT
"""Who may use the service: every unprivileged user, except those whom the administrator's bus policy denies it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.users import User
from tests.kernel.witness import bufinfo

POLICY = Path("/etc/dbus-1/system.d/udmabufd-local.conf")
DENY_MALLORY = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <policy user="mallory">
    <deny send_destination="org.udmabufd.Allocator1"/>
  </policy>
</busconfig>
"""

SERVICE = "org.udmabufd.Allocator1"
PATH = "/org/udmabufd/Allocator1"
ALLOCATE = ["busctl", "call", SERVICE, PATH, SERVICE, "Allocate", "a{sv}", "1", "size", "t", "4096"]
GDBUS = ["gdbus", "call", "--system", "--dest", SERVICE, "--object-path", PATH, "--method"]

pytestmark = [pytest.mark.guest, pytest.mark.root]


def reload_policy() -> None:
    """Have the bus, dbus-daemon or dbus-broker, read its policy anew."""
    bus = ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"]
    subprocess.run(["busctl", "call", *bus, "ReloadConfig"], check=True)


@pytest.fixture
def deny_mallory() -> Iterator[Callable[[], None]]:
    """A function that puts the administrator's rule into force; it goes after the test."""

    def deny() -> None:
        POLICY.write_text(DENY_MALLORY)
        reload_policy()

    yield deny
    POLICY.unlink(missing_ok=True)
    reload_policy()


def test_denied_user_is_refused(deny_mallory: Callable[[], None]) -> None:
    """Before the rule everyone allocates; with it one user gets AccessDenied, and nobody else notices."""
    alice, mallory = User("alice"), User("mallory")
    for user in (alice, mallory):
        done = user.run(ALLOCATE)
        assert (done.returncode, done.stderr) == (0, "")

    deny_mallory()
    before = bufinfo().keys()
    refused = mallory.run(ALLOCATE)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("Call failed: ")
    for call in (
        [f"{SERVICE}.Allocate", "{'size': <uint64 4096>}"],
        [f"{SERVICE}.ListBuffers"],
        ["org.freedesktop.DBus.Properties.GetAll", SERVICE],
        ["org.freedesktop.DBus.Introspectable.Introspect"],
    ):
        refused = mallory.run([*GDBUS, *call])
        assert refused.returncode == 1
        assert "org.freedesktop.DBus.Error.AccessDenied" in refused.stderr
    assert bufinfo().keys() == before
    assert alice.run(ALLOCATE).returncode == 0


def test_policy_names_every_member() -> None:
    """A member that the policy does not name is denied to root, too: the bus says so, not the service."""
    command = [*GDBUS, f"{SERVICE}.NoSuchMember"]
    as_root = subprocess.run(command, capture_output=True, text=True, check=False)
    for done in (User("alice").run(command), as_root):
        assert done.returncode == 1
        assert "org.freedesktop.DBus.Error.AccessDenied" in done.stderr


def test_only_root_sets_the_log_level() -> None:
    """Properties may be read by everyone and set by root alone."""
    path = [SERVICE, "/org/freedesktop/LogControl1", "org.freedesktop.LogControl1", "LogLevel"]
    alice = User("alice")
    level = alice.run(["busctl", "get-property", *path])
    assert level.returncode == 0
    assert level.stdout.startswith('s "')
    refused = alice.run(["busctl", "set-property", *path, "s", "debug"])
    assert refused.returncode == 1
    assert alice.run(["busctl", "get-property", *path]).stdout == level.stdout
