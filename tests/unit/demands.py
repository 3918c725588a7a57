# SPDX-License-Identifier: MIT
"""Hypothesis strategies for constraints and demands, for the tests of what is made of them."""

from __future__ import annotations

from hypothesis import strategies as st

from udmabufd.core.constraints import Constraints, Demand
from udmabufd_client.contract import Cache

ALLOCATORS = ("udmabuf", "udmabuf-2M", "memfd", "heap:system", "heap:reserved", "dumb:card0", "heap:*", "dumb:*")

LARGEST_U = (1 << 32) - 1
LARGEST_T = (1 << 64) - 1


def multiples(largest: int) -> st.SearchStrategy[int]:
    """Alignments: small ones with common factors, powers of two, and such as overflow together."""
    bits = largest.bit_length()
    return (
        st.sampled_from((1, 2, 3, 4, 6, 10, 15, 64, 4096))
        | st.integers(0, bits - 1).map(lambda bit: 1 << bit)
        | st.integers(1, largest)
    )


def _or_none(strategy: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    return st.none() | strategy


def constraints() -> st.SearchStrategy[Constraints]:
    """Any constraints in normal form, the plain ones often."""
    values = st.fixed_dictionaries(
        {},
        optional={
            "address_bits": st.integers(1, 64),
            "alignment": multiples(LARGEST_T),
            "size_alignment": multiples(LARGEST_T),
            "tail_padding": st.sampled_from((0, 1, 4096)) | st.integers(0, LARGEST_T),
            "stride_alignment": multiples(LARGEST_U),
            "height_alignment": multiples(LARGEST_U),
            "max_stride": st.integers(1, LARGEST_U),
            "max_segments": st.integers(1, 4) | st.integers(1, LARGEST_U),
            "max_segment_size": st.integers(1, LARGEST_T),
            "segment_boundary": st.integers(0, 63).map(lambda bit: 1 << bit),
            "contiguous": st.booleans(),
            "cache": st.lists(st.sampled_from([str(cache) for cache in Cache]), min_size=1),
            "allocators": st.lists(st.sampled_from(ALLOCATORS), min_size=1, max_size=5),
        },
    ).map(_without_contradiction)
    return values.map(Constraints.from_values)


def _without_contradiction(values: dict[str, object]) -> dict[str, object]:
    if "max_stride" in values and "stride_alignment" in values:
        stride, alignment = values["max_stride"], values["stride_alignment"]
        assert isinstance(stride, int)
        assert isinstance(alignment, int)
        values["max_stride"], values["stride_alignment"] = max(stride, alignment), min(stride, alignment)
    return values


def demands(max_size: int = 4) -> st.SearchStrategy[list[Demand]]:
    """Demands of some devices, which may attach more than once."""
    return st.lists(
        st.builds(Demand, st.sampled_from(("gpu", "camera", "codec", "spec")), constraints()), max_size=max_size
    )


def crowded() -> st.SearchStrategy[list[Demand]]:
    """Demands of many devices on one and the same key, where several decide together or exclude each other."""
    numbers = st.sampled_from((2, 3, 4, 5, 6, 9, 10, 15, 1 << 16, 1 << 31))
    sets = st.lists(st.sampled_from(("udmabuf", "heap:system", "heap:reserved", "heap:*")), min_size=1, max_size=3)
    values = (
        st.lists(numbers.map(lambda number: {"alignment": number}), min_size=2, max_size=5)
        | st.lists(numbers.map(lambda number: {"stride_alignment": number}), min_size=2, max_size=5)
        | st.lists(sets.map(lambda names: {"allocators": names}), min_size=2, max_size=5)
    )
    return values.map(lambda found: [Demand("gpu", Constraints.from_values(each)) for each in found])
