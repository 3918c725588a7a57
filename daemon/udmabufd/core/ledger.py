# SPDX-License-Identifier: MIT
"""Who holds how much: charges per uid for bytes, buffers, calls under way and calls per window.

A charge is a token: taking it may be refused, giving it back cannot fail and happens once. The ledger does not know
what a buffer is; the registry keeps the tokens beside what they pay for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from udmabufd.core.errors import QuotaExceeded, RateLimited
from udmabufd.core.limits import Limits

_IDLE_ACCOUNTS = 256
"""Accounts without charges that are remembered for their call window; beyond that the idle ones are forgotten."""


class Charge:
    """A token for what one account holds; released once, by release() or at the end of a `with`."""

    __slots__ = ("_account", "buffers", "bytes", "calls")

    def __init__(self, account: Account, *, byte_count: int = 0, buffers: int = 0, calls: int = 0) -> None:
        self._account: Account | None = account
        self.bytes = byte_count
        self.buffers = buffers
        self.calls = calls
        account.bytes += byte_count
        account.buffers += buffers
        account.calls += calls

    def release(self) -> None:
        """Give the charge back; further calls do nothing."""
        account, self._account = self._account, None
        if account is None:
            return
        account.bytes -= self.bytes
        account.buffers -= self.buffers
        account.calls -= self.calls

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Account:
    """What one uid holds at present."""

    __slots__ = ("buffers", "bytes", "calls", "calls_in_window", "uid", "window_end")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.bytes = 0
        self.buffers = 0
        self.calls = 0
        self.calls_in_window = 0
        self.window_end = 0.0

    def idle(self, now: float) -> bool:
        """Whether forgetting this account would lose nothing."""
        return not (self.bytes or self.buffers or self.calls) and now >= self.window_end


class Ledger:
    """All accounts, and the limits that they are held to."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        """`clock` gives seconds, monotonic."""
        self._limits = limits
        self._clock = clock
        self._accounts: dict[int, Account] = {}

    def account(self, uid: int) -> Account:
        """Return the account of `uid`, made on first use."""
        account = self._accounts.get(uid)
        if account is None:
            self._forget_idle()
            account = self._accounts[uid] = Account(uid)
        return account

    @property
    def total_bytes(self) -> int:
        """Bytes charged to all accounts."""
        return sum(account.bytes for account in self._accounts.values())

    def charge_bytes(self, uid: int, count: int) -> Charge:
        """Charge `count` bytes to `uid`. Raises QuotaExceeded."""
        account, limit = self.account(uid), self._limits.max_bytes_per_user
        if account.bytes + count > limit:
            raise QuotaExceeded(
                f"size: {count} more bytes would exceed this user's limit max_bytes_per_user of {limit}; "
                f"{account.bytes} are in use"
            )
        return Charge(account, byte_count=count)

    def move(self, charge: Charge, uid: int) -> Charge:
        """Return a charge to `uid` in the place of `charge`, which ends. Never refused: the memory is there."""
        charge.release()
        return Charge(self.account(uid), byte_count=charge.bytes)

    def charge_buffer(self, uid: int) -> Charge:
        """Charge one buffer to `uid`. Raises QuotaExceeded."""
        account, limit = self.account(uid), self._limits.max_buffers_per_user
        if account.buffers >= limit:
            raise QuotaExceeded(
                f"One more buffer would exceed this user's limit max_buffers_per_user of {limit}; "
                f"{account.buffers} are held"
            )
        return Charge(account, buffers=1)

    def charge_call(self, uid: int) -> Charge:
        """Charge one call under way to `uid`, and one to its window. Raises RateLimited."""
        account, limits, now = self.account(uid), self._limits, self._clock()
        if now >= account.window_end:
            account.window_end = now + limits.call_window_usec / 1e6
            account.calls_in_window = 0
        if account.calls_in_window >= limits.max_calls_per_window:
            raise RateLimited(
                f"This user made {account.calls_in_window} calls, the limit max_calls_per_window; "
                f"the window ends in {account.window_end - now:.1f} s"
            )
        if account.calls >= limits.max_calls_in_flight_per_user:
            raise RateLimited(f"This user has {account.calls} calls under way, the limit max_calls_in_flight_per_user")
        account.calls_in_window += 1
        return Charge(account, calls=1)

    def _forget_idle(self) -> None:
        if len(self._accounts) < _IDLE_ACCOUNTS:
            return
        now = self._clock()
        self._accounts = {uid: account for uid, account in self._accounts.items() if not account.idle(now)}
