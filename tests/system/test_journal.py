# SPDX-License-Identifier: MIT
"""Records in the journal's native protocol, read by a parser that knows the format and not our encoder."""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.system.journal import FIELDS, JournalHandler, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.host


def parse(data: bytes) -> list[tuple[str, bytes]]:
    """Take one entry apart as https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ says it is made."""
    fields = []
    while data:
        line, _, rest = data.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
            data = rest
        else:
            name = line
            size = int.from_bytes(rest[:8], "little")
            value = rest[8 : 8 + size]
            assert len(value) == size
            assert rest[8 + size : 9 + size] == b"\n"
            data = rest[9 + size :]
        assert name.replace(b"_", b"").isalnum()
        assert name.isupper()
        fields.append((name.decode(), value))
    return fields


class Journald:
    """A socket in the place of journald's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def entries(self) -> list[dict[str, str]]:
        """Return what has arrived since the last call. A memfd must have the seals that journald wants."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, flags, _ = self.socket.recvmsg(1 << 22, socket.CMSG_SPACE(4))
                assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                if ancillary:
                    assert data == b""
                    (fd,) = array.array("i", ancillary[0][2])
                    wanted = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
                    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == wanted
                    data = os.pread(fd, os.fstat(fd).st_size, 0)
                    os.close(fd)
                fields = [(name, value.decode()) for name, value in parse(data)]
                assert len(dict(fields)) == len(fields)
                found.append(dict(fields))
        return found


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    made = Journald(tmp_path / "journal")
    yield made
    made.socket.close()


@pytest.fixture
def logger(journald: Journald) -> Iterator[logging.Logger]:
    handler = JournalHandler("udmabufd", str(journald.path))
    made = logging.getLogger("udmabufd.test_journal")
    made.propagate = False
    made.setLevel(logging.DEBUG)
    made.addHandler(handler)
    yield made
    made.removeHandler(handler)
    handler.close()
    made.propagate = True


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True), st.text(), min_size=1))
def test_any_text_survives_in_its_field(fields: dict[str, str]) -> None:
    read = {name: value.decode() for name, value in parse(encode(fields))}
    assert read == {name: value.encode("utf-8", "backslashreplace").decode() for name, value in fields.items()}


def test_fields(journald: Journald, logger: logging.Logger) -> None:
    logger.warning("refused %d", 7, extra={"buffer": "00ff", "uid": 1000, "client": ":1.42"})
    (entry,) = journald.entries()
    assert entry["MESSAGE"] == "refused 7"
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "udmabufd"
    assert entry["LOGGER"] == "udmabufd.test_journal"
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_fields"
    assert entry["CODE_LINE"] == str(test_fields.__code__.co_firstlineno + 1)
    assert {name: entry[name] for name in entry if name.startswith("UDMABUFD_")} == {
        "UDMABUFD_BUFFER": "00ff",
        "UDMABUFD_UID": "1000",
        "UDMABUFD_CLIENT": ":1.42",
    }


def test_fields_of_an_event(journald: Journald, logger: logging.Logger) -> None:
    values = {key: f"{key}=\n1" for key in FIELDS}
    logger.info("x", extra=values)
    (entry,) = journald.entries()
    assert {FIELDS[key]: value for key, value in values.items()}.items() <= entry.items()
    assert set(FIELDS.values()) <= entry.keys()
    assert FIELDS["message_id"] == "MESSAGE_ID"


def test_root_and_no_user_differ(journald: Journald, logger: logging.Logger) -> None:
    logger.info("root", extra={"uid": 0})
    logger.info("nobody in particular", extra={"uid": None})
    entries = journald.entries()
    assert entries[0]["UDMABUFD_UID"] == "0"
    assert "UDMABUFD_UID" not in entries[1]


@pytest.mark.parametrize(
    ("level", "priority"), [(70, 0), (60, 1), (50, 2), (40, 3), (30, 4), (25, 5), (20, 6), (10, 7), (35, 4)]
)
def test_priorities(journald: Journald, logger: logging.Logger, level: int, priority: int) -> None:
    logger.log(level, "x")
    assert [entry["PRIORITY"] for entry in journald.entries()] == [str(priority)]


@pytest.mark.parametrize(
    "name", ["a\nPRIORITY=0", "a\nMESSAGE\n\x01\0\0\0\0\0\0\0x\n", "a\r\nb", "\x1b[31mred", "a\0b"]
)
def test_a_name_cannot_become_a_field_or_a_line(journald: Journald, logger: logging.Logger, name: str) -> None:
    logger.info("buffer %s", name, extra={"client": name})
    (entry,) = journald.entries()
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"].startswith("buffer ")
    assert entry["MESSAGE"].isprintable()
    assert entry["UDMABUFD_CLIENT"] == name


def test_a_traceback_is_kept_and_indented(journald: Journald, logger: logging.Logger) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.exception("It failed")
    (entry,) = journald.entries()
    first, *others = entry["MESSAGE"].split("\n")
    assert first == "It failed"
    assert any("Traceback" in line for line in others)
    assert all(line.startswith("    ") for line in others)


def test_a_message_beyond_a_datagram_travels_in_a_memfd(journald: Journald, logger: logging.Logger) -> None:
    text = "x" * (8 << 20)
    before = len(list(Path("/proc/self/fd").iterdir()))
    logger.info("%s", text, extra={"uid": 1})
    (entry,) = journald.entries()
    assert entry["MESSAGE"] == text
    assert entry["UDMABUFD_UID"] == "1"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_journald_that_does_not_read_is_not_waited_for(journald: Journald, logger: logging.Logger) -> None:
    total = 10_000
    for number in range(total):
        logger.info("%d", number)  # would never return if it waited
    kept = journald.entries()
    assert 0 < len(kept) < total
    assert [entry["MESSAGE"] for entry in kept] == [str(number) for number in range(len(kept))]
    logger.info("afterwards")
    loss, last = journald.entries()
    assert loss["MESSAGE"].startswith(f"{total - len(kept)} messages were lost")
    assert loss["PRIORITY"] == "4"
    assert last["MESSAGE"] == "afterwards"


def test_a_journald_that_was_restarted_is_found(journald: Journald, logger: logging.Logger) -> None:
    journald.socket.close()
    journald.path.unlink()
    again = Journald(journald.path)
    logger.info("hello")
    assert [entry["MESSAGE"] for entry in again.entries()] == ["hello"]
    again.socket.close()


def test_a_journald_that_is_gone_stops_nobody(
    journald: Journald, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    journald.socket.close()
    journald.path.unlink()
    logger.error("the disk is full")
    assert "the disk is full" in capsys.readouterr().err


def test_without_a_journal_there_is_no_handler(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        JournalHandler("udmabufd", str(tmp_path / "absent"))
