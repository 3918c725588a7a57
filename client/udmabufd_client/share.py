# SPDX-License-Identifier: MIT
"""One share of one buffer: what this connection holds at the service, and what the service last said of it.

The remote half of a Buffer. Kept fresh by the service's signals; knows no descriptor and no mapping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from udmabufd_client import contract
from udmabufd_client.contract import State
from udmabufd_client.info import BufferInfo, state_of

_INFO_OF_PROPERTY: Final = {"Size": "size", "Serial": "serial", "Allocator": "allocator", "Name": "name"}


class Share:
    """A counted share of the buffer at `path`, given by the connection `owner` (the service's unique name).

    Calls about the buffer go to `owner` and not to the well-known name: a service that was started anew knows
    nothing of the shares of the former one, and must not be asked as if it did.
    """

    __slots__ = ("__weakref__", "_heard", "info", "owner", "path", "released", "state")

    def __init__(self, path: str, owner: str, info: BufferInfo) -> None:
        self.path = path
        self.owner = owner
        self.info = info
        self.state: str = state_of(info)
        self.released = False
        self._heard: dict[str, Any] = {}

    @property
    def id(self) -> str:
        """The buffer's id: 16 hexadecimal digits."""
        return self.path.removeprefix(contract.BUFFER_PATH_PREFIX)

    def expect(self) -> None:
        """Begin a call whose reply tells of the buffer: signals from here on are no older than that reply.

        A signal is seen as soon as it is read, a reply one turn of the loop later; what a signal said meanwhile is
        applied again after the reply.
        """
        self._heard.clear()

    def heard(self, name: str) -> bool:
        """Whether a signal told of property `name` since expect()."""
        return name in self._heard

    def told_info(self, info: BufferInfo) -> None:
        """Take `info` from a reply."""
        self.info = info
        self.state = state_of(info)
        self._apply(self._heard)

    def told_properties(self, properties: Mapping[str, Any]) -> None:
        """Take properties of Buffer1 (plain values) from a reply or a signal."""
        self._heard.update(properties)
        self._apply(properties)

    def _apply(self, properties: Mapping[str, Any]) -> None:
        if "State" in properties:
            said = properties["State"]
            self.state = State(said) if said in State.__members__.values() else said
        # In info a key without a value is absent; properties have 0 and "" there.
        known = {field: properties[name] or None for name, field in _INFO_OF_PROPERTY.items() if name in properties}
        self.info = dataclasses.replace(self.info, **known)
