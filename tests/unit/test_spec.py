# SPDX-License-Identifier: MIT
"""Specs: what is taken, and that whatever is not is InvalidSpec naming the key at fault."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.demands import constraints, demands
from udmabufd.core.constraints import Constraints, Demand, Merged, merge
from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec
from udmabufd.core.layout import FORMATS
from udmabufd.core.spec import MAX_SIZE, PAGE_SIZE, Request
from udmabufd_client.contract import CONSTRAINT_KEYS, SPEC_KEYS, Cache, CachePolicy, Kind

U32 = st.integers(0, (1 << 32) - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "size": st.integers(0, (1 << 64) - 1),
    "width": U32,
    "height": U32,
    "format": st.sampled_from(sorted(FORMATS)) | st.text(max_size=8),
    "name": st.text(max_size=40),
    "kind": st.sampled_from(list(Kind)) | st.text(max_size=8),
    "cache": st.sampled_from(list(Cache)) | st.text(max_size=8),
    "cache_policy": st.sampled_from(list(CachePolicy)) | st.text(max_size=8),
    "allocator": st.sampled_from(["udmabuf", "memfd", "heap:system", "dumb:card0"]) | st.text(max_size=8),
    "constraints": constraints().map(Constraints.values)
    | st.dictionaries(
        st.sampled_from(sorted(CONSTRAINT_KEYS)) | st.text(max_size=8), st.integers() | st.text(max_size=8)
    ),
    # What they lead to is looked up elsewhere.
    "devices": st.lists(st.text(max_size=8), max_size=3),
    "request_id": st.text(max_size=80),
}
PICTURES = st.fixed_dictionaries(
    {"width": st.integers(1, 5000), "height": st.integers(1, 3000), "format": st.sampled_from(sorted(FORMATS))}
)
SIZES = st.fixed_dictionaries({"size": st.integers(1, 1 << 40)})


def test_every_key_has_a_strategy() -> None:
    assert set(VALUES) == set(SPEC_KEYS)


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_any_spec_is_a_request_or_an_error_that_names_a_key(spec: dict[str, Any]) -> None:
    try:
        request = Request.from_spec(spec)
    except InvalidSpec as error:
        assert error.key.partition(".")[0] in SPEC_KEYS
        assert str(error).startswith(error.key + ": ")
        assert len(str(error)) < 400
        return
    except IncompatibleConstraints as error:
        # Nothing else excludes its like in a spec that no device adds to.
        assert (error.field, error.devices) == ("max_stride", ("spec", "spec"))
        return
    assert 0 < request.size_requested <= request.size
    assert request.size % PAGE_SIZE == 0
    assert request.size <= MAX_SIZE
    assert (request.layout is None) == ("size" in spec)
    if not spec.get("constraints"):
        assert request.size < request.size_requested + PAGE_SIZE


@given(PICTURES | SIZES, constraints(), demands())
def test_what_is_laid_out_under_demands_meets_them(
    spec: dict[str, Any], own: Constraints, asked: list[Demand]
) -> None:
    try:
        plain = Request.from_spec({**spec, "constraints": own.values()})
        request = plain.under(asked)
    except (IncompatibleConstraints, InvalidSpec):
        return
    wanted, layout = request.merged.constraints, request.layout
    assert request.merged == merge([Demand("spec", own), *asked])
    step = math.lcm(wanted.size_alignment, PAGE_SIZE)
    needed = (request.size_requested if layout is None else layout.size) + wanted.tail_padding
    assert request.size % step == 0
    assert needed <= request.size < needed + step, "no more than that"
    if layout is not None:
        assert all(stride % math.lcm(256, wanted.stride_alignment) == 0 for stride in layout.strides)
        assert wanted.max_stride is None or max(layout.strides) <= wanted.max_stride
    assert request.misfit(request.size, request.merged) is None
    # What was asked for is told as it was asked for, whoever attaches.
    assert request.size_requested == Request.from_spec(spec).size_requested
    # And with those gone it is as before.
    assert request.under(()) == plain


def merged_of(**values: Any) -> Merged:
    return merge([Demand("gpu", Constraints.from_values(values))])


NV12 = {"width": 1920, "height": 1081, "format": "NV12"}
"""Strides of 2048 bytes, 1081 and 541 rows: 811 pages."""


@pytest.mark.parametrize(
    ("spec", "demanded", "key"),
    [
        (NV12, {"stride_alignment": 2048}, None),
        (NV12, {"stride_alignment": 4096}, "stride_alignment"),
        (NV12, {"stride_alignment": 3}, "stride_alignment"),
        (NV12, {"max_stride": 2048}, None),
        (NV12, {"max_stride": 2047}, "max_stride"),
        (NV12, {"height_alignment": 1081}, None),
        (NV12, {"height_alignment": 16}, "height_alignment"),
        (NV12, {"tail_padding": PAGE_SIZE}, None),
        (NV12, {"tail_padding": PAGE_SIZE + 1}, "tail_padding"),
        (NV12, {"size_alignment": PAGE_SIZE}, None),
        (NV12, {"size_alignment": 8 * PAGE_SIZE}, "size_alignment"),
        ({"size": PAGE_SIZE - 1}, {"tail_padding": 1}, None),
        ({"size": PAGE_SIZE - 1}, {"tail_padding": 2}, "tail_padding"),
        # Nothing that has no rows is laid out in rows.
        ({"size": PAGE_SIZE}, {"stride_alignment": 3, "height_alignment": 7, "max_stride": 3}, None),
        ({"size": PAGE_SIZE}, {"size_alignment": 3}, "size_alignment"),
    ],
)
def test_memory_that_is_there_is_measured(spec: dict[str, Any], demanded: dict[str, Any], key: str | None) -> None:
    """The picture has a page more than it needs."""
    request = Request.from_spec(spec)
    size = request.size if "size" in spec else 812 * PAGE_SIZE
    assert request.misfit(size, merged_of(**demanded)) == key


def test_memory_that_was_rounded_up_has_room_for_more() -> None:
    """Huge pages: rows and padding that come later may fit into what is left."""
    request = Request.from_spec(NV12)
    more = merged_of(height_alignment=1081, tail_padding=1 << 19)
    # The key at fault, whatever else is demanded.
    assert request.misfit(request.size, more) == "tail_padding"
    assert request.misfit(request.size, merged_of(height_alignment=1082, tail_padding=1 << 19)) == "height_alignment"
    assert request.misfit(4 << 20, more) is None


def test_strides_that_a_device_cannot_take_are_its_refusal() -> None:
    request = Request.from_spec(NV12)
    with pytest.raises(
        IncompatibleConstraints, match="^max_stride: gpu takes rows of 2000 .* 1920 pixels of NV12.*2048"
    ):
        request.under([Demand("gpu", Constraints(max_stride=2000))])
    assert request.under([Demand("gpu", Constraints(max_stride=2048))]).size == request.size


def test_padding_that_no_file_could_have_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="^constraints: makes a buffer of"):
        Request.from_spec({"size": 1, "constraints": {"tail_padding": (1 << 64) - 1}})


def test_what_a_client_brings_is_wrapped() -> None:
    request = Request.from_spec({"size": 1})
    assert request.wrapping() == replace(request, allocator="wrapped")


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ({}, "size"),
        ({"size": 0}, "size"),
        ({"size": (1 << 64) - 1}, "size"),
        ({"size": 1, "width": 1}, "size"),
        ({"size": 1, "format": "XR24"}, "size"),
        ({"width": 1, "height": 1}, "format"),
        ({"width": 1, "format": "XR24"}, "height"),
        ({"height": 1, "format": "XR24"}, "width"),
        ({"width": 0, "height": 1, "format": "XR24"}, "width"),
        ({"width": 1, "height": 0, "format": "XR24"}, "height"),
        ({"width": (1 << 32) - 1, "height": (1 << 32) - 1, "format": "XR4H"}, "height"),
        ({"width": 1, "height": 1, "format": "xr24"}, "format"),
        ({"width": 1, "height": 1, "format": "R8"}, "format"),
        ({"size": 1, "name": ""}, "name"),
        ({"size": 1, "name": "x" * 32}, "name"),
        ({"size": 1, "name": "a\ncount:\t1"}, "name"),
        ({"size": 1, "name": "é"}, "name"),
        ({"size": 1, "kind": "dmabuf"}, "kind"),
        ({"size": 1, "cache": "wc"}, "cache"),
        ({"size": 1, "cache_policy": ""}, "cache_policy"),
        ({"size": 1, "allocator": "memfd"}, "allocator"),
        ({"size": 1, "allocator": "udmabuf", "kind": "memfd"}, "allocator"),
        ({"size": 1, "allocator": "/dev/udmabuf"}, "allocator"),
    ],
)
def test_the_key_at_fault_is_named(spec: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Request.from_spec(spec)
    assert caught.value.key == key


def test_sizes_are_rounded_up_to_pages() -> None:
    request = Request.from_spec({"size": PAGE_SIZE + 1, "name": "x" * 31})
    assert (request.size, request.size_requested) == (2 * PAGE_SIZE, PAGE_SIZE + 1)
    assert (request.kind, request.cache, request.cache_policy) == (Kind.DMA_BUF, Cache.CACHED, CachePolicy.PREFER)
