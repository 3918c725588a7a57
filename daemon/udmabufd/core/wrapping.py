# SPDX-License-Identifier: MIT
"""The use case of a client that brings its own memory: what is checked, and the buffer that is made of it.

Which memfds are taken is decided in wrap.py. What the caller asked for in one call or again is the service's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from udmabufd.core import wrap
from udmabufd.core.attachments import Wish
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.creation import Creation
from udmabufd.core.errors import BadMemfd
from udmabufd.core.identity import Identity
from udmabufd.core.lanes import Lanes
from udmabufd.core.ledger import ROOT
from udmabufd.core.maker import Maker, Source
from udmabufd.core.memory import Accounting
from udmabufd.core.placement import Placement, under
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import WRAPPED


class Wrapping:
    """See the module."""

    def __init__(
        self, creation: Creation, maker: Maker, placement: Placement, wrapper: UdmabufAllocator, identity: Identity
    ) -> None:
        """`wrapper` exports the memfds of clients."""
        self._creation = creation
        self._maker = maker
        self._placement = placement
        self._wrapper = wrapper
        self._identity = identity
        self._lanes = Lanes()

    def check(
        self, memfds: Sequence[OwnedFd], ranges: Sequence[wrap.Range], options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any]]:
        """Return the request that a call is, and what tells it from others. Raises BadMemfd, InvalidSpec."""
        pages = []
        for index, fd in enumerate(memfds):
            if (page := self._identity.memfd_page(fd.fileno())) is None:
                raise BadMemfd(f"memfd {index} is no memfd")
            pages.append(page)
        size = wrap.check(memfds, ranges, pages)
        named = {key: value for key, value in options.items() if key in ("name", "constraints")}
        request = Request.from_spec({"size": size, **named}).wrapping()
        files = [self._identity.of(fd.fileno()) for fd in memfds]
        return request, {**request.canonical(options), "memfds": files, "ranges": list(ranges)}

    async def make(
        self,
        request: Request,
        holder: Holder,
        wishes: Sequence[Wish],
        asked: Repeat | None,
        memfds: Sequence[OwnedFd],
        ranges: Sequence[wrap.Range],
    ) -> list[Buffer]:
        """Make a buffer of `ranges` of `memfds`, which are borrowed."""
        size = sum(length for _, _, length in ranges)
        self._placement.check_wrapped(under(request, wishes), size)
        for refusal in self._wrapper.refusals(size, len(ranges)):
            raise refusal.error
        if holder.uid != ROOT:
            self._maker.check_left_behind()
        export = wrap.exporter(self._wrapper, memfds, ranges, privileged=holder.uid == ROOT)

        def source(names: Sequence[str]) -> list[Source]:
            # Admitted as if its pages were the service's own: those that are punched meanwhile will be.
            return [Source(WRAPPED, size, Accounting.SERVICE, partial(export, names))]

        async with self._lanes.turn(holder.uid):
            run = partial(self._lanes.run, holder.uid)
            return await self._creation.make(request, holder, wishes, asked, 1, source, run)
