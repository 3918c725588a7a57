# SPDX-License-Identifier: MIT
"""The signals that ask udmabufctl to end. What is done about them is each verb's own."""

from __future__ import annotations

import signal


def heeded() -> list[signal.Signals]:
    """Return those of SIGINT, SIGTERM and SIGHUP that whoever started this process did not make it ignore.

    A handler on one of the others would undo nohup, here and, since exec sets handled signals back to their defaults,
    in a command that is run.
    """
    return [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
