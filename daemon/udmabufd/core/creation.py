# SPDX-License-Identifier: MIT
"""Making the buffers of one call: all of them or none, and once, however often the call is repeated.

Which memory they get, the caller says; how, the maker. What was asked was checked before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import TypeVar

from udmabufd.core.attaching import Attaching
from udmabufd.core.attachments import Wish
from udmabufd.core.buffer import Buffer, Holder, Repeat
from udmabufd.core.custody import Custody
from udmabufd.core.errors import NoSuchBuffer, QuotaExceeded
from udmabufd.core.maker import Maker, Run, Source
from udmabufd.core.requests import numbered
from udmabufd.core.spec import Request

T = TypeVar("T")


async def _nothing() -> None:
    pass


class Creation:
    """See the module."""

    def __init__(self, custody: Custody, maker: Maker, attaching: Attaching) -> None:
        self._custody = custody
        self._registry = custody.registry
        self._maker = maker
        self._attaching = attaching

    async def once(
        self,
        holder: Holder,
        asked: Repeat | None,
        make: Callable[[], Awaitable[list[Buffer]]],
        wishes_again: Callable[[], Awaitable[list[Wish]]],
    ) -> tuple[list[Buffer], bool]:
        """Return the buffers that `make` makes, and True; or those that were made when the same was `asked` before, of
        which `holder` has a share and the attachments that it wishes for by now, and False.
        """
        buffers, made = await self._custody.requests.once(asked, make)
        if not made:
            wishes = await wishes_again()
            with ExitStack() as undo:
                for buffer in buffers:
                    self._registry.share(buffer, holder, repeated=True)
                    undo.callback(self.abandon, buffer, holder)
                    attachments = await self._attaching.attach_again(buffer, holder, wishes)
                    undo.callback(self._attaching.undo, buffer, attachments)
                undo.pop_all()
        return buffers, made

    async def make(
        self,
        request: Request,
        holder: Holder,
        wishes: Sequence[Wish],
        asked: Repeat | None,
        count: int,
        sources: Callable[[Sequence[str]], Iterable[Source]],
        run: Run | None = None,
    ) -> list[Buffer]:
        """Make `count` buffers with memory of the `sources` for their names: all or none."""
        with ExitStack() as locks, ExitStack() as undo:
            buffers = []
            for index in range(count):
                buffer = await self.create(request, holder, wishes, numbered(asked, index))
                undo.callback(self._custody.abandon, buffer, holder)
                # At once: nobody else may give it memory while the others are made.
                await buffer.backing.acquire()
                locks.callback(buffer.backing.release)
                # The caller is about to get a descriptor: from the first moment on it stays where it is.
                self._registry.loosen(buffer, holder)
                buffers.append(buffer)
            names = [buffer.name for buffer in buffers]
            await self._maker.make(buffers, sources(names), run)
            if any(holder not in buffer.shares for buffer in buffers):
                # Released while the others were made; its memory may be a mere witness by now.
                raise NoSuchBuffer
            undo.pop_all()
        return buffers

    async def create(
        self,
        request: Request,
        holder: Holder,
        wishes: Sequence[Wish],
        repeat: Repeat | None,
        *,
        recorded: bool = False,
    ) -> Buffer:
        """Make one buffer without memory; see Registry.create()."""

        def step() -> Buffer:
            return self._attaching.watched(
                wishes,
                lambda: self._registry.create(request, holder, wishes=wishes, repeat=repeat, recorded=recorded),
            )

        return await self.swept(holder, step)

    async def swept(
        self, holder: Holder, step: Callable[[], T], before: Callable[[], Awaitable[None]] = _nothing
    ) -> T:
        """Do `step` right after `before`; if a quota forbids it, both once more after what the user has let go of was
        looked at.
        """
        await before()
        try:
            return step()
        except QuotaExceeded:
            await self._custody.lingering.look_again(holder.uid)
            await before()
            return step()

    def abandon(self, buffer: Buffer, holder: Holder) -> None:
        """Undo a share of a call that failed; the holder may have released it, or be gone, already."""
        with suppress(NoSuchBuffer):
            self._registry.release(buffer, holder)
