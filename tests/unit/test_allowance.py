# SPDX-License-Identifier: MIT
"""The bounds of what may be on its way: never more than 47, whoever leaves what unread, and always something left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.bus.allowance import NARROW, WIDE, WIDE_CONNECTIONS, Account, Allowances

BOUND = WIDE * WIDE_CONNECTIONS + NARROW


def take(allowances: Allowances, name: str, uid: int, count: int = 1) -> bool:
    """Have `count` descriptors sent to connection `name`, if it may."""
    account = allowances.open(name, uid)
    if not allowances.admit(account, count):
        return False
    account.reserved -= count
    account.fresh += count
    return True


def stick(allowances: Allowances, name: str, uid: int, count: int) -> int:
    """Have connection `name` ask for up to 400 messages of `count`, read nothing, and be found out. Return the sum."""
    messages = 0
    while messages < 400 and take(allowances, name, uid, count):
        messages += 1
    account = allowances.open(name, uid)
    if account.unproven:
        account.stuck = True
    return account.unproven


def answer(allowances: Allowances, account: Account) -> None:
    """Have `account` read everything."""
    account.asked = account.fresh = 0
    account.stuck = False
    allowances.settle(account)


def test_the_bound_is_below_what_stops_the_bus() -> None:
    assert BOUND == 47


def test_one_connection_gets_a_full_message_and_no_more_before_the_answer() -> None:
    allowances = Allowances()
    assert take(allowances, ":1.1", 1, 16)
    assert not take(allowances, ":1.1", 1)
    account = allowances.open(":1.1", 1)
    answer(allowances, account)
    assert take(allowances, ":1.1", 1, 16)


def test_what_is_reserved_counts() -> None:
    allowances = Allowances()
    account = allowances.open(":1.1", 1)
    assert allowances.admit(account, 15)
    assert allowances.admit(account, 1)
    assert not allowances.admit(account, 1)


def test_a_stuck_connection_gets_nothing() -> None:
    allowances = Allowances()
    assert take(allowances, ":1.1", 1)
    allowances.open(":1.1", 1).stuck = True
    assert not take(allowances, ":1.1", 1)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("uids", [[1] * 8, [1, 2] * 4, [1] * 7 + [2], [1, 2, 3, 4] * 2])
def test_beside_eight_stuck_connections_everybody_goes_on(count: int, uids: list[int]) -> None:
    allowances = Allowances()
    for number, uid in enumerate(uids):
        stick(allowances, f":1.{number}", uid, count if number < 2 else 1)
    for uid in {*uids, 5, 0}:
        assert take(allowances, f":2.{uid}", uid), f"uid {uid} gets nothing"
        answer(allowances, allowances.open(f":2.{uid}", uid))
    assert allowances.total <= BOUND


def test_beside_one_stuck_user_others_get_full_messages() -> None:
    allowances = Allowances()
    for number in range(20):
        stick(allowances, f":1.{number}", 1, 16 if number % 2 else 1)
    assert allowances.total == WIDE + (NARROW + 1) // 2
    for uid in (2, 3):
        assert take(allowances, f":2.{uid}", uid, 16)
        answer(allowances, allowances.open(f":2.{uid}", uid))


def test_it_takes_four_users_to_stop_everybody() -> None:
    allowances = Allowances()
    for uid in (1, 2, 3, 4):
        assert take(allowances, f":9.{uid}", uid)
        answer(allowances, allowances.open(f":9.{uid}", uid))
        for number in range(20):
            stick(allowances, f":{uid}.{number}", uid, 16 if number == 0 else 1)
    assert allowances.total == BOUND
    assert not take(allowances, ":9.5", 5)


def test_what_can_only_come_from_a_stuck_connection_is_known() -> None:
    allowances = Allowances()
    stick(allowances, ":1.1", 1, 16)
    assert allowances.hopeless(allowances.open(":1.2", 1))
    assert not allowances.hopeless(allowances.open(":1.3", 2))
    stick(allowances, ":1.3", 2, 16)
    assert allowances.hopeless(allowances.open(":1.4", 3))


STEPS = st.lists(
    st.tuples(
        st.integers(0, 30),  # connection; its user is its number modulo 5
        st.sampled_from(["one", "many", "full", "sent", "none", "ask", "read", "stuck", "gone"]),
    ),
    max_size=300,
)


@given(STEPS)
def test_no_order_of_events_exceeds_the_bound(steps: list[tuple[int, str]]) -> None:
    allowances = Allowances()
    for number, step in steps:
        account = allowances.open(f":1.{number}", number % 5)
        if step in ("one", "many", "full"):
            allowances.admit(account, {"one": 1, "many": 5, "full": 16}[step])
        elif step == "sent":
            account.fresh, account.reserved = account.fresh + account.reserved, 0
        elif step == "none":
            account.reserved = 0
        elif step == "ask":
            account.asked, account.fresh = account.unproven, 0
        elif step == "read":
            account.asked, account.stuck = 0, False
        elif step == "stuck":
            account.stuck = account.asked > 0
        elif step == "gone":
            allowances.close(account)
        if allowances.settle(account):
            allowances.close(account)
        assert allowances.total <= BOUND
        assert len(allowances.wide) <= WIDE_CONNECTIONS
        assert all(one.owed for one in allowances)
        assert sorted(one.name for one in allowances.owing) == sorted(one.name for one in allowances)
        assert all(one.wide == (one in allowances.wide) for one in allowances)
