# SPDX-License-Identifier: MIT
"""An OSError that says what the errno alone does not; which errno deserves one is left to the module that sees it."""

from __future__ import annotations

import errno
import os


class HintedOSError(OSError):
    """An OSError with the call that failed and a hint at cause and next step.

    `errno` and `strerror` are the kernel's, `call` is the call's name in the kernel's spelling, `hint` an English
    clause. It is never one of the built-in subclasses (FileNotFoundError and the like): compare `errno`.
    """

    def __init__(self, code: int, call: str, hint: str) -> None:
        super().__init__(code, os.strerror(code))
        self.call = call
        self.hint = hint

    def __str__(self) -> str:
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.call}: {self.strerror} ({name}): {self.hint}"

    def __reduce__(self) -> tuple[type[HintedOSError], tuple[int, str, str]]:
        return type(self), (self.errno or 0, self.call, self.hint)
