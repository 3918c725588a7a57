# SPDX-License-Identifier: MIT
"""Charges: limits are met exactly, come back exactly once, and one user never pays for another."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from udmabufd.core.errors import QuotaExceeded, RateLimited
from udmabufd.core.ledger import Ledger, Owner, Resource
from udmabufd.core.limits import Limits

ALICE, BOB = Owner(1000, "org.example.Camera"), Owner(1001, "")
ALICES_OTHER = Owner(1000, "org.example.Player")

LIMITS = Limits(
    max_bytes_per_user=8192,
    max_wrapped_bytes_per_user=16384,
    max_buffers_per_user=2,
    max_shares_per_user=3,
    max_attachments_per_user=5,
    max_fds_in_flight_per_user=16,
    max_calls_per_window=3,
    call_window_usec=1_000_000,
    max_calls_in_flight_per_user=2,
)


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
    return Ledger(LIMITS, clock)


def test_bytes_up_to_the_limit_and_not_one_more(ledger: Ledger) -> None:
    charge = ledger.charge(ALICE, Resource.BYTES, 8191)
    ledger.charge(ALICE, Resource.BYTES, 1)
    with pytest.raises(QuotaExceeded, match=r"size: 1 more .* max_bytes_per_user of 8192; 8192 are in use"):
        ledger.charge(ALICE, Resource.BYTES, 1)
    ledger.charge(BOB, Resource.BYTES, 8192)
    assert ledger.total(Resource.BYTES) == 16384
    charge.release()
    charge.release()
    assert ledger.account(ALICE).amounts[Resource.BYTES] == 1
    assert charge.owner is None


@pytest.mark.parametrize(
    ("resource", "limit", "error", "text"),
    [
        (
            Resource.BYTES,
            8192,
            QuotaExceeded,
            "size: 1 more bytes would exceed .* of 8192; 8192 are in use, 0 of them",
        ),
        (Resource.WRAPPED, 16384, QuotaExceeded, "ranges: 1 more bytes .* of 16384; 16384 are wrapped"),
        (Resource.BUFFERS, 2, QuotaExceeded, "max_buffers_per_user of 2; 2 are held"),
        (Resource.SHARES, 3, QuotaExceeded, "max_shares_per_user of 3; there are 3"),
        (Resource.ATTACHMENTS, 5, QuotaExceeded, "One more attachment .* max_attachments_per_user of 5; there are 5"),
        (Resource.FDS, 16, RateLimited, "1 more descriptors .* of 16; 16 are; read the replies"),
        (Resource.CALLS, 2, RateLimited, "2 calls under way, the limit max_calls_in_flight_per_user"),
    ],
)
def test_every_resource_has_its_limit_for_all_applications_of_a_user(
    ledger: Ledger, resource: Resource, limit: int, error: type[Exception], text: str
) -> None:
    half = ledger.charge(ALICE, resource, limit - limit // 2)
    ledger.charge(ALICES_OTHER, resource, limit // 2)
    for owner in (ALICE, ALICES_OTHER, Owner(ALICE.uid, "")):
        with pytest.raises(error, match=text):
            ledger.charge(owner, resource)
    ledger.charge(BOB, resource, limit)
    half.release()
    ledger.charge(Owner(ALICE.uid, ""), resource)


def test_an_application_can_have_a_limit_of_its_own(clock: Clock) -> None:
    ledger = Ledger(replace(LIMITS, max_bytes_per_application=4096), clock)
    ledger.charge(ALICE, Resource.BYTES, 4096)
    with pytest.raises(QuotaExceeded, match="this application's limit max_bytes_per_application of 4096; 4096 are"):
        ledger.charge(ALICE, Resource.BYTES, 1)
    ledger.charge(ALICES_OTHER, Resource.BYTES, 4096)
    # The user's limit holds for all of them.
    with pytest.raises(QuotaExceeded, match="max_bytes_per_user"):
        ledger.charge(Owner(ALICE.uid, "third"), Resource.BYTES, 1)


def test_a_refusal_leaves_no_trace_in_the_amounts(ledger: Ledger) -> None:
    with pytest.raises(QuotaExceeded):
        ledger.charge(ALICE, Resource.BYTES, 8193)
    assert ledger.usage() == []
    assert ledger.total(Resource.BYTES) == 0


def test_what_lingers_is_told_beside_the_figure(ledger: Ledger) -> None:
    charge = ledger.charge(ALICE, Resource.BYTES, 4096)
    ledger.charge(ALICE, Resource.BYTES, 4096)
    charge.linger(True)
    charge.linger(True)
    (row,) = ledger.usage()
    assert (row.owner, row.bytes, row.lingering) == (ALICE, 8192, 4096)
    with pytest.raises(QuotaExceeded, match="8192 are in use, 4096 of them by descriptors and mappings"):
        ledger.charge(ALICES_OTHER, Resource.BYTES, 1)
    charge.linger(False)
    assert ledger.usage()[0].lingering == 0
    charge.linger(True)
    charge.release()
    charge.linger(True)
    (row,) = ledger.usage()
    assert (row.bytes, row.lingering) == (4096, 0)


def test_wrapped_memory_that_lingers_is_no_part_of_the_bytes_in_use(ledger: Ledger) -> None:
    ledger.charge(ALICE, Resource.WRAPPED, 16384).linger(True)
    ledger.charge(ALICE, Resource.BYTES, 8192)
    with pytest.raises(QuotaExceeded, match="8192 are in use, 0 of them"):
        ledger.charge(ALICE, Resource.BYTES, 1)
    assert ledger.usage()[0].lingering == 16384


def test_what_is_there_is_charged_whatever_the_limits_say(ledger: Ledger) -> None:
    charge = ledger.impose(ALICE, Resource.BYTES, 1 << 20)
    with pytest.raises(QuotaExceeded, match=f"{1 << 20} are in use"):
        ledger.charge(ALICE, Resource.BYTES, 1)
    ledger.charge(BOB, Resource.BYTES, 8192)
    moved = ledger.move(charge, BOB)
    assert (charge.owner, moved.owner, moved.amount) == (None, BOB, 1 << 20)
    charge.release()
    assert ledger.total(Resource.BYTES) == (1 << 20) + 8192
    assert not ledger.account(ALICE).amounts[Resource.BYTES]


def test_calls_under_way_are_limited(ledger: Ledger) -> None:
    with ledger.charge_call(ALICE), ledger.charge_call(ALICE), pytest.raises(RateLimited, match="2 calls under way"):
        ledger.charge_call(ALICE)
    with ledger.charge_call(ALICE):
        assert ledger.account(ALICE).amounts[Resource.CALLS] == 1
    assert ledger.account(ALICE).amounts[Resource.CALLS] == 0


def test_calls_per_window_are_limited_and_come_back_with_the_next(ledger: Ledger, clock: Clock) -> None:
    for owner in (ALICE, ALICES_OTHER, ALICE):
        ledger.charge_call(owner).release()
    clock.now += 0.9
    with pytest.raises(RateLimited, match=r"3 calls, .* ends in 0\.1 s"):
        ledger.charge_call(ALICE)
    ledger.charge_call(BOB).release()
    clock.now += 0.1
    ledger.charge_call(ALICE).release()


def test_a_call_that_is_refused_for_those_under_way_is_none_of_the_window(ledger: Ledger, clock: Clock) -> None:
    with ledger.charge_call(ALICE), ledger.charge_call(ALICE):
        for _ in range(5):
            with pytest.raises(RateLimited, match="under way"):
                ledger.charge_call(ALICE)
    ledger.charge_call(ALICE).release()


def test_usage_is_sorted_by_bytes_and_tells_of_refusals(ledger: Ledger) -> None:
    ledger.charge(BOB, Resource.WRAPPED, 4096)
    ledger.charge(BOB, Resource.BYTES, 1)
    ledger.charge(ALICE, Resource.BYTES, 4096)
    ledger.charge(ALICE, Resource.BUFFERS)
    ledger.refused(ALICES_OTHER)
    ledger.refused(ALICES_OTHER)
    ledger.charge_call(Owner(7, "")).release()
    assert [(row.owner, row.buffers, row.bytes, row.refusals) for row in ledger.usage()] == [
        (BOB, 0, 4097, 0),
        (ALICE, 1, 4096, 0),
        (ALICES_OTHER, 0, 0, 2),
    ]


def test_idle_accounts_are_forgotten_and_others_are_not(ledger: Ledger, clock: Clock) -> None:
    kept = ledger.charge(Owner(0, ""), Resource.BYTES, 1)
    for uid in range(1, 5000):
        ledger.charge_call(Owner(uid, f"application {uid}")).release()
        clock.now += 0.01
    assert len(ledger._accounts) < 600
    assert len(ledger._users) < 600
    assert ledger.account(Owner(0, "")).amounts[Resource.BYTES] == kept.amount


def test_a_user_does_not_escape_its_window_by_many_applications(ledger: Ledger) -> None:
    """Accounts are forgotten when there are many, and a uid's programs can have any names."""
    made = 0
    with pytest.raises(RateLimited):
        for number in range(2000):
            ledger.charge_call(Owner(1000, str(number))).release()
            made += 1
            for other in range(number * 500, number * 500 + 500):
                ledger.account(Owner(1000, f"filler {other}"))
    assert made == 3


def test_every_limit_of_a_user_is_named_in_its_refusal(ledger: Ledger) -> None:
    for resource in Resource:
        with pytest.raises((QuotaExceeded, RateLimited)) as caught:
            ledger.charge(ALICE, resource, 1 << 40)
        (name,) = re.findall(r"max_\w+_per_user", str(caught.value))
        assert str(getattr(LIMITS, name)) in str(caught.value) or resource is Resource.CALLS
