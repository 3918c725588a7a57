# SPDX-License-Identifier: MIT
"""The algebra of constraints: properties of every merge, who is named for what, and what is refused as a demand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.unit.demands import LARGEST_T, LARGEST_U, constraints, crowded, demands
from udmabufd.core.constraints import (
    MAX_ALLOCATORS,
    MAX_ALLOCATORS_CHARACTERS,
    NONE,
    Constraints,
    Demand,
    Merged,
    accepts,
    merge,
)
from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec
from udmabufd_client.contract import CONSTRAINT_KEYS, CONSTRAINT_TYPES, Cache

NAMES = ("udmabuf", "udmabuf-2M", "udmabuf-1G", "memfd", "wrapped", "heap:system", "heap:reserved", "dumb:card0")


def demand(device: str, **values: Any) -> Demand:
    return Demand(device, Constraints.from_values(values))


def outcome(these: Sequence[Demand]) -> Constraints | str:
    """Return what `these` come to, or the key for which they exclude each other."""
    try:
        return merge(these).constraints
    except IncompatibleConstraints as error:
        return error.field


def together(*parts: Constraints | str) -> Constraints | str:
    """Return what parts that were merged already come to."""
    for part in parts:
        if isinstance(part, str):
            return part
    return outcome([Demand("x", part) for part in parts if isinstance(part, Constraints)])


def meets(memory: Constraints, wanted: Constraints) -> bool:
    """Return whether all that meets `memory` meets `wanted`, key by key: written down anew, by what each key means."""

    def at_most(mine: int | None, theirs: int | None) -> bool:
        return theirs is None or (mine is not None and mine <= theirs)

    return (
        at_most(memory.address_bits, wanted.address_bits)
        and memory.alignment % wanted.alignment == 0
        and memory.size_alignment % wanted.size_alignment == 0
        and memory.tail_padding >= wanted.tail_padding
        and memory.stride_alignment % wanted.stride_alignment == 0
        and memory.height_alignment % wanted.height_alignment == 0
        and at_most(memory.max_stride, wanted.max_stride)
        and at_most(memory.max_segments, wanted.max_segments)
        and memory.contiguous >= wanted.contiguous
        and at_most(memory.max_segment_size, wanted.max_segment_size)
        and at_most(memory.segment_boundary, wanted.segment_boundary)
        and (wanted.cache is None or (memory.cache is not None and memory.cache <= wanted.cache))
        and (
            wanted.allocators is None
            or (
                memory.allocators is not None
                and {name for name in NAMES if accepts(memory.allocators, name)}
                <= {name for name in NAMES if accepts(wanted.allocators, name)}
            )
        )
    )


# ---- the algebra ----------------------------------------------------------------------------------------------------


@given(demands() | crowded(), st.randoms(use_true_random=False))
def test_the_order_of_demands_changes_nothing(these: list[Demand], random: Any) -> None:
    shuffled = list(these)
    random.shuffle(shuffled)
    assert outcome(shuffled) == outcome(these)


@given(demands(3) | crowded(), demands(3) | crowded())
def test_what_was_merged_before_changes_nothing(one: list[Demand], other: list[Demand]) -> None:
    whole = outcome(one + other)
    parts = together(outcome(one), outcome(other))
    # Which key is told of first may differ: one part alone is looked at in all its keys.
    assert parts == whole or (isinstance(parts, str) and isinstance(whole, str))


@given(demands() | crowded())
def test_a_demand_made_twice_counts_once(these: list[Demand]) -> None:
    assert outcome(these + these) == outcome(these)
    assert together(outcome(these), outcome(these)) == outcome(these)


@given(constraints())
def test_one_demand_stays_as_it_is(one: Constraints) -> None:
    assert merge([Demand("gpu", one), Demand("camera", NONE)]) == merge([Demand("gpu", one)])
    assert merge([Demand("gpu", one)]) == Merged(one, dict.fromkeys(one.values(), "gpu"))


def test_no_demand_is_none() -> None:
    assert merge([]) == Merged(NONE, {})
    assert NONE.values() == {}


@given(demands() | crowded())
def test_a_merge_is_as_strict_as_each_part(these: list[Demand]) -> None:
    merged = outcome(these)
    assume(isinstance(merged, Constraints))
    assert isinstance(merged, Constraints)
    for part in these:
        assert meets(merged, part.constraints)


@given(demands() | crowded(), st.sampled_from(NAMES))
def test_a_merge_is_no_stricter_than_its_parts(these: list[Demand], name: str) -> None:
    merged = outcome(these)
    assume(isinstance(merged, Constraints))
    assert isinstance(merged, Constraints)
    for key, value in merged.values().items():
        if key not in {"alignment", "size_alignment", "stride_alignment", "height_alignment", "cache", "allocators"}:
            assert value in [part.constraints.values().get(key) for part in these]
    sets = [part.constraints.allocators for part in these if part.constraints.allocators is not None]
    assert merged.allocators is None or accepts(merged.allocators, name) == all(accepts(one, name) for one in sets)
    caches = [part.constraints.cache for part in these if part.constraints.cache is not None]
    for cache in Cache:
        assert merged.cache is None or (cache in merged.cache) == all(cache in one for one in caches)


@given(demands(6))
def test_nothing_wraps_around(these: list[Demand]) -> None:
    merged = outcome(these)
    assume(isinstance(merged, Constraints))
    assert isinstance(merged, Constraints)
    for key, value in merged.values().items():
        if CONSTRAINT_TYPES[key] in "ut":
            assert 0 < value <= (LARGEST_U if CONSTRAINT_TYPES[key] == "u" else LARGEST_T)


@pytest.mark.parametrize(
    ("key", "largest"),
    [
        ("alignment", LARGEST_T),
        ("size_alignment", LARGEST_T),
        ("stride_alignment", LARGEST_U),
        ("height_alignment", LARGEST_U),
    ],
)
def test_an_overflowing_multiple_is_refused(key: str, largest: int) -> None:
    # (2^n - 1) is the product of coprime factors: the largest multiple that still fits, and one beyond.
    factor = 3
    rest = largest // factor
    assert merge([demand("a", **{key: factor}), demand("b", **{key: rest})]).constraints.values() == {key: largest}
    beyond = (largest + 1) // 2
    with pytest.raises(IncompatibleConstraints) as caught:
        merge([demand("a", **{key: 3}), demand("z", **{key: beyond})])
    assert (caught.value.field, caught.value.devices) == (key, ("a", "z"))
    assert str(largest) in str(caught.value)


# ---- who decides ----------------------------------------------------------------------------------------------------


@given(demands() | crowded())
def test_those_named_decide(these: list[Demand]) -> None:
    """What the named devices demand comes to the same for their key, and each of them is needed."""
    named = [Demand(f"device{i}", one.constraints) for i, one in enumerate(these)]
    try:
        merged = merge(named)
    except IncompatibleConstraints:
        return
    assert list(merged.by) == list(merged.constraints.values())
    for key, names in merged.by.items():
        deciders = [one for one in named if one.device in names.split(" and ")]
        assert [one.device for one in deciders] == names.split(" and "), "each once, in order"
        wanted = merged.constraints.values()[key]
        # Only this key of theirs: others may exclude each other only when all are there, never here.
        assert merge(deciders).constraints.values()[key] == wanted
        for one in deciders:
            others = [other for other in deciders if other is not one]
            assert merge(others).constraints.values().get(key) != wanted
        alone = [one.device for one in named if one.constraints.values().get(key) == wanted]
        assert names in alone[:1] if alone else len(deciders) > 1, "the earliest that demands all of it"


def test_the_strictest_is_named_and_the_earliest_of_equals() -> None:
    merged = merge(
        [
            demand("gpu", address_bits=40, alignment=64, tail_padding=64, cache=["cached", "uncached"]),
            demand("camera", address_bits=32, alignment=4096, tail_padding=4096, cache=["cached"]),
            demand("codec", address_bits=32, alignment=4096, tail_padding=4096, cache=["cached"]),
        ]
    )
    assert merged.by == dict.fromkeys(("address_bits", "alignment", "tail_padding", "cache"), "camera")


def test_those_that_decide_together_are_named_together() -> None:
    merged = merge(
        [
            demand("a", alignment=2, allocators=["heap:*", "udmabuf", "memfd"], cache=["cached", "uncached"]),
            demand("b", alignment=6, allocators=["udmabuf", "heap:system", "dumb:*"], cache=["cached"]),
            demand("c", alignment=4, allocators=["heap:*", "dumb:card0"]),
            demand("b", alignment=12),
            demand("d", stride_alignment=6),
            demand("d", stride_alignment=10),
            demand("e", stride_alignment=15),
            demand("f", height_alignment=2),
            demand("g", height_alignment=4),
            demand("f", height_alignment=3),
            demand("h", height_alignment=2),
        ]
    )
    assert merged.constraints.alignment == 12
    assert merged.constraints.allocators == frozenset({"heap:system"})
    assert merged.by == {
        # The later demand of b covers all others.
        "alignment": "b",
        "stride_alignment": "d",
        # The 2 of f is no part of it, g covers that.
        "height_alignment": "g and f",
        "cache": "b",
        # `a` alone rules out dumb:card0.
        "allocators": "a and b and c",
    }


def test_contiguous_is_one_segment() -> None:
    assert Constraints.from_values({"contiguous": True}) == Constraints.from_values({"max_segments": 1})
    assert Constraints.from_values({"contiguous": True, "max_segments": 7}).max_segments == 1
    assert Constraints.from_values({"contiguous": False}) == NONE
    merged = merge([demand("gpu", max_segments=3), demand("camera", contiguous=True), demand("codec", max_segments=1)])
    assert merged.constraints.values() == {"max_segments": 1, "contiguous": True}
    assert merged.by == {"max_segments": "camera", "contiguous": "camera"}


# ---- who excludes whom ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("these", "field", "devices"),
    [
        ([demand("a", cache=["cached"]), demand("b", cache=["uncached"])], "cache", ("a", "b")),
        # The earliest that excludes it, not the one before.
        (
            [
                demand("a", allocators=["udmabuf", "memfd"]),
                demand("b", allocators=["heap:*", "memfd"]),
                demand("c", allocators=["heap:*"]),
            ],
            "allocators",
            ("a", "c"),
        ),
        # Any two have something in common, all three have not.
        (
            [
                demand("a", allocators=["udmabuf", "memfd"]),
                demand("b", allocators=["heap:system", "memfd"]),
                demand("c", allocators=["heap:*", "udmabuf"]),
            ],
            "allocators",
            ("a and b", "c"),
        ),
        (
            [demand("a", stride_alignment=1 << 17), demand("b", max_stride=1 << 16)],
            "max_stride",
            ("a", "b"),
        ),
        (
            [demand("a", max_stride=1000), demand("b", stride_alignment=24), demand("c", stride_alignment=125)],
            "max_stride",
            ("b and c", "a"),
        ),
        # The first key in the contract's order.
        (
            [
                demand("a", cache=["cached"], alignment=(1 << 63) + 1),
                demand("b", cache=["uncached"], alignment=(1 << 63)),
            ],
            "alignment",
            ("a", "b"),
        ),
    ],
)
def test_both_are_named(these: list[Demand], field: str, devices: tuple[str, str]) -> None:
    with pytest.raises(IncompatibleConstraints) as caught:
        merge(these)
    assert (caught.value.field, caught.value.devices) == (field, devices)
    text = str(caught.value)
    assert text.startswith(f"{field}: ")
    assert all(device in text for device in devices)


@given(demands(5) | crowded())
def test_an_error_names_two_that_exclude_each_other(these: list[Demand]) -> None:
    named = [Demand(f"device{i}", one.constraints) for i, one in enumerate(these)]
    try:
        merge(named)
    except IncompatibleConstraints as error:
        guilty = " and ".join(error.devices).split(" and ")
        with pytest.raises(IncompatibleConstraints) as again:
            merge([one for one in named if one.device in guilty])
        assert again.value.field == error.field
        with pytest.raises(IncompatibleConstraints) as once_more:
            merge(iter(named))
        assert (str(once_more.value), once_more.value.devices) == (str(error), error.devices)


def test_many_large_sets_are_merged_quickly() -> None:
    names = [f"heap:{i:02}" for i in range(64)]
    common = [f"heap:c{i}" for i in range(8)]
    many = [demand(f"device{i}", allocators=[*common, *names[i : i + 8]]) for i in range(56)]
    many += [demand(f"late{i}", allocators=common[i:] or ["heap:*"]) for i in range(8)]
    start = time.process_time()
    assert merge(many).constraints.allocators == frozenset({"heap:c7"})
    assert time.process_time() - start < 0.1


# ---- values ---------------------------------------------------------------------------------------------------------


@given(constraints())
def test_values_and_back(one: Constraints) -> None:
    values = one.values()
    assert Constraints.from_values(values) == one
    assert list(values) == [key for key in CONSTRAINT_KEYS if key in values]
    plain = {"u": int, "t": int, "b": bool, "as": list}
    assert all(type(value) is plain[CONSTRAINT_TYPES[key]] for key, value in values.items())
    assert all(type(name) is str for value in values.values() if isinstance(value, list) for name in value)


def test_what_demands_nothing_is_none() -> None:
    nothing = {"alignment": 1, "size_alignment": 1, "tail_padding": 0, "stride_alignment": 1, "height_alignment": 1}
    assert Constraints.from_values({**nothing, "contiguous": False}) == NONE


def test_equal_sets_are_equal_values() -> None:
    one = Constraints.from_values(
        {"allocators": ["heap:system", "udmabuf", "heap:*", "udmabuf"], "cache": ["cached"] * 2}
    )
    assert one == Constraints.from_values({"allocators": ["udmabuf", "heap:*"], "cache": ["cached"]})
    assert one.values() == {"cache": ["cached"], "allocators": ["heap:*", "udmabuf"]}


def test_patterns_stand_for_all_heaps_and_cards() -> None:
    assert accepts(frozenset({"heap:*"}), "heap:linux,cma")
    assert not accepts(frozenset({"heap:*"}), "dumb:card0")
    assert not accepts(frozenset({"heap:*", "dumb:*"}), "udmabuf")
    assert accepts(frozenset({"dumb:*", "memfd"}), "memfd")


@pytest.mark.parametrize("name", ["heap:linux,cma", "heap:a!#)+[]~", "dumb:card0", "udmabuf-1G", "wrapped"])
def test_accepted_allocators(name: str) -> None:
    assert Constraints.from_values({"allocators": [name]}).allocators == frozenset({name})


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"address_bits": 0}, "address_bits"),
        ({"address_bits": 65}, "address_bits"),
        ({"alignment": 0}, "alignment"),
        ({"size_alignment": 0}, "size_alignment"),
        ({"stride_alignment": 0}, "stride_alignment"),
        ({"height_alignment": 0}, "height_alignment"),
        ({"max_stride": 0}, "max_stride"),
        ({"max_segments": 0}, "max_segments"),
        ({"max_segment_size": 0}, "max_segment_size"),
        ({"segment_boundary": 0}, "segment_boundary"),
        ({"segment_boundary": 3 << 20}, "segment_boundary"),
        # What no D-Bus message could bring, but a file.
        ({"alignment": LARGEST_T + 1}, "alignment"),
        ({"max_stride": LARGEST_U + 1}, "max_stride"),
        ({"tail_padding": -1}, "tail_padding"),
        ({"alignment": True}, "alignment"),
        ({"alignment": 4096.0}, "alignment"),
        ({"alignment": "4096"}, "alignment"),
        ({"contiguous": 1}, "contiguous"),
        ({"cache": "cached"}, "cache"),
        ({"cache": 3}, "cache"),
        ({"cache": []}, "cache"),
        ({"cache": ["cached", "writeback"]}, "cache"),
        ({"cache": [["cached"]]}, "cache"),
        ({"allocators": []}, "allocators"),
        ({"allocators": "udmabuf"}, "allocators"),
        ({"allocators": [1]}, "allocators"),
        ({"allocators": ["udmabuf", "cma"]}, "allocators"),
        ({"allocators": ["heap:"]}, "allocators"),
        ({"allocators": ["heap:linux*"]}, "allocators"),
        ({"allocators": ["heap:a b"]}, "allocators"),
        ({"allocators": ["*"]}, "allocators"),
        ({"allocators": ['heap:a"b']}, "allocators"),
        ({"allocators": ["heap:a\\b"]}, "allocators"),
        ({"allocators": ["heap:a\x7f"]}, "allocators"),
        ({"allocators": ["udmabuf"] * (MAX_ALLOCATORS + 1)}, "allocators"),
        ({"allocators": [f"heap:{c * 60}" for c in "abcd"]}, "allocators"),
        ({"stride_alignment": 512, "max_stride": 511}, "max_stride"),
        ({"padding": 1}, "padding"),
    ],
)
def test_refused_values(values: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Constraints.from_values(values)
    assert caught.value.key == f"constraints.{key}"
    with pytest.raises(InvalidSpec) as caught:
        Constraints.from_values(values, "match[3]")
    assert str(caught.value).startswith(f"match[3].{key}: ")


def test_the_limits_of_values_are_accepted() -> None:
    names = [f"heap:{i:05}" for i in range(MAX_ALLOCATORS)]
    assert sum(map(len, names)) == MAX_ALLOCATORS_CHARACTERS
    values = {
        "address_bits": 64,
        "alignment": LARGEST_T,
        "size_alignment": LARGEST_T,
        "tail_padding": LARGEST_T,
        "stride_alignment": LARGEST_U,
        "height_alignment": LARGEST_U,
        "max_stride": LARGEST_U,
        "max_segments": LARGEST_U,
        "max_segment_size": LARGEST_T,
        "segment_boundary": 1 << 63,
        "cache": sorted(map(str, Cache)),
        "allocators": names,
    }
    assert Constraints.from_values(values).values() == values
    with pytest.raises(InvalidSpec):
        Constraints.from_values({"allocators": [*names[:-1], names[-1] + "0"]})
