# SPDX-License-Identifier: MIT
"""Calls of clients: what is expected of each, and what it means if it is answered, refused or cut off by a kill."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.unit.books import ORDINARY, Client, Known, Payer, Verdict
from tests.unit.comparison import Compared, Wrong, same
from tests.unit.time_loop import at_rest
from udmabufd.core.errors import AllocatorError, InvalidSpec, NoSuchDevice, QuotaExceeded
from udmabufd.core.service import Grant
from udmabufd_base.fd import OwnedFd


@dataclass
class Question:
    """A call that can be repeated."""

    member: str
    spec: dict[str, Any]
    count: int
    brought: OwnedFd | None = None


Errors = type[AllocatorError] | tuple[type[AllocatorError], ...]


@dataclass
class Meanwhile:
    """A call of somebody else that has to wait for the end of one; what is expected of it is asked then."""

    run: Callable[[], Awaitable[Any]]
    call: Callable[[], Call]


@dataclass
class Call:
    """A call, what is expected of it, and what it means if it is answered, refused or cut off."""

    run: Callable[[], Awaitable[Any]]
    done: Callable[[Any], None]
    cut_off: Callable[[], None]
    verdict: Verdict = Verdict.ALLOWED
    error: Errors | None = None
    perhaps: bool = False
    """Whether it depends on what the service has done by now whether there is that error."""
    refused: Callable[[], None] = lambda: None
    expected: Callable[[], Errors | None] | None = None
    """Tells afterwards which error there had to be, where that depends on what importers have done meanwhile."""
    meanwhile: Meanwhile | None = None


PATIENCE = 60.0
"""Seconds that no call takes, whatever others do."""


class Calls(Compared):
    """See the module. The next call is cut off after `kill_in` effects, if that is set."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.questions: dict[tuple[Payer, str], Question] = {}
        self.kill_in: int | None = None

    async def _call(self, call: Call) -> None:
        machine = self.machine
        if self.kill_in is not None:
            machine.kill_after = len(machine.effects) + self.kill_in
        task = asyncio.ensure_future(call.run())
        other = await self._start_meanwhile(call, task)
        await self._wait_for(task)
        machine.kill_after = self.kill_in = None
        if machine.killed:
            if task.done() and not task.cancelled() and task.exception() is None:
                _close_grants(task.result())
            await self._again()
            self.happened["killed during a call"] += 1
            call.cut_off()
            self.books.restarted(self.now)
            return
        self._judge(call, task)
        if other is not None:
            assert call.meanwhile is not None
            await self._wait_for(other)
            self._judge(call.meanwhile.call(), other)
            self.happened["waited for a move"] += 1

    async def _wait_for(self, task: asyncio.Future[Any]) -> None:
        begun = self.now
        while not task.done() and not self.machine.killed:
            await asyncio.wait((task,), timeout=0.05)
            if self.now > begun + PATIENCE:
                raise Wrong("a call waits for ever")

    async def _start_meanwhile(self, call: Call, task: asyncio.Future[Any]) -> asyncio.Future[Any] | None:
        """Begin with what somebody else wants meanwhile, if `call` waits for anything."""
        if call.meanwhile is None:
            return None
        await at_rest()
        if task.done():
            return None
        other = asyncio.ensure_future(call.meanwhile.run())

        def check(_: object) -> None:
            if not task.done():
                self.happened["not waited for"] += 1

        other.add_done_callback(check)
        return other

    def _judge(self, call: Call, task: asyncio.Future[Any]) -> None:
        """Hold the outcome against what was expected."""
        if call.expected is not None:
            call.error = call.expected()
        try:
            answer = task.result()
        except QuotaExceeded as error:
            if call.verdict is Verdict.ALLOWED:
                raise Wrong(f"refused, though allowed: {error}") from error
            call.refused()
            self.happened["refused for a quota"] += 1
            return
        except AllocatorError as error:
            if call.error is None or not isinstance(error, call.error):
                raise Wrong(f"unexpected: {error!r}") from error
            self.happened[type(error).__name__] += 1
            return
        if call.verdict is Verdict.REFUSED:
            raise Wrong("allowed, though it had to be refused")
        if call.error is not None and not call.perhaps:
            raise Wrong(f"allowed, though it had to be refused with {call.error}")
        call.done(answer)

    def _make(self, client: Client, question: Question, asked: tuple[Payer, str] | None) -> Call:
        """Something that makes buffers, or repeats what made them."""
        spec, holder = question.spec, self.holder(client)
        brought = question.brought
        service = self.life.service

        async def run() -> Any:
            if question.member == "CreateBuffer":
                return await service.create(holder, spec)
            if brought is not None:
                options = {key: value for key, value in spec.items() if key != "size"}
                return await service.wrap(holder, [brought], [(0, 0, spec["size"])], options)
            return await service.allocate(holder, spec, question.count if question.member == "AllocateMany" else None)

        devices = spec.get("devices", [])
        if devices and spec.get("kind") == "memfd":
            return Call(run, nothing, lambda: None, error=InvalidSpec)
        if asked in self.books.stands:
            stood, buffers = self.books.stands[asked]
            if stood != (question.member, question.count, plain_spec(spec)):
                return Call(run, nothing, lambda: None, error=InvalidSpec)
            self.happened["asked again without a device"] += bool(self.gone.intersection(devices))
            # What has been made is there, though a device of it is not.
            return self._repeat(client, buffers, [device for device in devices if device not in self.gone], run)
        if self.gone.intersection(devices):
            return Call(run, nothing, lambda: None, error=NoSuchDevice)
        kind = "wrapped" if brought is not None else spec.get("kind", "dma-buf")
        backed = question.member != "CreateBuffer"
        more = {"buffers": question.count, "shares": question.count, "attachments": question.count * len(devices)}
        if backed:
            more["wrapped" if kind == "wrapped" else "bytes"] = spec["size"] * question.count

        def made(found: Sequence[Any]) -> None:
            new = [Known(spec["size"], kind, b.name, client.owner, id=b.id, ticket=b.ticket) for b in found]
            self.known += new
            self.books.made(client, new, asked, (question.member, question.count, plain_spec(spec)), devices)
            if backed:
                for known in new:
                    known.back({"dma-buf": ORDINARY}.get(kind, kind))
                    known.loosen(client)
                    if brought is not None:
                        # Wrapped once before, it has what was written then.
                        known.content = self.machine.read(brought)
            self.happened["attached with a buffer"] += bool(devices)

        def done(answer: Any) -> None:
            made(buffers_of(answer))
            for known, fd in zip(self.known[-question.count :], fds_of(answer), strict=False):
                known.fds.append(fd)
            self._tell(client, self.known[-question.count :], answer)
            if "name" in spec:
                same("name", {b.name for b in buffers_of(answer)}, {spec["name"]})

        def cut_off() -> None:
            ids = {known.id for known in self.known}
            new = [buffer for buffer in self.life.custody.registry if buffer.id not in ids]
            if not new:
                return
            made(new)
            if len(new) < question.count:
                self.books.stands.pop(asked, None)
            for known in self.known[-len(new) :]:
                if len(new) < question.count:
                    known.asked = None
                if not self._shares_now(known, client):
                    self.books.release(known, client, self.now)
                self._loose_by_half(known, client)
            held = [known for known in self.known[-len(new) :] if known.shares]
            # Without an id there is a moment in which some of the shares are recorded, and not yet the others.
            if held and len(new) < question.count and asked is not None:
                raise Wrong(f"{len(held)} of {question.count} buffers are held by who was never told")

        return Call(run, done, cut_off, self.books.verdict(client.owner, more))

    def _repeat(
        self, client: Client, buffers: list[Known], devices: list[str], run: Callable[[], Awaitable[Any]]
    ) -> Call:
        more: Counter[str] = Counter()
        shared, verdicts = [], []
        missing = [self.books.missing(buffer, client, devices) for buffer in buffers]
        for buffer, rest in zip(buffers, missing, strict=True):
            more.update(self.books.to_share(buffer, client))
            shared.append(self.books.verdict(client.owner, more, swept=False))
            more.update(attachments=len(rest))
            verdicts.append(self.books.verdict(client.owner, more, swept=False))
        verdict = Verdict.ALLOWED if verdicts[-1] is Verdict.ALLOWED else Verdict.REFUSED

        def done(answer: Any) -> None:
            self.happened["answered again"] += 1
            same("the buffers", [b.id for b in buffers_of(answer)], [b.id for b in buffers])
            for known, fd in zip(buffers, fds_of(answer), strict=False):
                known.fds.append(fd)
            for buffer, rest in zip(buffers, missing, strict=True):
                self.books.share_again(buffer, client)
                self.books.attach(buffer, client, rest)
                if fds_of(answer):
                    buffer.loosen(client)
                self.happened["attached again"] += bool(rest)
            self._tell(client, buffers, answer)

        def refused() -> None:
            # Those before the one that was too many were shared, and given back.
            for buffer, share, all_of_it, rest in zip(buffers, shared, verdicts, missing, strict=True):
                if share is not Verdict.ALLOWED:
                    break
                self.books.share_again(buffer, client)
                if all_of_it is Verdict.ALLOWED:
                    # Numbers that were given are spent.
                    buffer.attached += len(rest)
                self.books.release(buffer, client, self.now)
                if all_of_it is not Verdict.ALLOWED:
                    break

        def cut_off() -> None:
            for buffer, rest in zip(buffers, missing, strict=True):
                if self._shares_now(buffer, client) > buffer.shares.get(client, 0):
                    self.books.share(buffer, client)
                self._attached_by_half(buffer, client, rest)
                self._loose_by_half(buffer, client)

        return Call(run, done, cut_off, verdict, refused=refused)

    def _attached_by_half(
        self, known: Known, client: Client, devices: Sequence[str], *, dynamic: bool = False
    ) -> None:
        """See how many of `devices` were attached when the service was killed: some of them, in their order."""
        buffer = self._there(known)
        if buffer is not None and client in known.shares:
            loose = client in known.loose and self.holder(client) in buffer.loose
            self.books.attach(known, client, devices[: buffer.attached - known.attached], dynamic=dynamic)
            if loose:
                # Who was never told of its attachment does not answer for it either, until it has another.
                known.loose.add(client)

    def _loose_by_half(self, known: Known, client: Client) -> None:
        """See whether the descriptor that `client` was about to get is known of."""
        buffer = self._there(known)
        if buffer is not None and self.holder(client) in buffer.loose:
            known.loosen(client)

    def _there(self, known: Known) -> Any:
        return next((buffer for buffer in self.life.custody.registry if buffer.id == known.id), None)

    def _tell(self, client: Client, buffers: Sequence[Known], answer: Any) -> None:
        """Have the answer arrive, or be lost on its way."""
        if buffers[0].asked is not None and self.delays.random() < 0.5:
            self.life.service.answered(self.holder(client), buffers_of(answer))
            for known in buffers:
                known.told.add(client)

    def _shares_now(self, known: Known, client: Client) -> int:
        for buffer in self.life.custody.registry:
            if buffer.id == known.id:
                return buffer.shares[self.holder(client)]
        return 0


def plain_spec(spec: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in spec.items()))


def nothing(_: Any) -> None:
    """Nothing has changed."""


def buffers_of(answer: Any) -> list[Any]:
    return [grant.buffer for grant in answer] if isinstance(answer, list) else [answer]


def fds_of(answer: Any) -> list[OwnedFd]:
    return [grant.fd for grant in answer] if isinstance(answer, list) else []


def _close_grants(answer: Any) -> None:
    for grant in answer if isinstance(answer, list) else [answer]:
        if isinstance(grant, Grant):
            grant.fd.close()
