# SPDX-License-Identifier: MIT
"""What a process can give up by prctl(2), through python-prctl where installed; when to do so is left to others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

_CAP_LAST_CAP: Final = "/proc/sys/kernel/cap_last_cap"


def harden(name: str, by_hand: bool) -> list[str]:
    """Name the process and make it undumpable; `by_hand`, also set no_new_privs and empty the bounding set.

    For what was started `by_hand`, not by a service manager that sets the latter two. `name` has at most 15 bytes;
    ps and top show it. An undumpable process writes no core, cannot be traced by its own user, and its descriptors
    cannot be taken by pidfd_getfd; its files in /proc belong to root (up to Linux 5.10 it cannot read its own fdinfo,
    unless it is root).

    Returns one line for each step, on what was applied or why not, and raises nothing. Name, no_new_privs and bounding
    set are the calling thread's and inherited by threads started later: call it from the main thread, first.
    """
    try:
        import prctl
    except ImportError as error:
        return [f"python-prctl cannot be imported ({error}): nothing was given up; install python3-prctl"]
    steps: list[tuple[str, Callable[[], None]]] = [
        (f"process name {name}", lambda: prctl.set_name(name)),
        ("not dumpable", lambda: prctl.set_dumpable(False)),
    ]
    if by_hand:
        steps += [
            ("no_new_privs", lambda: prctl.set_no_new_privs(True)),
            ("empty capability bounding set", lambda: _empty_bounding_set(prctl)),
        ]
    return [_apply(what, step) for what, step in steps]


def _apply(what: str, step: Callable[[], None]) -> str:
    try:
        step()
    except (OSError, ValueError) as error:
        return f"{what}: not applied: {error}"
    return f"{what}: applied"


def _empty_bounding_set(prctl: ModuleType) -> None:
    """Raises PermissionError without CAP_SETPCAP, as for an ordinary user, whom no_new_privs holds already."""
    # python-prctl knows the capabilities of the kernel that it was compiled for, not of this one.
    last = int(Path(_CAP_LAST_CAP).read_bytes())
    for capability in range(last + 1):
        if prctl.capbset_read(capability):
            prctl.capbset_drop(capability)
