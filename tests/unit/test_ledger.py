# SPDX-License-Identifier: MIT
"""Charges: limits are met exactly, come back exactly once, and one uid never pays for another."""

from __future__ import annotations

import pytest

from udmabufd.core.errors import QuotaExceeded, RateLimited
from udmabufd.core.ledger import Ledger
from udmabufd.core.limits import Limits


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    limits = Limits(
        max_bytes_per_user=8192,
        max_buffers_per_user=2,
        max_calls_per_window=3,
        call_window_usec=1_000_000,
        max_calls_in_flight_per_user=2,
    )
    return Ledger(limits, clock)


def test_bytes_up_to_the_limit_and_not_one_more(ledger: Ledger) -> None:
    charge = ledger.charge_bytes(1, 8191)
    ledger.charge_bytes(1, 1)
    with pytest.raises(QuotaExceeded, match=r"size: 1 more .* of 8192; 8192 are in use"):
        ledger.charge_bytes(1, 1)
    ledger.charge_bytes(2, 8192)
    assert ledger.total_bytes == 16384
    charge.release()
    charge.release()
    assert ledger.account(1).bytes == 1


def test_buffers_are_limited_per_uid(ledger: Ledger) -> None:
    ledger.charge_buffer(1)
    second = ledger.charge_buffer(1)
    with pytest.raises(QuotaExceeded, match="max_buffers_per_user of 2; 2 are held"):
        ledger.charge_buffer(1)
    second.release()
    ledger.charge_buffer(1)


def test_calls_under_way_are_limited(ledger: Ledger) -> None:
    with ledger.charge_call(1), ledger.charge_call(1), pytest.raises(RateLimited, match="2 calls under way"):
        ledger.charge_call(1)
    with ledger.charge_call(1):
        assert ledger.account(1).calls == 1
    assert ledger.account(1).calls == 0


def test_calls_per_window_are_limited_and_come_back_with_the_next(ledger: Ledger, clock: Clock) -> None:
    for _ in range(3):
        ledger.charge_call(1).release()
    clock.now += 0.9
    with pytest.raises(RateLimited, match=r"3 calls, .* ends in 0\.1 s"):
        ledger.charge_call(1)
    ledger.charge_call(2).release()
    clock.now += 0.1
    ledger.charge_call(1).release()


def test_idle_accounts_are_forgotten_and_others_are_not(ledger: Ledger, clock: Clock) -> None:
    kept = ledger.charge_bytes(0, 1)
    for uid in range(1, 5000):
        ledger.charge_call(uid).release()
        clock.now += 0.01
    assert len(ledger._accounts) < 600
    assert ledger.account(0).bytes == kept.bytes
