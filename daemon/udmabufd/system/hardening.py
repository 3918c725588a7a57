# SPDX-License-Identifier: MIT
"""Decides what the process gives up by itself: what a unit cannot do for it, and more when it was started by hand.

The unit udmabufd.service is the sandbox. Outside of it there is none; then at least no program that the process might
start may gain privileges. How that is done is left to linux.prctl.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from udmabufd.linux import prctl

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME: Final = "udmabufd"
"""The name of the process in ps and top, which would else be that of the interpreter."""


def started_by_systemd(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether a unit of systemd started this very process, not a shell somewhere below one."""
    variables = os.environ if environ is None else environ
    return variables.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def apply(environ: Mapping[str, str] | None = None) -> list[str]:
    """Set the name, make the process undumpable, and started by hand also no_new_privs and an empty bounding set.

    Returns one line for each step, on what was done or why not, to be logged.
    """
    by_hand = not started_by_systemd(environ)
    origin = "started by hand, without the unit's sandbox" if by_hand else "started by systemd, in the unit's sandbox"
    return [origin, *prctl.harden(NAME, by_hand=by_hand)]
