# SPDX-License-Identifier: MIT
"""Calls that may be repeated: what each request_id stands for, so that a retry makes nothing twice.

Knows ids, digests of specs and the buffers that came of them. Shares, and how long such a buffer outlives its last
holder, are left to the service.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from udmabufd.core.buffer import Buffer, Repeat
from udmabufd.core.errors import InvalidSpec
from udmabufd.core.ledger import Owner
from udmabufd_client.contract import REQUEST_ID_MAX, REQUEST_ID_MIN

KEY: Final = "request_id"

_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class _UnderWay:
    asked: Repeat
    over: asyncio.Future[None]


def repeat_of(owner: Owner, member: str, spec: Mapping[str, Any], count: int) -> Repeat | None:
    """Return what `spec` says of repeating the call, None without a request_id. Raises InvalidSpec."""
    if KEY not in spec:
        return None
    request_id = spec[KEY]
    if not REQUEST_ID_MIN <= len(request_id) <= REQUEST_ID_MAX or not _PRINTABLE.fullmatch(request_id):
        raise InvalidSpec(KEY, f"must have {REQUEST_ID_MIN} to {REQUEST_ID_MAX} printable characters without spaces")
    rest = json.dumps({key: value for key, value in spec.items() if key != KEY}, sort_keys=True)
    return Repeat(owner, request_id, member, hashlib.sha256(rest.encode()).hexdigest()[:32], 0, count)


class Requests:
    """The ids that stand for buffers which are there, or are being made."""

    def __init__(self) -> None:
        self._made: dict[tuple[Owner, str], list[Buffer]] = {}
        self._under_way: dict[tuple[Owner, str], _UnderWay] = {}

    async def once(
        self, asked: Repeat | None, make: Callable[[], Awaitable[list[Buffer]]]
    ) -> tuple[list[Buffer], bool]:
        """Return the buffers that the id stands for, and whether this very call has made them.

        Raises InvalidSpec if the id stands for something else, and what `make` does.
        """
        if asked is None:
            return await make(), True
        key = asked.owner, asked.request_id
        while (under_way := self._under_way.get(key)) is not None:
            _compare(under_way.asked, asked)
            # If that call fails, perhaps because its caller has gone, this one is the first.
            await asyncio.wait((under_way.over,))
        if (made := self._made.get(key)) is not None:
            assert made[0].repeat is not None
            _compare(made[0].repeat, asked)
            return made, False
        over = asyncio.get_running_loop().create_future()
        self._under_way[key] = _UnderWay(asked, over)
        try:
            made = self._made[key] = await make()
            return made, True
        finally:
            del self._under_way[key]
            over.set_result(None)

    def forget(self, buffer: Buffer) -> list[Buffer]:
        """Forget the id of a buffer that ends: it stands for all of its buffers or for none. Return the others."""
        if buffer.repeat is None:
            return []
        key = buffer.repeat.owner, buffer.repeat.request_id
        made = self._made.get(key, [])
        if buffer not in made:
            # The id was used again since, or this one is left of a call that failed.
            return []
        del self._made[key]
        return [other for other in made if other is not buffer]

    def restore(self, buffers: Iterable[Buffer]) -> list[Buffer]:
        """Take the ids of a former life of the service, of those whose buffers are all there. Return the others: an id
        stands for all of its buffers or for none.
        """
        found: dict[tuple[Owner, str], dict[int, Buffer]] = {}
        for buffer in buffers:
            if buffer.repeat is not None:
                found.setdefault((buffer.repeat.owner, buffer.repeat.request_id), {})[buffer.repeat.index] = buffer
        rest: list[Buffer] = []
        for key, made in found.items():
            in_order = [made[index] for index in sorted(made)]
            assert in_order[0].repeat is not None
            if len(in_order) < in_order[0].repeat.count:
                rest += in_order
                continue
            self._made[key] = in_order
            for buffer in in_order:
                buffer.unanswered.update(buffer.shares.keys() - buffer.answered)
        return rest


def numbered(asked: Repeat | None, index: int) -> Repeat | None:
    """Return `asked` for buffer number `index` of those that it stands for."""
    return None if asked is None else replace(asked, index=index)


def _compare(known: Repeat, asked: Repeat) -> None:
    if known.member != asked.member:
        raise InvalidSpec(KEY, f"was used in {known.member} before, and stands for what that made")
    if known.count != asked.count:
        raise InvalidSpec(KEY, f"stands for {known.count} buffers, not {asked.count}")
    if known.digest != asked.digest:
        raise InvalidSpec(KEY, "was used with another spec before, and stands for what that made")
