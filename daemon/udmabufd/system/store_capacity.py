# SPDX-License-Identifier: MIT
"""Whether the service manager can keep what the configuration allows: checked at the start, not found out when full.

Beyond its size the store closes what it is given without a word to the service; with a limit of open files or an
environment string that is too small, the service would not start again at all.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Final

from udmabufd.system.store_names import LONGEST

if TYPE_CHECKING:
    from collections.abc import Mapping

FDS_PER_BUFFER: Final = 3
"""Descriptors that are stored for a buffer, at most."""

STATE_FDS: Final = 8
"""Descriptors that are stored for the daemon's own state, at most."""

SPARE_FDS: Final = 2048
"""Descriptors that the service needs beside the stored ones: copies on their way to clients, sockets, devices."""

MAX_FDNAMES: Final = 131_056
"""Bytes that $LISTEN_FDNAMES can carry, a separator after each name: the kernel's limit of one environment string is
128 KiB, with the variable's name and the final zero."""

MAX_BUFFERS: Final = (MAX_FDNAMES // (LONGEST + 1) - STATE_FDS) // FDS_PER_BUFFER
"""Buffers whose names fit into that."""


class StoreError(Exception):
    """The service manager could not keep all buffers; the text names the figures and what to change."""


def stored_fds(max_buffers: int) -> int:
    """Return the descriptors that may be stored with `max_buffers` buffers."""
    return FDS_PER_BUFFER * max_buffers + STATE_FDS


def check_capacity(max_buffers: int, environ: Mapping[str, str], hard_nofile: int) -> None:
    """Raise StoreError unless all descriptors of `max_buffers` buffers can be stored and given back.

    `environ` is what the service manager started the process with: $FDSTORE, from systemd 254 on, is the size of its
    store. `hard_nofile` is the hard limit of open files, resource.RLIM_INFINITY for none.
    """
    if max_buffers > MAX_BUFFERS:
        raise StoreError(
            f"max_buffers is {max_buffers}, but the service manager can give back the descriptors of {MAX_BUFFERS} "
            f"buffers only: set max_buffers in udmabufd.toml to {MAX_BUFFERS} or less"
        )
    fds = stored_fds(max_buffers)
    size = environ.get("FDSTORE", "")
    if size.isascii() and size.isdecimal() and int(size) < fds:
        raise StoreError(
            f"max_buffers is {max_buffers}, which takes {fds} descriptors in the service manager's store, and that "
            f"has room for {size}: set FileDescriptorStoreMax={fds} or more in a drop-in of the unit "
            "(systemctl edit udmabufd), or lower max_buffers in udmabufd.toml"
        )
    if hard_nofile != resource.RLIM_INFINITY and hard_nofile < fds + SPARE_FDS:
        raise StoreError(
            f"max_buffers is {max_buffers}, which takes {fds + SPARE_FDS} open files, and {hard_nofile} are allowed: "
            f"set LimitNOFILE={fds + SPARE_FDS} or more in a drop-in of the unit (systemctl edit udmabufd), or lower "
            "max_buffers in udmabufd.toml"
        )
