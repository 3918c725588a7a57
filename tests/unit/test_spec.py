# SPDX-License-Identifier: MIT
"""Specs: what is taken, and that whatever is not is InvalidSpec naming the key at fault."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.core.errors import InvalidSpec
from udmabufd.core.layout import FORMATS
from udmabufd.core.spec import MAX_SIZE, PAGE_SIZE, Request
from udmabufd_client.contract import SPEC_KEYS, Cache, CachePolicy, Kind

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
    "request_id": st.text(max_size=80),
}


def test_every_key_has_a_strategy() -> None:
    assert set(VALUES) == set(SPEC_KEYS)


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_any_spec_is_a_request_or_an_error_that_names_a_key(spec: dict[str, Any]) -> None:
    try:
        request = Request.from_spec(spec)
    except InvalidSpec as error:
        assert error.key in SPEC_KEYS
        assert str(error).startswith(error.key + ": ")
        assert len(str(error)) < 200
        return
    assert 0 < request.size_requested <= request.size < request.size_requested + PAGE_SIZE
    assert request.size % PAGE_SIZE == 0
    assert request.size <= MAX_SIZE
    assert (request.layout is None) == ("size" in spec)


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
