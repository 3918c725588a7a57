# SPDX-License-Identifier: MIT
"""The table of events, what is logged by it, and that no user can flood the journal with it."""

from __future__ import annotations

import ast
import logging
import re
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.tools import TOP
from udmabufd.core import errors, events
from udmabufd.core.errors import AllocatorError
from udmabufd.core.events import FIELDS, NOTICE, REFUSALS, Event, RepeatGuard, emit, fields_of, refused
from udmabufd.system import journal, logcontrol
from udmabufd_client.contract import ErrorName

log = logging.getLogger("udmabufd.test_events")

ANYTHING = {name: f"<{name}>" for name in FIELDS}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(clock: Clock) -> RepeatGuard:
    return RepeatGuard(clock)


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_ids_are_random_numbers_and_each_is_used_once() -> None:
    ids = [event.message_id for event in Event]
    assert len(set(ids)) == len(list(Event))
    for message_id in ids:
        # As uuid4() makes them: version 4, variant 1.
        assert re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", message_id)


def test_no_event_is_another_by_the_same_words() -> None:
    # An Enum makes two members with equal values one.
    assert len(Event.__members__) == len(list(Event))
    assert len({event.subject for event in Event}) == len(list(Event))


@pytest.mark.parametrize("event", Event)
def test_texts(event: Event) -> None:
    assert event.level in (logging.INFO, NOTICE, logging.WARNING, logging.ERROR)
    assert len(event.subject) <= 79
    assert event.subject[-1].isalpha()
    assert fields_of(event) <= FIELDS.keys()
    for paragraph in event.explanation.split("\n\n"):
        assert paragraph.endswith(".")
        assert "  " not in paragraph
    # journalctl shows the name where an entry lacks the field: only what is always there may be named.
    named = set(re.findall(r"@(\w+)@", event.subject + event.explanation))
    assert named <= {journal.FIELDS[field] for field in fields_of(event)}


def test_what_a_user_can_cause_at_will_is_held_back() -> None:
    for event in Event:
        if event.each:
            assert "client" not in fields_of(event)
            assert "member" not in fields_of(event)
    for event in REFUSALS.values():
        assert not event.each


def test_the_journal_has_a_field_for_each() -> None:
    beside = {"message_id": "MESSAGE_ID", "suppressed": "UDMABUFD_SUPPRESSED"}
    assert {name: f"UDMABUFD_{name.upper()}" for name in FIELDS} | beside == journal.FIELDS
    assert logcontrol.NOTICE == NOTICE


def test_no_field_is_one_of_loggings_own() -> None:
    record = logging.LogRecord("", 0, "", 0, "", (), None)
    assert not (vars(record).keys() | {"message", "asctime"}) & journal.FIELDS.keys()


def test_refusals_are_those_for_a_limit_or_want_of_memory() -> None:
    between_client_and_service = {
        ErrorName.INVALID_SPEC,
        ErrorName.INCOMPATIBLE_CONSTRAINTS,
        ErrorName.NO_SUCH_DEVICE,
        ErrorName.NO_SUCH_BUFFER,
        ErrorName.BUSY,
        ErrorName.MOVE_TIMED_OUT,
    }
    assert REFUSALS.keys() == set(ErrorName) - between_client_and_service


