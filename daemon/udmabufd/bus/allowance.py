# SPDX-License-Identifier: MIT
"""Allowances: how many descriptors each connection may have on their way, so that all together stay below a bound.

A descriptor is on its way from when it is reserved until the bus has told that it does not hold it any more. No more
than 47 ever are:

- Two connections, of different users, may have 16 each: they are *wide*. A message with more than one descriptor
  needs that, and so does a client that is to be fast with many calls under way.
- Every other connection may have one, and all of these together 15, of which a user gets half of what others leave.
- A *stuck* connection, one that left something unread, gets nothing until the bus says that all is read.

What stuck connections have is lost to the rest, but there is a next one's share for long: it takes nine of one user
to stop that user's others, and seventeen of four users to stop everybody. Beside two stuck wide ones nobody gets
several descriptors in one message. What may wait is bounded here, too; who waits for what, and how the bus is asked,
is left to flow.

Connections that owe nothing, of which any number may wait, are never gone through: what owes is at most 17.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from udmabufd.core.errors import RateLimited
from udmabufd_base.connection import MAX_FDS

WIDE: Final = MAX_FDS
"""Descriptors that a wide connection may have on their way: one message as full as the bus allows."""

WIDE_CONNECTIONS: Final = 2
NARROW: Final = 15
"""Connections, other than the wide ones, that may have a descriptor on its way."""

STUCK_CALLS: Final = 16
"""Calls of a stuck connection that may wait; they count among its user's calls under way."""

USER_CALLS: Final = 256
"""Calls of a user with a stuck connection that may wait: those of eight stuck ones, the most beside which its others
go on, and as many again, which is what the bus lets one connection have without an answer (128)."""


class Account:
    """What is on its way to one connection."""

    __slots__ = ("asked", "fresh", "name", "reserved", "stuck", "uid", "wide")

    def __init__(self, name: str, uid: int) -> None:
        self.name = name
        self.uid = uid
        self.reserved = 0
        """Descriptors that may be sent, and were not yet."""
        self.fresh = 0
        """Sent since the bus was last asked."""
        self.asked = 0
        """Sent before that, and for all that is known still in the bus."""
        self.stuck = False
        self.wide = False

    @property
    def unproven(self) -> int:
        """Descriptors that may be in the bus."""
        return self.asked + self.fresh

    @property
    def owed(self) -> int:
        """Descriptors on their way."""
        return self.asked + self.fresh + self.reserved


class Allowances:
    """The accounts of all connections that have descriptors on their way, or want to."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self.wide: list[Account] = []
        """The wide connections."""
        # Others with a descriptor on its way.
        self._narrow: list[Account] = []

    def __len__(self) -> int:
        return len(self._accounts)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def __contains__(self, account: Account) -> bool:
        return self._accounts.get(account.name) is account

    @property
    def total(self) -> int:
        """Descriptors on their way: at most WIDE * WIDE_CONNECTIONS + NARROW."""
        return sum(account.owed for account in self.owing)

    @property
    def owing(self) -> list[Account]:
        """The connections with descriptors on their way, all stuck ones among them."""
        return self.wide + self._narrow

    def get(self, name: str) -> Account | None:
        """Return the account of connection `name`, if there is one."""
        return self._accounts.get(name)

    def open(self, name: str, uid: int) -> Account:
        """Return the account of connection `name` of user `uid`, made if there is none."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name, uid)
        return account

    def close(self, account: Account) -> None:
        """Forget `account`, for its connection is gone or nothing is on its way to it."""
        if account in self:
            del self._accounts[account.name]
        self._release(account)

    def admit(self, account: Account, count: int, *, may_widen: bool = True) -> bool:
        """Reserve `count` descriptors if the bounds allow it, and without `may_widen` only as a narrow connection."""
        if account.stuck:
            return False
        if account.wide or not self._fits_narrow(account, count):
            if not may_widen or account.owed + count > WIDE or not self.can_widen(account):
                return False
            if not account.wide:
                self._release(account)
                account.wide = True
                self.wide.append(account)
        else:
            self._narrow.append(account)
        account.reserved += count
        return True

    def settle(self, account: Account) -> bool:
        """Return whether nothing is on its way to `account`; then it is neither wide nor stuck any more.

        To be called whenever `account` may have come to owe nothing.
        """
        if account.owed:
            return False
        self._release(account)
        account.wide = account.stuck = False
        return True

    def refusal(self, account: Account, own: int, of_user: int = 0) -> RateLimited | None:
        """Return what to tell a caller if `own` calls of `account`, or `of_user` of its user, are more than may wait.

        Those of the user that came before one of its connections was stuck are not refused any more.
        """
        if account.stuck and own > STUCK_CALLS:
            return RateLimited(
                f"This connection left {account.unproven} file descriptors unread, and {STUCK_CALLS} calls wait for "
                "it to read them, as many as may"
            )
        if of_user > USER_CALLS and any(other.stuck and other.uid == account.uid for other in self.owing):
            return RateLimited(
                f"Connections of this user left file descriptors unread, and {USER_CALLS} calls of the user wait, as "
                "many as may; read the replies on all connections"
            )
        return None

    def out_of_patience(self, account: Account, count: int, seconds: float) -> RateLimited:
        """Return what to tell a caller who waited for `seconds` for `count` descriptors."""
        if account.stuck:
            return RateLimited(
                f"This connection left {account.unproven} file descriptors unread for {seconds:g} s; read the replies"
            )
        return RateLimited(
            f"The bus did not take {count} more file descriptors within {seconds:g} s, for other connections leave "
            "theirs unread; ask for one buffer at a time, or try again later"
        )

    def can_widen(self, account: Account) -> bool:
        """Whether `account` is wide, or could be at once."""
        return account.wide or (
            len(self.wide) < WIDE_CONNECTIONS and all(other.uid != account.uid for other in self.wide)
        )

    def hopeless(self, account: Account) -> bool:
        """Whether `account` cannot become wide unless a stuck connection reads."""
        stuck = [other for other in self.wide if other.stuck and other is not account]
        return len(stuck) >= WIDE_CONNECTIONS or any(other.uid == account.uid for other in stuck)

    def _fits_narrow(self, account: Account, count: int) -> bool:
        if count > 1 or account.owed:
            return False
        own = sum(other.uid == account.uid for other in self._narrow)
        others = len(self._narrow) - own
        # Half of what the others leave, the last one included.
        return own < (NARROW - others + 1) // 2

    def _release(self, account: Account) -> None:
        """Take `account` off the lists of those that owe."""
        for owing in (self.wide, self._narrow):
            if account in owing:
                owing.remove(account)
