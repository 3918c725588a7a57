# SPDX-License-Identifier: MIT
"""Who holds how much: charges per user and per application of a user, for bytes, buffers, shares, fds and calls.

A charge is a token: taking it may be refused, giving it back cannot fail and happens once. The ledger does not know
what a buffer is; the registry keeps the tokens beside what they pay for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, NamedTuple, Self

from udmabufd.core.errors import AllocatorError, QuotaExceeded, RateLimited
from udmabufd.core.limits import Limits

ROOT: Final = 0
"""The user who may do everything."""

_IDLE_ACCOUNTS = 256
"""Accounts without charges that are remembered for their refusals; beyond that the idle ones are forgotten."""


class Resource(StrEnum):
    """What can be charged for."""

    BYTES = "bytes"
    WRAPPED = "wrapped bytes"
    EVICTED = "evicted bytes"
    BUFFERS = "buffers"
    SHARES = "shares"
    ATTACHMENTS = "attachments"
    FDS = "descriptors on their way"
    CALLS = "calls under way"


_LASTING = (Resource.BYTES, Resource.WRAPPED, Resource.EVICTED, Resource.BUFFERS)
"""What is held beyond a call."""


class Owner(NamedTuple):
    """Whom something is charged to: a user, and which of its applications; "" where that is not known."""

    uid: int
    application: str


class _Rule(NamedTuple):
    limit: str
    error: type[AllocatorError]
    text: str


_USER_RULES: dict[Resource, _Rule] = {
    Resource.BYTES: _Rule(
        "max_bytes_per_user",
        QuotaExceeded,
        "size: {more} more bytes would exceed this user's limit {name} of {limit}; {present} are in use, {lingering} "
        "of them by descriptors and mappings of buffers that were released",
    ),
    Resource.WRAPPED: _Rule(
        "max_wrapped_bytes_per_user",
        QuotaExceeded,
        "ranges: {more} more bytes would exceed this user's limit {name} of {limit}; {present} are wrapped",
    ),
    Resource.EVICTED: _Rule(
        "max_evicted_bytes_per_user",
        QuotaExceeded,
        "size: {more} more bytes would exceed this user's limit {name} of {limit}; {present} are evicted",
    ),
    Resource.BUFFERS: _Rule(
        "max_buffers_per_user",
        QuotaExceeded,
        "One more buffer would exceed this user's limit {name} of {limit}; {present} are held",
    ),
    Resource.SHARES: _Rule(
        "max_shares_per_user",
        QuotaExceeded,
        "One more connection with a share would exceed this user's limit {name} of {limit}; there are {present}",
    ),
    Resource.ATTACHMENTS: _Rule(
        "max_attachments_per_user",
        QuotaExceeded,
        "One more attachment would exceed this user's limit {name} of {limit}; there are {present}",
    ),
    Resource.FDS: _Rule(
        "max_fds_in_flight_per_user",
        RateLimited,
        "{more} more descriptors on their way would exceed this user's limit {name} of {limit}; {present} are; read "
        "the replies that wait",
    ),
    Resource.CALLS: _Rule(
        "max_calls_in_flight_per_user",
        RateLimited,
        "This user has {present} calls under way, the limit {name}",
    ),
}

_APPLICATION_RULES: dict[Resource, _Rule] = {
    Resource.BYTES: _Rule(
        "max_bytes_per_application",
        QuotaExceeded,
        "size: {more} more bytes would exceed this application's limit {name} of {limit}; {present} are in use, "
        "{lingering} of them by descriptors and mappings of buffers that were released",
    ),
}


class _User:
    """What all applications of a user hold together, and its window of calls."""

    __slots__ = ("amounts", "calls_in_window", "lingering", "window_end")

    def __init__(self) -> None:
        self.amounts: Counter[Resource] = Counter()
        self.lingering: Counter[Resource] = Counter()
        self.calls_in_window = 0
        self.window_end = 0.0

    def idle(self, now: float) -> bool:
        return not any(self.amounts.values()) and now >= self.window_end


class Account:
    """What one application of a user holds at present, and how much of it is of buffers that nobody holds.

    `refusals` counts the calls that were refused for a limit or for want of memory.
    """

    __slots__ = ("amounts", "lingering", "owner", "refusals", "user")

    def __init__(self, owner: Owner, user: _User) -> None:
        self.owner = owner
        self.user = user
        self.amounts: Counter[Resource] = Counter()
        self.lingering: Counter[Resource] = Counter()
        self.refusals = 0

    @property
    def idle(self) -> bool:
        """Whether it holds nothing."""
        return not any(self.amounts.values())


class Charge:
    """A token for what one account holds; released once, by release() or at the end of a `with`."""

    __slots__ = ("_account", "_lingers", "amount", "resource")

    def __init__(self, account: Account, resource: Resource, amount: int) -> None:
        self._account: Account | None = account
        self._lingers = False
        self.resource = resource
        self.amount = amount
        self._add(account, amount)

    @property
    def owner(self) -> Owner | None:
        """Who is charged; None once it was released."""
        return None if self._account is None else self._account.owner

    def linger(self, lingers: bool) -> None:
        """Say whether what it pays for has no holder any more."""
        if self._account is not None and lingers != self._lingers:
            self._lingers = lingers
            self._add_lingering(self._account, self.amount if lingers else -self.amount)

    def release(self) -> None:
        """Give the charge back; further calls do nothing."""
        self.linger(False)
        account, self._account = self._account, None
        if account is not None:
            self._add(account, -self.amount)

    def _add(self, account: Account, amount: int) -> None:
        for holder in (account, account.user):
            holder.amounts[self.resource] += amount

    def _add_lingering(self, account: Account, amount: int) -> None:
        for holder in (account, account.user):
            holder.lingering[self.resource] += amount

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Usage:
    """What one application of a user holds: bytes, of which `lingering` are of buffers that nobody holds."""

    owner: Owner
    buffers: int
    bytes: int
    lingering: int
    refusals: int


class Ledger:
    """All accounts, and the limits that they are held to."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """`clock` gives seconds, monotonic."""
        self.limits = limits
        self._clock = clock
        self._users: dict[int, _User] = {}
        self._accounts: dict[Owner, Account] = {}

    def account(self, owner: Owner) -> Account:
        """Return the account of `owner`, made on first use."""
        account = self._accounts.get(owner)
        if account is None:
            self._forget_idle()
            user = self._users.setdefault(owner.uid, _User())
            account = self._accounts[owner] = Account(owner, user)
        return account

    def usage(self) -> list[Usage]:
        """Return who holds something or was refused something, the largest first."""
        rows = [
            Usage(
                account.owner,
                account.amounts[Resource.BUFFERS],
                account.amounts[Resource.BYTES] + account.amounts[Resource.WRAPPED],
                account.lingering.total(),
                account.refusals,
            )
            for account in self._accounts.values()
            if account.refusals or any(account.amounts[resource] for resource in _LASTING)
        ]
        return sorted(rows, key=lambda row: (-row.bytes, -row.buffers, row.owner))

    def total(self, resource: Resource) -> int:
        """What is charged to all users."""
        return sum(user.amounts[resource] for user in self._users.values())

    def charge(self, owner: Owner, resource: Resource, amount: int = 1) -> Charge:
        """Charge `amount` to `owner`. Raises QuotaExceeded, RateLimited with limit and present figure."""
        account = self.account(owner)
        for holder, rules in ((account.user, _USER_RULES), (account, _APPLICATION_RULES)):
            rule = rules.get(resource)
            if rule is None:
                continue
            limit, present = getattr(self.limits, rule.limit), holder.amounts[resource]
            # 0 for an application: whatever its user may.
            if (limit or rules is _USER_RULES) and present + amount > limit:
                raise rule.error(
                    rule.text.format(
                        more=amount,
                        name=rule.limit,
                        limit=limit,
                        present=present,
                        lingering=holder.lingering[resource],
                    )
                )
        return Charge(account, resource, amount)

    def impose(self, owner: Owner, resource: Resource, amount: int = 1) -> Charge:
        """Charge `amount` to `owner` whatever the limits say: it is there already."""
        return Charge(self.account(owner), resource, amount)

    def move(self, charge: Charge, owner: Owner) -> Charge:
        """Return a charge to `owner` in the place of `charge`, which ends. Never refused: the memory is there."""
        charge.release()
        return self.impose(owner, charge.resource, charge.amount)

    def charge_call(self, owner: Owner) -> Charge:
        """Charge one call under way to `owner`, and one to its user's window. Raises RateLimited."""
        account, limits, now = self.account(owner), self.limits, self._clock()
        user = account.user
        if now >= user.window_end:
            user.window_end = now + limits.call_window_usec / 1e6
            user.calls_in_window = 0
        if user.calls_in_window >= limits.max_calls_per_window:
            raise RateLimited(
                f"This user made {user.calls_in_window} calls, the limit max_calls_per_window; "
                f"the window ends in {user.window_end - now:.1f} s"
            )
        charge = self.charge(owner, Resource.CALLS)
        user.calls_in_window += 1
        return charge

    def add_to_window(self, owner: Owner, calls: int) -> None:
        """Count a call that has begun as so many more: it turned out to be long. Later ones may be refused for it."""
        self.account(owner).user.calls_in_window += calls

    def refused(self, owner: Owner) -> None:
        """Note that a call of `owner` was refused for a limit or for want of memory."""
        self.account(owner).refusals += 1

    def _forget_idle(self) -> None:
        if len(self._accounts) < _IDLE_ACCOUNTS:
            return
        now = self._clock()
        self._accounts = {owner: account for owner, account in self._accounts.items() if not account.idle}
        live = {owner.uid for owner in self._accounts}
        self._users = {uid: user for uid, user in self._users.items() if uid in live or not user.idle(now)}
