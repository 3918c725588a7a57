# SPDX-License-Identifier: MIT
"""What a call brings and may bring, by the XML: arguments decoded or refused, and how many descriptors in and out."""

from __future__ import annotations

from typing import Any

from udmabufd.bus.objects import EdgeError
from udmabufd.core.errors import RateLimited
from udmabufd_base.connection import Incoming
from udmabufd_base.errors import ProtocolError
from udmabufd_base.interface import Method
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE

MAX_CALL_BYTES = 32 << 10
"""Largest body of a call; a spec has a few hundred bytes, 1,024 ranges of WrapMemfd 24 KiB."""


def descriptors_in(method: Method) -> int:
    """Return the most descriptors that a call of the method can have."""
    if "ah" in method.in_signature:
        return MAX_FDS_PER_MESSAGE
    return method.in_signature.count("h")


def descriptors_out(method: Method) -> int:
    """Return the most descriptors that the method's reply can have."""
    if "ah" in method.out_signature:
        return MAX_FDS_PER_MESSAGE
    return method.out_signature.count("h")


def arguments_of(method: Method, incoming: Incoming, fds: int) -> list[Any]:
    """Return the decoded arguments. Raises EdgeError, RateLimited."""
    header = incoming.header
    if header.signature != method.in_signature:
        raise EdgeError("InvalidArgs", f"{header.member} takes {method.in_signature!r}, not {header.signature[:32]!r}")
    if incoming.oversize:
        raise EdgeError("LimitsExceeded", f"The arguments exceed {MAX_CALL_BYTES} bytes")
    if header.unix_fds > (most := descriptors_in(method)):
        if most:
            raise EdgeError("InvalidArgs", f"{header.member} takes {most} descriptors, not {header.unix_fds}")
    elif fds < header.unix_fds:
        raise RateLimited(
            f"The {header.unix_fds} descriptors of this call were not taken: too many that came before do not close; "
            "try again"
        )
    try:
        return incoming.body()
    except ProtocolError:
        raise EdgeError("InvalidArgs", "The arguments cannot be decoded") from None
