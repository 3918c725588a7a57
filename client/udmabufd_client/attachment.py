# SPDX-License-Identifier: MIT
"""One attachment: a device that this client has said will touch a buffer, until it is detached or gone.

What the service is told of it is attachments.py's business; aio and sync add the verbs to AttachmentBase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from udmabufd_base.codec import Variant

if TYPE_CHECKING:
    from udmabufd_client.share import Share

_RELEASED = "its buffer was closed or released"


class Attached:
    """The remote half of an attachment: what this client has at the service, and what is needed to have it again.

    `number` is 0 while the service is not known to have it.
    """

    __slots__ = ("__weakref__", "constraints", "device", "leaving", "number", "options", "pins", "reason", "share")

    def __init__(self, share: Share, number: int, device: str, options: Mapping[str, Variant]) -> None:
        self.share = share
        self.number = number
        self.device = device
        self.options = options
        """What Attach was told, as its a{sv}."""
        self.constraints: dict[str, Any] = {}
        """The merged constraints, as Attach answered them."""
        self.pins = 0
        """How often it is pinned."""
        self.leaving = False
        """Whether it is being detached: it is not had again then."""
        self.reason = ""
        """Why it has ended; empty while it has not."""

    @property
    def dynamic(self) -> bool:
        """Whether the importer can be told to use other memory."""
        return "dynamic" in self.options and bool(self.options["dynamic"].value)

    @property
    def live(self) -> bool:
        """Whether it is, or is being had again."""
        return not self.reason and not self.leaving

    def end(self, reason: str) -> bool:
        """It has ended; False if it had before."""
        if self.reason:
            return False
        self.reason = reason
        return True


class AttachmentBase:
    """A device that is attached to a buffer, for memory that suits it.

    It ends with detach(), with the Buffer that it is of, or with the device: then `ended` is true and `reason` says
    why. It outlives restarts of the service and of the bus; `number` can change then, so Buffer.get_fd() is given the
    attachment itself.
    """

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    @property
    def number(self) -> int:
        """Its number at the service: from 1, per buffer, never used again; 0 while it is being had again."""
        return self._attached.number

    @property
    def device(self) -> str:
        """The device, as it was named when it was attached."""
        return self._attached.device

    @property
    def dynamic(self) -> bool:
        """Whether the importer can be told to use other memory."""
        return self._attached.dynamic

    @property
    def pins(self) -> int:
        """How often this client has pinned it: meanwhile the buffer is neither moved nor evicted."""
        return 0 if self.ended else self._attached.pins

    @property
    def buffer_id(self) -> str:
        """The id of the buffer that it is of."""
        return self._attached.share.id

    @property
    def constraints(self) -> Mapping[str, Any]:
        """The merged constraints of all that were attached when this one was: Buffer.constraints has the present ones.

        Keys as in contract.CONSTRAINT_KEYS.
        """
        return self._attached.constraints

    @property
    def ended(self) -> bool:
        """Whether it is over, for whatever reason."""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """Why it has ended, as a sentence; empty while it has not."""
        return self._attached.reason or (_RELEASED if self._attached.share.released else "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttachmentBase) and other._attached is self._attached

    def __hash__(self) -> int:
        return hash(id(self._attached))

    def __repr__(self) -> str:
        state = f", ended: {self.reason}" if self.ended else ""
        return f"<attachment {self.number} of {self.device} to buffer {self.buffer_id}{state}>"
