# SPDX-License-Identifier: MIT
"""Standard streams that udmabufctl was started without (`>&-`): /dev/null in their place. Writes nothing itself."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Make sure that descriptors 0 to 2, and the streams of sys on them, are there.

    Otherwise the next descriptor that is opened, such as a buffer's, would be taken for a standard stream by whoever
    inherits it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is what open(2) returns, and all below this one are taken by now.
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            assert null == number
            # Commands expect to inherit their standard streams.
            os.set_inheritable(null, True)
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
