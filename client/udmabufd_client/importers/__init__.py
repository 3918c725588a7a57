# SPDX-License-Identifier: MIT
"""Asking the kernel itself whether a device takes a buffer: it is imported, as the caller, and let go again.

node.py looks at what a path leads to, drm.py and v4l2.py import, outcome.py says what came of it. Nothing here knows
the service: what it says of a device is compared by whoever calls verify().
"""

from __future__ import annotations

from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Kind
from udmabufd_client.importers import drm, v4l2
from udmabufd_client.importers.node import DRM, Node, NotAnImporter, look_at
from udmabufd_client.importers.outcome import Outcome, Refused, Step, of
from udmabufd_client.info import BufferInfo

__all__ = ["Outcome", "verify"]


def verify(node: str, fd: int, info: BufferInfo) -> Outcome:
    """Import the dma-buf `fd` (borrowed) into the device `node`, a path, with the caller's own rights.

    `info` tells of a picture, which a V4L2 device is set to where it can. Blocks as the drivers do, usually for
    milliseconds. Raises nothing for what the kernel refuses: that is the Outcome. All is as before afterwards:
    descriptors, handles, queues, a device's format.
    """
    if info.kind == Kind.MEMFD:
        reason = "The buffer is a memfd, and devices import dma-bufs: allocate one of the kind dma-buf."
        return Outcome(False, "", reason, tried=False)
    try:
        looked_at = look_at(node)
    except NotAnImporter as error:
        return Outcome(False, "", str(error), tried=False)
    except OSError as error:
        return of(Refused(Step.LOOK, error, ""), node)
    try:
        with looked_at.fd, _open(looked_at) as device:
            return drm.take(device, fd) if looked_at.subsystem == DRM else v4l2.take(device, fd, info)
    except Refused as refused:
        return of(refused, node)


def _open(node: Node) -> OwnedFd:
    try:
        return node.open()
    except OSError as error:
        raise Refused(Step.OPEN, error, "") from error
