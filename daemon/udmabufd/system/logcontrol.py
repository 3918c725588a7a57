# SPDX-License-Identifier: MIT
"""Where log records go and which: the journal or stderr, from which level on; both can be changed while it runs.

`LogControl` is the object behind org.freedesktop.LogControl1, in systemd's words; who may change it is left to the
bus, the journal's protocol to `journal`. $SYSTEMD_LOG_LEVEL and $SYSTEMD_LOG_TARGET are honoured as systemd(1) has
them.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

from .journal import SOCKET, JournalHandler, priority, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTICE: Final = 25
"""A level of `logging` for what is normal but worth noting: syslog's notice, between info and warning."""

LEVELS: Final[dict[str, int]] = {
    "emerg": 70,
    "alert": 60,
    "crit": logging.CRITICAL,
    "err": logging.ERROR,
    "warning": logging.WARNING,
    "notice": NOTICE,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
"""systemd's names in the order of syslog's priorities 0 to 7 -> level of `logging`."""

TARGETS: Final = ("auto", "journal", "console")

IDENTIFIER: Final = "udmabufd"


def stderr_is_journal(environ: Mapping[str, str] | None = None, descriptor: int = 2) -> bool:
    """Return whether what is written to this descriptor goes to the journal: $JOURNAL_STREAM names it."""
    stream = (os.environ if environ is None else environ).get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


class ConsoleHandler(logging.Handler):
    """Writes records to stderr, each line after its priority as `<N>` (sd-daemon(3)) where that is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to `stream`; by default to whatever sys.stderr is at the time of the record."""
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record at once, all of its lines with the prefix."""
        stream = sys.stderr if self._stream is None else self._stream
        try:
            prefix = f"{IDENTIFIER}: " if stream.isatty() else f"<{priority(record.levelno)}>"
            # An undecodable byte of a file name must not end in an exception here.
            text = text_of(record).encode("utf-8", "backslashreplace").decode()
            stream.write("".join(f"{prefix}{line}\n" for line in text.split("\n")))
            stream.flush()
        except Exception:
            self.handleError(record)


class LogControl:
    """Level and target of all log records of the process."""

    def __init__(
        self,
        level: str | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        journal_socket: str = SOCKET,
    ) -> None:
        """Take over logging's root: with `level`, else the environment's, else info, and the environment's target.

        Raises ValueError for an unknown `level`. An unknown word in the environment is logged.
        """
        self._environ = os.environ if environ is None else environ
        self._journal_socket = journal_socket
        self._handler: logging.Handler | None = None
        self._level = self._target = ""
        logging.addLevelName(NOTICE, "NOTICE")
        self.level = "info"
        self.target = "auto"
        self._take_environment()
        if level is not None:
            self.level = level

    @property
    def identifier(self) -> str:
        """The name under which the journal has our records: what LogControl1 calls SyslogIdentifier."""
        return IDENTIFIER

    @property
    def level(self) -> str:
        """The least urgent level that is logged, a key of LEVELS. Raises ValueError when set to anything else."""
        return self._level

    @level.setter
    def level(self, name: str) -> None:
        if name not in LEVELS:
            raise ValueError(f"the log level must be one of {', '.join(LEVELS)}")
        self._level = name
        logging.getLogger().setLevel(LEVELS[name])

    @property
    def target(self) -> str:
        """Where records go, one of TARGETS; auto is the journal where stderr already leads there, else stderr.

        Raises ValueError when set to anything else, or to `journal` where there is none.
        """
        return self._target

    @target.setter
    def target(self, name: str) -> None:
        if name not in TARGETS:
            raise ValueError(f"the log target must be one of {', '.join(TARGETS)}")
        root = logging.getLogger()
        handler = self._make_handler(name)
        if self._handler is not None:
            root.removeHandler(self._handler)
            self._handler.close()
        root.addHandler(handler)
        self._handler, self._target = handler, name

    def close(self) -> None:
        """Give logging's root back without a handler of ours. Harmless when repeated."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def _make_handler(self, target: str) -> logging.Handler:
        if target == "console" or (target == "auto" and not stderr_is_journal(self._environ)):
            return ConsoleHandler()
        try:
            return JournalHandler(IDENTIFIER, self._journal_socket)
        except OSError as error:
            if target == "auto":
                return ConsoleHandler()
            raise ValueError(f"the journal cannot be reached: {error.strerror}") from error

    def _take_environment(self) -> None:
        level = self._environ.get("SYSTEMD_LOG_LEVEL", "")
        if level.isascii() and level.isdecimal() and int(level) < len(LEVELS):
            level = list(LEVELS)[int(level)]
        target = self._environ.get("SYSTEMD_LOG_TARGET", "")
        if level in LEVELS:
            self.level = level
        elif level:
            logging.getLogger(__name__).warning("SYSTEMD_LOG_LEVEL is no log level: %r", level)
        # systemd has more targets than these; what is none of ours leaves it at auto.
        if target in TARGETS:
            try:
                self.target = target
            except ValueError as error:
                logging.getLogger(__name__).warning("SYSTEMD_LOG_TARGET=%s: %s", target, error)
