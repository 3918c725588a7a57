# SPDX-License-Identifier: MIT
"""core.requests: the same id and the same question have the same answer, however often and from wherever asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tests.unit.time_loop import at_rest, run
from udmabufd.core.buffer import Buffer, Repeat
from udmabufd.core.errors import AllocatorError, InvalidSpec, OutOfMemory
from udmabufd.core.ledger import Owner
from udmabufd.core.requests import Requests, numbered, repeat_of
from udmabufd.core.spec import Request

OWNER = Owner(1000, "app")
ID = "0123456789abcdef"
SPEC = {"size": 4096, "request_id": ID}


def asked(spec: Mapping[str, Any] = SPEC, member: str = "Allocate", count: int = 1, owner: Owner = OWNER) -> Repeat:
    repeat = repeat_of(owner, member, spec, count)
    assert repeat is not None
    return repeat


def buffers_of(repeat: Repeat | None) -> list[Buffer]:
    count = 1 if repeat is None else repeat.count
    request = Request.from_spec({"size": 4096})
    return [Buffer(request, OWNER, numbered(repeat, index)) for index in range(count)]


class Maker:
    """Makes buffers, when it may and as often as it is asked."""

    def __init__(self, repeat: Repeat | None = None) -> None:
        self.repeat = repeat
        self.made: list[list[Buffer]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.errors: list[AllocatorError] = []

    async def __call__(self) -> list[Buffer]:
        await self.go.wait()
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        self.made.append(buffers_of(self.repeat))
        return self.made[-1]


def test_without_an_id_each_call_makes_its_own() -> None:
    async def main() -> None:
        requests, make = Requests(), Maker()
        assert repeat_of(OWNER, "Allocate", {"size": 1}, 1) is None
        first, second = await requests.once(None, make), await requests.once(None, make)
        assert first[1]
        assert second[1]
        assert first[0] != second[0]

    run(main())


@pytest.mark.parametrize(
    "request_id", ["", "x" * 15, "x" * 65, "x" * 15 + " ", "x" * 16 + "\n", "é" * 16, "x" * 15 + "\0"]
)
def test_an_id_is_16_to_64_printable_characters(request_id: str) -> None:
    with pytest.raises(InvalidSpec, match="^request_id: must have 16 to 64"):
        repeat_of(OWNER, "Allocate", {"request_id": request_id}, 1)


def test_the_same_question_has_the_same_answer() -> None:
    async def main() -> None:
        requests = Requests()
        make = Maker(asked())
        (first,), made = await requests.once(asked(), make)
        assert made
        # In whatever order the keys came.
        (again,), made = await requests.once(asked(dict(reversed(SPEC.items()))), make)
        assert (again, made) == (first, False)
        # Another user's, or another application's, is another id.
        for owner in (Owner(1001, "app"), Owner(1000, "")):
            (other,), made = await requests.once(asked(owner=owner), Maker(asked(owner=owner)))
            assert made
            assert other is not first
        assert len(make.made) == 1

    run(main())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (asked({"size": 4097, "request_id": ID}), "another spec"),
        (asked({"size": 4096, "name": "x", "request_id": ID}), "another spec"),
        (asked({"size": "4096", "request_id": ID}), "another spec"),
        (asked(member="AllocateMany"), "was used in Allocate before"),
        (asked(member="CreateBuffer"), "was used in Allocate before"),
        (asked(count=2), "stands for 1 buffers, not 2"),
    ],
)
@pytest.mark.parametrize("under_way", [False, True])
def test_another_question_is_refused(other: Repeat, text: str, under_way: bool) -> None:
    async def main() -> None:
        requests, make = Requests(), Maker(asked())
        if under_way:
            make.go.clear()
        first = asyncio.create_task(requests.once(asked(), make))
        await at_rest()
        with pytest.raises(InvalidSpec, match=f"^request_id: .*{text}"):
            await requests.once(other, make)
        make.go.set()
        await first
        assert len(make.made) == 1

    run(main())


def test_calls_at_the_same_time_make_one() -> None:
    async def main() -> None:
        requests, make = Requests(), Maker(asked(count=3))
        make.go.clear()
        calls = [asyncio.create_task(requests.once(asked(count=3), make)) for _ in range(10)]
        await at_rest()
        make.go.set()
        answers = [await call for call in calls]
        assert [made for _, made in answers] == [True] + [False] * 9
        assert all(buffers == make.made[0] for buffers, _ in answers)
        assert len(make.made) == 1

    run(main())


def test_when_the_first_fails_the_next_is_the_first() -> None:
    async def main() -> None:
        requests, make = Requests(), Maker(asked())
        make.go.clear()
        make.errors = [OutOfMemory("none"), OutOfMemory("none")]
        calls = [asyncio.create_task(requests.once(asked(), make)) for _ in range(5)]
        await at_rest()
        make.go.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(answer, OutOfMemory) for answer in answers] == [True, True, False, False, False]
        assert len(make.made) == 1
        assert (await requests.once(asked(), make))[0] == make.made[0]

    run(main())


def test_when_the_first_caller_goes_the_next_is_the_first() -> None:
    async def main() -> None:
        requests, make = Requests(), Maker(asked())
        make.go.clear()
        first, second = (asyncio.create_task(requests.once(asked(), make)) for _ in range(2))
        await at_rest()
        first.cancel()
        await at_rest()
        assert not second.done()
        make.go.set()
        (buffer,), made = await second
        assert made
        assert make.made == [[buffer]]
        assert not requests._under_way

    run(main())


def test_an_id_is_free_again_when_a_buffer_of_it_ends() -> None:
    async def main() -> None:
        requests, make = Requests(), Maker(asked(count=2))
        (one, two), _ = await requests.once(asked(count=2), make)
        assert requests.forget(one) == [two]
        # Another spec is all right by now, for this id stands for nothing.
        other = asked({"size": 1, "request_id": ID})
        (later,), made = await requests.once(other, Maker(other))
        assert made
        # The rest of the earlier set does not take the later one's id with it.
        assert requests.forget(two) == []
        assert (await requests.once(other, make))[0] == [later]
        assert requests.forget(later) == []
        assert requests.forget(Buffer(Request.from_spec({"size": 1}), OWNER)) == []
        assert not requests._made

    run(main())


def test_after_a_restart_an_id_stands_for_all_of_its_buffers_or_for_none() -> None:
    async def main() -> None:
        whole, part = asked(count=3), asked({"size": 1, "request_id": "f" * 16}, count=3)
        found = buffers_of(whole)
        requests = Requests()
        rest = buffers_of(part)[1:]
        assert requests.restore([*reversed(found), *rest, *buffers_of(None)]) == rest
        make = Maker(part)
        assert await requests.once(whole, make) == (found, False)
        buffers, made = await requests.once(part, make)
        assert made
        assert buffers == make.made[0]

    run(main())
