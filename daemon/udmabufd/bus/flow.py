# SPDX-License-Identifier: MIT
"""Flow: a reply with descriptors waits until its receiver has read the ones before, so that it stalls nobody else.

dbus-daemon stops reading a connection of which it holds 64 undelivered descriptors (max_incoming_unix_fds). A client
that leaves its replies unread gets the service there as soon as its own socket is full, after some 170 to 280 replies,
and from then on nobody is answered, nor are the service's own calls to the bus (1.14.10, 1.16.2). There is no sign
of it but what the bus says: what a client says can be forged, and one that blocks in a call says nothing. allowance
has the bounds and witness asks the bus; here is who waits, first come first served, and when the bus is asked. Nothing
polls unless a call waits. Where the bus does not tell, nothing waits. Of a user at its bound a turn tries one call.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from udmabufd.bus.allowance import WIDE, WIDE_CONNECTIONS, Account, Allowances
from udmabufd.bus.callers import CallerGone
from udmabufd.bus.witness import Silent, Witness
from udmabufd.core.events import Event, emit
from udmabufd_base.connection import Connection
from udmabufd_base.errors import BusError, ConnectionLost

log = logging.getLogger(__name__)

ASK_AT: Final = 8
"""Descriptors after which the bus is asked, so that a wide connection need not wait for the answer."""

PATIENCE: Final = 20.0
"""Seconds that a call may wait: less than the 25 after which most clients give up on the answer."""

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
"""Seconds between two questions about a connection that leaves something unread."""

BLIND_FOR: Final = 60.0
"""Seconds after which a bus that would not tell is asked again: the administrator may have allowed it."""


class _Waiter:
    """A call that waits until `count` descriptors may be sent."""

    __slots__ = ("count", "granted")

    def __init__(self, count: int) -> None:
        self.count = count
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, failure: Exception | None) -> None:
        """Let it go on, or fail."""
        if self.granted.done():
            return
        if failure is None:
            self.granted.set_result(None)
        else:
            self.granted.set_exception(failure)


class _Question:
    """When the bus is asked about one connection."""

    __slots__ = ("next", "open", "pause")

    def __init__(self) -> None:
        self.open = False
        self.next = -math.inf
        self.pause = FIRST_PAUSE


class Flow:
    """Lets descriptors through to connections. For one connection to the bus; not for other threads than the loop's.

    For each reply with descriptors: wait(), make them, send them, and at once sent(). ended() when a client has gone.
    """

    def __init__(
        self, connection: Connection, clock: Callable[[], float] | None = None, patience: float = PATIENCE
    ) -> None:
        """Ask the bus at the other end of `connection`.

        `clock` gives seconds, monotonic, by default those of the loop; `patience` is how long a call may wait.
        """
        self._witness = Witness(connection)
        self._clock = clock or asyncio.get_running_loop().time
        self._patience = patience
        self._accounts = Allowances()
        self._questions: dict[Account, _Question] = {}
        # Calls that wait, by connection, in the order of their turns.
        self._waiting: dict[Account, deque[_Waiter]] = {}
        self._calls: Counter[int] = Counter()
        # Users at their bound: one descriptor for a connection that owes none was too many, so nobody later gets any.
        self._full: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._blind_until = -math.inf

    @property
    def on_their_way(self) -> int:
        """Descriptors that are reserved, or were sent and for all that is known are still in the bus."""
        return self._accounts.total

    def __len__(self) -> int:
        """Return how many connections are remembered."""
        return len(self._accounts)

    async def wait(self, name: str, uid: int, count: int) -> None:
        """Return when `count` (1 to 16) descriptors may be sent to connection `name` of user `uid`: reserved for it.

        Raises RateLimited, and CallerGone when the connection ends first; then nothing is reserved.
        """
        if not 0 < count <= WIDE:
            raise ValueError(f"a message has 1 to {WIDE} descriptors, not {count}")
        if self._clock() < self._blind_until:
            return
        account = self._accounts.open(name, uid)
        if not self._waiting and self._accounts.admit(account, count):
            return
        waiter = _Waiter(count)
        self._calls[uid] += 1
        try:
            self._line_up(account, waiter)
            async with asyncio.timeout(self._patience):
                await waiter.granted
        except BaseException as error:
            granted = waiter.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                # In the very turn in which it was given up.
                self.sent(name, 0, count)
            self._withdraw(account, waiter)
            if isinstance(error, TimeoutError):
                raise self._accounts.out_of_patience(account, count, self._patience) from None
            raise
        finally:
            self._calls[uid] -= 1
            if not self._calls[uid]:
                del self._calls[uid]

    def sent(self, name: str, count: int, reserved: int) -> None:
        """Take notice that `count` of the `reserved` descriptors were sent to connection `name` just now.

        To be called for each wait() that has returned, in the turn of the loop in which they were sent.
        """
        account = self._accounts.get(name)
        if account is None or not account.reserved:
            return  # gone, or let through while the bus did not tell
        account.reserved -= min(reserved, account.reserved)
        account.fresh += count
        if count < reserved:
            self._settle(account)
            self._turn()
        elif self._waiting or account.fresh >= ASK_AT or not self._accounts.can_widen(account):
            # Somebody waits for the answer, or this one will.
            self._ask()

    def ended(self, name: str) -> None:
        """Take notice that connection `name` has gone, and with it what the bus had for it."""
        account = self._accounts.get(name)
        if account is None:
            return
        self._accounts.close(account)
        self._questions.pop(account, None)
        for waiter in self._waiting.pop(account, ()):
            waiter.end(CallerGone())
        self._turn()

    def _line_up(self, account: Account, waiter: _Waiter) -> None:
        """Have a call wait unless it may go at once. Raises RateLimited."""
        own = len(self._waiting.get(account, ())) + 1
        if (refusal := self._accounts.refusal(account, own, self._calls[account.uid])) is not None:
            raise refusal
        self._waiting.setdefault(account, deque()).append(waiter)
        if account.uid in self._full or (waiter.count > 1 and not self._accounts.can_widen(account)):
            self._ask()
        else:
            self._turn()

    def _turn(self) -> None:
        """Let through who may go, and ask for what the others wait for."""
        # Wide connections that are promised to one that came earlier: those of a user, and all.
        promised: set[int] = set()
        all_promised = False
        self._full.clear()
        for account, queue in tuple(self._waiting.items()):
            if account.uid in self._full:
                continue
            went = False
            while (waiter := self._next(account, queue)) is not None:
                may_widen = not all_promised and account.uid not in promised
                if not self._accounts.admit(account, waiter.count, may_widen=may_widen):
                    break
                queue.remove(waiter)
                waiter.end(None)
                went = True
            if went or not queue:
                del self._waiting[account]
            if went and queue:
                self._waiting[account] = queue
            if waiter is None or account.stuck or account.wide:
                continue
            if waiter.count == 1 and not account.owed:
                # The least there is, and neither a narrow nor a wide one was left to its user.
                self._full.add(account.uid)
            if self._accounts.hopeless(account):
                continue
            # Later ones must not keep for themselves what this one waits for.
            if any(other.uid == account.uid for other in self._accounts.wide):
                promised.add(account.uid)
            elif len(self._accounts.wide) >= WIDE_CONNECTIONS:
                all_promised = True
        self._ask_for_waiting()

    def _next(self, account: Account, queue: deque[_Waiter]) -> _Waiter | None:
        """Return the call whose turn it is: the first, unless it needs what only a stuck connection could give."""
        first = next((one for one in queue if not one.granted.done()), None)
        if first is None or first.count == 1 or not self._accounts.hopeless(account):
            return first
        return next((one for one in queue if one.count == 1 and not one.granted.done()), first)

    def _withdraw(self, account: Account, waiter: _Waiter) -> None:
        """Take a call that was given up out of the queue."""
        queue = self._waiting.get(account)
        if queue is not None and waiter in queue:
            self._full.discard(account.uid)
            queue.remove(waiter)
            if not queue:
                del self._waiting[account]
        self._settle(account)

    def _settle(self, account: Account) -> None:
        """Forget what does not have to be known any more."""
        if self._accounts.settle(account) and account not in self._waiting:
            self._accounts.close(account)
            self._questions.pop(account, None)

    def _ask_for_waiting(self) -> None:
        if self._waiting:
            self._ask()

    def _ask(self) -> None:
        """Ask about all that may be in the bus and is not being asked about."""
        now = self._clock()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        debtors = [
            (account, question)
            for account in self._accounts.owing
            if account.unproven and not (question := self._questions.setdefault(account, _Question())).open
        ]
        due = [account for account, question in debtors if question.next <= now]
        if len(due) > 1 and not any(account.stuck for account in self._accounts.owing):
            # One answer for all of them, as long as everybody reads.
            self._question(due, self._witness.undelivered)
        else:
            for account in due:
                self._ask_about(account)
        later = [question.next for _, question in debtors if question.next > now]
        if later and self._waiting:
            self._alarm = asyncio.get_running_loop().call_later(min(later) - now, self._ask_for_waiting)

    def _ask_about(self, account: Account) -> None:
        self._question([account], functools.partial(self._witness.undelivered_to, account.name))

    def _question(self, about: Sequence[Account], ask: Callable[[], Awaitable[int]]) -> None:
        for account in about:
            self._questions[account].open = True
        task = asyncio.create_task(self._put(about, ask))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _put(self, about: Sequence[Account], ask: Callable[[], Awaitable[int]]) -> None:
        for account in about:
            account.asked, account.fresh = account.unproven, 0
        left: int | None = None
        try:
            left = await ask()
        except ConnectionLost:
            self._forget(CallerGone)
            return
        except Silent as silence:
            self._go_blind(silence)
            return
        except BusError as error:
            log.warning("The bus did not tell what clients have left unread: %s", error)
        for account in about:
            if account in self._accounts:
                self._answered(account, left, for_all=len(about) > 1)
        self._turn()

    def _answered(self, account: Account, left: int | None, *, for_all: bool) -> None:
        """Take notice that of what was asked about `left` are still in the bus, or that it did not tell (None)."""
        question = self._questions[account]
        question.open = False
        if left == 0:
            account.asked = 0
            account.stuck = False
            self._questions[account] = _Question()
            self._settle(account)
        elif left is not None and for_all:
            # Somebody's; who, only a question about each can tell.
            self._ask_about(account)
        else:
            before = account.asked
            if left is not None:
                # No more than we sent: the bus counts what others sent to it, too.
                account.asked = min(left, before)
                if not account.stuck:
                    self._found_stuck(account)
            question.pause = FIRST_PAUSE if account.asked < before else min(2 * question.pause, LONGEST_PAUSE)
            question.next = self._clock() + question.pause

    def _found_stuck(self, account: Account) -> None:
        account.stuck = True
        emit(log, Event.CLIENT_SLOW, uid=account.uid, client=account.name, count=account.asked)
        queue = self._waiting.get(account, deque())
        while (refusal := self._accounts.refusal(account, len(queue))) is not None:
            queue.pop().end(refusal)

    def _go_blind(self, silence: Silent) -> None:
        """Let everything through, for the bus does not tell."""
        if silence.advice is None:
            log.debug("The bus bounds by itself what each user leaves unread: %s", silence)
            self._blind_until = math.inf
        else:
            if self._blind_until == -math.inf:
                log.warning(
                    "A client that does not read its replies can stall the service for all, for the bus does not tell "
                    "which one: %s",
                    silence.advice,
                )
            self._blind_until = self._clock() + BLIND_FOR
        self._forget(None)

    def _forget(self, failure: Callable[[], Exception] | None) -> None:
        """Forget everybody; calls that wait fail, or go on."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        waiting, self._waiting = self._waiting, {}
        self._accounts, self._questions = Allowances(), {}
        self._full.clear()
        for queue in waiting.values():
            for waiter in queue:
                waiter.end(failure() if failure is not None else None)