def calls() -> list[tuple[Path, ast.Call, str]]:
    """Return each call of emit() in the daemon with the name of its event."""
    found = []
    for path in sorted((TOP / "daemon/udmabufd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            event = node.args[1]
            if isinstance(event, ast.Attribute) and isinstance(event.value, ast.Name) and event.value.id == "Event":
                found.append((path, node, event.attr))
    return found


def test_each_call_gives_what_the_message_says() -> None:
    for path, call, name in calls():
        given_fields = {keyword.arg for keyword in call.keywords}
        where = f"{path.relative_to(TOP)}:{call.lineno}: Event.{name}"
        assert name in Event.__members__, where
        # With **fields only the run shows it.
        if None not in given_fields:
            assert fields_of(Event[name]) <= given_fields, f"{where} lacks {fields_of(Event[name]) - given_fields}"
        assert given_fields <= {*FIELDS, "guard", None}, where


def test_each_event_is_told_of_somewhere() -> None:
    told = set(REFUSALS.values())
    for path in (TOP / "daemon/udmabufd").rglob("*.py"):
        if path.name not in {"events.py", "event_table.py"}:
            told |= {Event[name] for name in re.findall(r"\bEvent\.([A-Z_]+)\b", path.read_text())}
    assert {event.name for event in Event} - {event.name for event in told} == set()


# ---- logging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", Event)
def test_an_entry(event: Event, guard: RepeatGuard, caplog: pytest.LogCaptureFixture) -> None:
    assert emit(log, event, guard=guard, **ANYTHING)
    (record,) = caplog.records
    assert record.levelno == event.level
    assert vars(record)["message_id"] == event.message_id
    assert record.funcName == "test_an_entry"
    assert "?" not in record.getMessage()
    assert "{" not in record.getMessage()
    for name in fields_of(event):
        assert f"<{name}>" in record.getMessage()
    assert {name: getattr(record, name) for name in FIELDS} == ANYTHING


def test_who_it_was(guard: RepeatGuard, caplog: pytest.LogCaptureFixture) -> None:
    for fields in ({"uid": 0, "application": "org.x.Y"}, {"uid": 7, "application": ""}, {}):
        emit(log, Event.BUFFER_REVIVED, guard=guard, buffer="00ff", **fields)
    assert [record.getMessage() for record in caplog.records] == [
        "Buffer 00ff came back to life: user 0 (org.x.Y) imported it",
        "Buffer 00ff came back to life: user 7 imported it",
        "Buffer 00ff came back to life: an unknown user imported it",
    ]
    assert vars(caplog.records[0])["uid"] == 0
    assert not hasattr(caplog.records[1], "application")


@given(st.dictionaries(st.sampled_from([*FIELDS, "name", "msg", "args"]), st.text()))
def test_nothing_in_the_fields_raises(fields: dict[str, str]) -> None:
    for event in (Event.QUOTA_EXCEEDED, Event.STATE_RESTORED):
        assert emit(log, event, guard=RepeatGuard(), **fields)


def test_what_is_in_braces_is_not_looked_up(guard: RepeatGuard, caplog: pytest.LogCaptureFixture) -> None:
    emit(log, Event.BUFFER_REVIVED, guard=guard, uid=1, buffer="{uid} {0} {x.__class__} %s", application="%d")
    assert caplog.records[0].getMessage().startswith("Buffer {uid} {0} {x.__class__} %s came")


def test_refused(guard: RepeatGuard, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AllocatorError)]
    of_alice = partial(refused, uid=1000, application="org.x.Y", client=":1.5", member="Allocate")
    told = set()
    for kind in kinds:
        if kind is AllocatorError:
            continue
        error = kind.__new__(kind)
        Exception.__init__(error, "the reason")
        caplog.clear()
        # A guard for each: several kinds are one event.
        if of_alice(log, error, guard=RepeatGuard(), limit="max_x", present=5):
            (record,) = caplog.records
            assert record.getMessage() == "Refused Allocate of user 1000 (org.x.Y): the reason"
            assert tuple(vars(record)[name] for name in ("error", "limit", "present")) == (error.name, "max_x", 5)
            assert vars(record)["message_id"] == REFUSALS[error.name].message_id
            assert record.funcName == "test_refused"
            told.add(error.name)
        else:
            assert caplog.records == []
    assert told == REFUSALS.keys()


# ---- repetitions ----------------------------------------------------------------------------------------------------


def test_one_entry_a_minute_for_each_user_and_kind(
    guard: RepeatGuard, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def again(uid: int, event: Event = Event.RATE_LIMITED) -> bool:
        return emit(log, event, guard=guard, uid=uid, member="m", reason="r")

    assert [again(1) for _ in range(1000)] == [True] + [False] * 999
    assert again(2)
    assert again(1, Event.QUOTA_EXCEEDED)
    clock.now += 59.9
    assert not again(1)
    clock.now += 0.2
    caplog.clear()
    assert again(1)
    assert caplog.records[0].getMessage() == "Refused m of user 1: r (1000 more like this in the meantime)"
    assert vars(caplog.records[0])["suppressed"] == 1000
    clock.now += 61
    caplog.clear()
    assert again(1)
    assert caplog.records[0].getMessage() == "Refused m of user 1: r"
    assert vars(caplog.records[0])["suppressed"] is None


def test_what_no_user_causes_is_always_told(guard: RepeatGuard) -> None:
    assert all(emit(log, Event.BUFFER_LOST, guard=guard, uid=1, buffer=str(n), reason="r") for n in range(100))


def test_what_is_not_logged_is_not_counted(guard: RepeatGuard, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    assert not emit(log, Event.RATE_LIMITED, guard=guard, uid=1)
    caplog.set_level(logging.DEBUG)
    assert emit(log, Event.RATE_LIMITED, guard=guard, uid=1)


def test_users_without_number_are_told_of_once_and_forgotten(clock: Clock) -> None:
    guard = RepeatGuard(clock, size=10)
    passed = [uid for uid in range(10_000) if guard.passes(Event.RATE_LIMITED, uid) is not None]
    # The eleventh stands for all the others.
    assert passed == list(range(11))
    assert len(guard._passed) == 11
    clock.now += 61
    assert guard.passes(Event.RATE_LIMITED, 10_000) == 0
    assert len(guard._passed) == 1


def test_others_do_not_lengthen_the_silence_of_one(clock: Clock) -> None:
    guard = RepeatGuard(clock, size=2)
    assert guard.passes(Event.RATE_LIMITED, "early") == 0
    clock.now += 30
    assert guard.passes(Event.RATE_LIMITED, "late") == 0
    assert guard.passes(Event.RATE_LIMITED, "early") is None
    clock.now += 31
    # The early one is over and makes room; the late one is not.
    assert guard.passes(Event.RATE_LIMITED, "new") == 0
    assert guard.passes(Event.RATE_LIMITED, "late") is None


def test_one_who_comes_again_and_again_does_not_keep_others_from_being_forgotten(clock: Clock) -> None:
    guard = RepeatGuard(clock, size=2)
    for seconds, user in ((0, "again"), (30, "once"), (31, "again"), (30, "new"), (0, "other")):
        clock.now += seconds
        # The last one finds the table full, of "again" and "new", and is the first of the others.
        assert guard.passes(Event.RATE_LIMITED, user) == 0
    assert guard.passes(Event.RATE_LIMITED, "another") is None


def test_the_guard_of_the_service_is_bounded() -> None:
    assert events._GUARD._size <= 1000
