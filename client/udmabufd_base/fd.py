# SPDX-License-Identifier: MIT
"""OwnedFd: one owner of one file descriptor. What the descriptor is, and what is done with it, is left to others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Self


class OwnedFd:
    """Owns one file descriptor and closes it exactly once.

    `OwnedFd(fd)` consumes: from then on nobody else may close `fd`. `fileno()` borrows, `steal()` gives ownership
    away. An object that is dropped while it still owns closes the descriptor and emits ResourceWarning. Not for use
    by several threads at a time.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = -1  # __del__ runs even if what follows raises
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

    @property
    def closed(self) -> bool:
        """Whether there is nothing to own any more, be it closed or stolen."""
        return self._fd < 0

    def fileno(self) -> int:
        """Borrow the descriptor: valid while this object owns it. Raises ValueError after close() or steal()."""
        if self._fd < 0:
            raise ValueError("the file descriptor was closed or given away")
        return self._fd

    def steal(self) -> int:
        """Return the descriptor and stop owning it. Raises ValueError after close() or steal()."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def dup(self) -> OwnedFd:
        """Return a second descriptor of the same open file, close-on-exec. Raises OSError (EMFILE) or ValueError."""
        return OwnedFd(fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        # Linux frees the number even when close() fails, so it is forgotten first.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed file descriptor {self._fd}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return "<OwnedFd closed>" if self._fd < 0 else f"<OwnedFd {self._fd}>"


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close every one of `fds`, also when the file system of one fails to: what it could lose is not ours."""
    for fd in fds:
        with contextlib.suppress(OSError):
            fd.close()
