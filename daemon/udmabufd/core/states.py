# SPDX-License-Identifier: MIT
"""The states of a buffer and how one follows from another: a table, asked by the registry and drawn for manuals.

When a step is taken is left to whoever takes it; that no other is possible is said here. None stands for a buffer
that is not there: not yet, or no more.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from udmabufd_client.contract import State


class Step(StrEnum):
    """What can happen to a buffer; the value says it in a drawing."""

    CREATED = "creates it"
    ALLOCATED = "has made its memory"
    """Also: a client's memfd was wrapped."""
    MOVE_BEGUN = "begins a move"
    """Or an eviction: importers are asked, and calls that need the memory wait."""
    MOVED = "has moved it"
    MOVE_CANCELLED = "cancels the move"
    EVICTED = "has evicted it"
    BROUGHT_BACK = "has brought it back"
    UNHELD = "last share gone"
    """The last share of a buffer whose memory others may still have; during a move, it is cancelled by that."""
    DISCARDED = "gone, had no dma-buf"
    """The last share of one that had no memory yet, or of kind memfd: there is nothing to wait for."""
    IMPORTED = "imports it again"
    FREED = "has freed its memory"
    RESTARTED = "is restarted"


class Who(StrEnum):
    """Whose doing a step is."""

    CLIENT = "client"
    SERVICE = "service"
    KERNEL = "kernel"


class Row(NamedTuple):
    """One transition."""

    before: State | None
    step: Step
    after: State | None
    who: Who


TABLE: Final = (
    Row(None, Step.CREATED, State.EMPTY, Who.CLIENT),
    Row(State.EMPTY, Step.ALLOCATED, State.BACKED, Who.SERVICE),
    Row(State.BACKED, Step.MOVE_BEGUN, State.MOVING, Who.SERVICE),
    Row(State.MOVING, Step.MOVED, State.BACKED, Who.SERVICE),
    Row(State.MOVING, Step.MOVE_CANCELLED, State.BACKED, Who.SERVICE),
    Row(State.MOVING, Step.EVICTED, State.EVICTED, Who.SERVICE),
    Row(State.EVICTED, Step.BROUGHT_BACK, State.BACKED, Who.SERVICE),
    Row(State.BACKED, Step.UNHELD, State.LINGERING, Who.CLIENT),
    Row(State.MOVING, Step.UNHELD, State.LINGERING, Who.CLIENT),
    # Its memfd alone is left, and is proven free at once.
    Row(State.EVICTED, Step.UNHELD, State.LINGERING, Who.CLIENT),
    Row(State.LINGERING, Step.IMPORTED, State.BACKED, Who.CLIENT),
    Row(State.LINGERING, Step.FREED, None, Who.KERNEL),
    Row(State.EMPTY, Step.DISCARDED, None, Who.CLIENT),
    Row(State.BACKED, Step.DISCARDED, None, Who.CLIENT),
    # In one place as a whole, the former or the new one.
    Row(State.MOVING, Step.RESTARTED, State.BACKED, Who.SERVICE),
    Row(State.EMPTY, Step.RESTARTED, State.EMPTY, Who.SERVICE),
    Row(State.BACKED, Step.RESTARTED, State.BACKED, Who.SERVICE),
    Row(State.EVICTED, Step.RESTARTED, State.EVICTED, Who.SERVICE),
    Row(State.LINGERING, Step.RESTARTED, State.LINGERING, Who.SERVICE),
)
"""Every transition there is; of each state and step at most one. In the order in which they are drawn."""

_AFTER: Final = {(row.before, row.step): row.after for row in TABLE}

_COLUMNS: Final[tuple[State | None, ...]] = (None, *State)


class ImpossibleStep(Exception):
    """A step that the state does not allow: a fault of the service, not of a caller."""

    def __init__(self, state: State | None, step: Step) -> None:
        super().__init__(f"no buffer that is {_name(state)} can take the step {step.name}")
        self.state = state
        self.step = step


def after(state: State | None, step: Step) -> State | None:
    """Return the state that follows; None if the buffer is forgotten. Raises ImpossibleStep."""
    try:
        return _AFTER[state, step]
    except KeyError:
        raise ImpossibleStep(state, step) from None


def steps(state: State | None) -> tuple[Step, ...]:
    """Return the steps that are possible in `state`."""
    return tuple(row.step for row in TABLE if row.before == state)


def drawing() -> str:
    """Return the table as lines of ASCII text: a column for each state, an arrow for each transition.

    A step that leaves several states as they are has one line for all of them, an `=` in the column of each.
    """
    starts: dict[State | None, int] = {}
    header = ""
    for state in _COLUMNS:
        starts[state] = len(header)
        header += f"{_name(state)} "
    lines = [header.rstrip()]
    kept: dict[tuple[Who, Step], set[int]] = {}
    for row in TABLE:
        begin, end = starts[row.before], starts[row.after]
        if begin == end:
            kept.setdefault((row.who, row.step), set()).add(begin)
            continue
        line = "-" * (abs(end - begin) - 1)
        arrow = f"o{line}>" if begin < end else f"<{line}o"
        lines.append(f"{' ' * min(begin, end)}{arrow}".ljust(len(header) + 1) + f"{row.who}: {row.step}")
    for (who, step), columns in kept.items():
        marks = "".join("=" if column in columns else " " for column in range(len(header)))
        lines.append(f"{marks} {who}: {step}")
    return "\n".join(lines)


def _name(state: State | None) -> str:
    return "none" if state is None else str(state)
