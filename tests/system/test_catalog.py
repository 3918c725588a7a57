# SPDX-License-Identifier: MIT
"""The journal's catalog: made from the table of events, taken by journalctl, shown beside the entries in the guest."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.tools import TOP, needed
from udmabufd.core.events import Event, RepeatGuard, emit, fields_of
from udmabufd.system.journal import JournalHandler

CATALOG = TOP / "systemd/udmabufd.catalog"
MAKE = TOP / "systemd/man/catalog.py"
INSTALLED = Path("/usr/lib/systemd/catalog/udmabufd.catalog")


@pytest.mark.host
def test_the_catalog_is_what_the_table_says() -> None:
    made = subprocess.run([sys.executable, "-I", "-B", MAKE], capture_output=True, text=True, check=True)
    assert made.stderr == ""
    assert CATALOG.read_text() == made.stdout, "make it anew: systemd/man/catalog.py >systemd/udmabufd.catalog"


def update(root: Path) -> subprocess.CompletedProcess[str]:
    command = [needed("journalctl"), f"--root={root}", "--update-catalog"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a system that has our catalog and no other."""
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    (folder / CATALOG.name).write_bytes(CATALOG.read_bytes())
    return tmp_path


@pytest.mark.host
def test_journalctl_finds_each_event(root: Path) -> None:
    done = update(root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shown = subprocess.run(
        [needed("journalctl"), f"--root={root}", "--dump-catalog"], capture_output=True, text=True, check=True
    ).stdout
    entries = {}
    for entry in shown.split("\n-- "):
        head, _, text = entry.removeprefix("-- ").partition("\n\n")
        message_id, *lines = head.split("\n")
        entries[message_id] = (dict(line.split(": ", 1) for line in lines), text)
    assert entries.keys() == {event.message_id for event in Event}
    for event in Event:
        fields, text = entries[event.message_id]
        assert fields == {
            "Subject": event.subject,
            "Defined-By": "udmabufd",
            "Documentation": "man:udmabufd(8)",
        }
        assert [" ".join(part.split()) for part in text.strip().split("\n\n")] == event.explanation.split("\n\n")
        assert all(len(line) <= 79 for line in text.splitlines())


@pytest.mark.host
def test_journalctl_does_look(root: Path) -> None:
    (root / "usr/lib/systemd/catalog/broken.catalog").write_text("Subject: without an id\n\ntext\n")
    assert update(root).returncode != 0


@pytest.fixture
def journal_log() -> Iterator[logging.Logger]:
    handler = JournalHandler("udmabufd-test-catalog")
    log = logging.getLogger("udmabufd.test_catalog")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    yield log
    log.removeHandler(handler)
    handler.close()
    log.propagate = True


@pytest.fixture
def installed() -> Iterator[None]:
    """The catalog in its place, read by journalctl."""
    ours = not INSTALLED.exists()
    if ours:
        INSTALLED.write_bytes(CATALOG.read_bytes())
    # The guest does not do so at its boot.
    subprocess.run(["journalctl", "--update-catalog"], check=True)
    yield
    if ours:
        INSTALLED.unlink()
        subprocess.run(["journalctl", "--update-catalog"], check=True)


@pytest.mark.guest
@pytest.mark.usefixtures("installed")
def test_the_journal_explains_the_entries(journal_log: logging.Logger) -> None:
    given_fields: dict[str, object] = {"uid": 4711, "application": "org.example.App", "client": ":1.77"}
    for event in Event:
        rest = {name: f"some-{name}" for name in fields_of(event) if name not in given_fields}
        assert emit(journal_log, event, guard=RepeatGuard(), **given_fields, **rest)
    deadline = time.monotonic() + 60
    while True:
        subprocess.run(["journalctl", "--sync"], check=True)
        shown = subprocess.run(
            ["journalctl", "--catalog", "--no-pager", "SYSLOG_IDENTIFIER=udmabufd-test-catalog", "UDMABUFD_UID=4711"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if all(event.subject in shown for event in Event) or time.monotonic() > deadline:
            break
    # Each line of an explanation is marked.
    text = " ".join(shown.replace("\N{LIGHT SHADE}", "").split())
    for event in Event:
        assert f"Subject: {event.subject}" in shown
    assert "The user 4711 would have held more than a limit" in text
    assert "@UDMABUFD_" not in shown
    assert "Refused some-member of user 4711 (org.example.App): some-reason" in shown
