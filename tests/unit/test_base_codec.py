# SPDX-License-Identifier: MIT
"""udmabufd_base.codec over both libraries: equal values in and out, and only ProtocolError on hostile bodies."""

from __future__ import annotations

import importlib.util
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd_base import codec as codec_in_use
from udmabufd_base.errors import ProtocolError
from udmabufd_base.message import Header, Message, MessageType, pack_header, parse_header

LIBRARIES = ("dbus-next", "dbus-fast")


def load(library: str) -> ModuleType:
    """The module once more, under another name, over the library of our choice."""
    before = os.environ.get(codec_in_use.ENVIRONMENT)
    os.environ[codec_in_use.ENVIRONMENT] = library
    try:
        spec = importlib.util.spec_from_file_location(f"codec_{library}", codec_in_use.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del os.environ[codec_in_use.ENVIRONMENT]
        if before is not None:
            os.environ[codec_in_use.ENVIRONMENT] = before
    return module


CODECS = {library: load(library) for library in LIBRARIES}


@pytest.fixture(params=LIBRARIES)
def codec(request: pytest.FixtureRequest) -> ModuleType:
    return CODECS[request.param]


def signal(signature: str, body: list[Any], unix_fds: int = 0) -> Message:
    return Message(
        MessageType.SIGNAL,
        serial=1,
        path="/",
        interface="a.b",
        member="M",
        signature=signature,
        body=body,
        unix_fds=unix_fds,
    )


def round_trip(encoder: ModuleType, decoder: ModuleType, message: Message) -> list[Any]:
    raw = encoder.encode(message)
    header = parse_header(raw)
    assert header is not None
    assert header.total_length == len(raw)
    body: list[Any] = decoder.decode_body(raw, header)
    return body


def test_the_environment_chooses_the_library(codec: ModuleType) -> None:
    library = next(name for name, module in CODECS.items() if module is codec)
    name, version = codec.LIBRARY.split(" ")
    assert name == library
    assert version[0].isdigit()
    assert codec.Variant.__module__.startswith(library.replace("-", "_"))


@pytest.mark.parametrize(("value", "said"), [("dbus-python", "dbus-python"), ("dbus-next2", "is not one of")])
def test_an_unknown_library_is_refused(value: str, said: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import udmabufd_base.codec"],
        env={**os.environ, codec_in_use.ENVIRONMENT: value, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert said in result.stderr.splitlines()[-1]


def test_a_python_without_the_deprecated_decorator_imports_dbus_next() -> None:
    program = "import typing; del typing.no_type_check_decorator; import udmabufd_base.codec as c; print(c.LIBRARY)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, codec_in_use.ENVIRONMENT: "dbus-next", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("dbus-next ")


@pytest.mark.parametrize("decoder", LIBRARIES)
@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("", []),
        ("ybnqiuxtd", [255, True, -(1 << 15), 65535, -(1 << 31), 0xFFFFFFFF, -(1 << 63), (1 << 64) - 1, 0.5]),
        ("sog", ["grüße", "/a/b", "a{sv}"]),
        ("ay", [b"\0\xff"]),
        ("aay", [[b"a", b""]]),
        ("as", [["one", ""]]),
        ("(ybas)", [[1, False, ["x"]]]),
        ("a(s(it))", [[["a", [1, 2]], ["b", [-1, 3]]]]),
        ("a{s(ay)}", [{"k": [b"v"]}]),
        ("a{oa{sx}}", [{"/a": {"x": 1}, "/b": {}}]),
        ("yaxya{yd}", [1, [], 2, {}]),
        ("ahh", [[0, 1], 2]),
    ],
)
def test_values_come_back_as_they_went(codec: ModuleType, decoder: str, signature: str, body: list[Any]) -> None:
    back = round_trip(codec, CODECS[decoder], signal(signature, body, unix_fds=3))
    assert back == body
    assert repr(back) == repr(body)  # == holds for True and 1, and for bytes and bytearray


@pytest.mark.parametrize("decoder", LIBRARIES)
def test_variants_come_back_with_plain_values_in_them(codec: ModuleType, decoder: str) -> None:
    make = codec.Variant
    body = [{"a": make("(ay(s))", [b"x", ["y"]]), "b": make("v", make("aay", [b"z"])), "c": make("b", True)}]
    (back,) = round_trip(codec, CODECS[decoder], signal("a{sv}", body))
    assert [value.signature for value in back.values()] == ["(ay(s))", "v", "b"]
    assert repr(back["a"].value) == "[b'x', ['y']]"
    assert repr(back["b"].value.value) == "[b'z']"
    assert back["c"].value is True


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("s", []),
        ("s", ["a", "b"]),
        ("s", [1]),
        ("s", [None]),
        ("s", ["NUL\0inside"]),
        ("s", ["\ud800"]),
        ("y", [256]),
        ("u", [-1]),
        ("t", [1 << 64]),
        ("o", ["no/slash"]),
        ("h", [3]),
        ("ah", [[0, 3]]),
        ("as", ["text"]),
        ("ay", ["text"]),
        ("a{sv}", [{"k": 1}]),
        ("(ii)", [[1]]),
        ("(", [[1]]),
        ("()", [[]]),
        ("{ss}", [{"a": "b"}]),
        ("z", [1]),
        ("a" * 256, [[]]),
        ("a" * 66 + "y", [[]]),
    ],
)
def test_bodies_that_a_bus_would_hang_up_on_are_not_sent(codec: ModuleType, signature: str, body: list[Any]) -> None:
    with pytest.raises(ValueError, match="signature"):
        codec.encode(signal(signature, body, unix_fds=3))


def raw_body(signature: str, body: bytes, unix_fds: int = 0) -> tuple[bytes, Header]:
    raw = pack_header(signal(signature, [], unix_fds), len(body)) + body
    header = parse_header(raw)
    assert header is not None
    return raw, header


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        pytest.param("u", b"\1\0\0", id="too short"),
        pytest.param("y", b"\1\0", id="too long"),
        pytest.param("s", b"\xff\xff\xff\xffab\0", id="string beyond the end"),
        pytest.param("s", b"\2\0\0\0abc", id="string without NUL"),
        pytest.param("s", b"\2\0\0\0a\0\0", id="NUL in a string"),
        pytest.param("s", b"\1\0\0\0\xff\0", id="not UTF-8"),
        pytest.param("yu", b"\1\0\1\0\1\0\0\0", id="padding"),
        pytest.param("au", b"\xff\xff\xff\xff" + bytes(4), id="array beyond the end"),
        pytest.param("au", b"\3\0\0\0abc", id="array of three quarters of a u"),
        pytest.param("as", b"\5\0\0\0\1\0\0\0a\0", id="element beyond its array"),
        pytest.param("ay", struct.pack("<I", (1 << 26) + 1) + bytes(8), id="array larger than may be"),
        pytest.param("v", b"\0\0", id="variant of no type"),
        pytest.param("v", b"\2yy\0\1\1", id="variant of two types"),
        pytest.param("v", b"\1z\0\1", id="variant of a type that is none"),
        pytest.param("v", b"\1{\0" + bytes(5), id="variant of half a dict entry"),
        pytest.param("v", b"\1(\0" + bytes(5), id="variant of half a struct"),
        pytest.param("v", b"\2()\0" + bytes(4), id="variant of an empty struct"),
        pytest.param("v", b"\1v\0" * 4000 + b"\1y\0\1", id="variants in variants"),
        pytest.param("g", b"\2()\0", id="a signature that is none"),
        pytest.param("o", b"\2\0\0\0/-\0", id="an object path that is none"),
        pytest.param("h", b"\2\0\0\0", id="an fd that did not come"),
        pytest.param("v", b"\1h\0\0\2\0\0\0", id="an fd in a variant that did not come"),
        pytest.param("ah", b"\x08\0\0\0" + b"\1\0\0\0\2\0\0\0", id="an fd in an array that did not come"),
    ],
)
def test_bodies_that_do_not_match_are_a_protocol_error(codec: ModuleType, signature: str, body: bytes) -> None:
    raw, header = raw_body(signature, body, unix_fds=2)
    with pytest.raises(ProtocolError):
        codec.decode_body(raw, header)


@pytest.mark.parametrize(
    "signature", ["(", ")", "a", "{ss}", "a{s}", "a{vs}", "a{(y)s}", "()", "z", "a(", "y)", "a" * 255]
)
def test_a_header_with_a_signature_that_is_none(codec: ModuleType, signature: str) -> None:
    raw, header = raw_body(signature, bytes(16))
    with pytest.raises(ProtocolError):
        codec.decode_body(raw, header)


def test_big_endian_bodies(codec: ModuleType) -> None:
    fields = b"\5\1u\0\0\0\0\1" + b"\x08\1g\0\3qus\0"
    fixed = struct.pack(">BBBBIII", ord("B"), 2, 0, 1, 17, 9, len(fields))
    raw = fixed + fields + bytes(-len(fields) % 8) + struct.pack(">HHII", 0x0102, 0, 0x03040506, 4) + b"text\0"
    header = parse_header(raw)
    assert header is not None
    assert codec.decode_body(raw, header) == [0x0102, 0x03040506, "text"]


def remembered(codec: ModuleType) -> int:
    """How many signatures the library holds trees of."""
    if codec.LIBRARY.startswith("dbus-next"):
        return len(codec._signature.SignatureTree._cache)
    count: int = codec._signature.get_signature_tree.cache_info().currsize
    return count


def test_the_library_remembers_a_bounded_number_of_signatures(codec: ModuleType) -> None:
    peak = 0
    for number in range(1 << 10):
        signature = "(" + "".join("nq"[number >> bit & 1] for bit in range(10)) + ")"
        # 1 + 12 + 1 bytes of signature, padding to 8, ten values of two bytes.
        raw, header = raw_body("v", bytes((12,)) + signature.encode() + bytes(1 + 2 + 20))
        assert codec.decode_body(raw, header)[0].signature == signature
        peak = max(peak, remembered(codec))
    assert 200 < peak <= 257


# Complete types and values that fit them, as a pair of signature and strategy for the value.
Typed = tuple[str, st.SearchStrategy[Any]]

_INTEGERS = {"y": (0, 255), "n": (-(1 << 15), (1 << 15) - 1), "q": (0, 65535), "i": (-(1 << 31), (1 << 31) - 1)}
_INTEGERS |= {"u": (0, (1 << 32) - 1), "x": (-(1 << 63), (1 << 63) - 1), "t": (0, (1 << 64) - 1), "h": (0, 15)}
_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
_BASIC: list[Typed] = [(code, st.integers(*bounds)) for code, bounds in _INTEGERS.items()]
_BASIC += [("b", st.booleans()), ("d", st.floats(allow_nan=False)), ("s", _TEXT)]
_BASIC += [("o", st.sampled_from(["/", "/a/b_1"])), ("g", st.sampled_from(["", "a{sv}", "(ii)s"]))]


def _containers(types: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    def array(element: Typed) -> Typed:
        signature, values = element
        return "a" + signature, st.binary(max_size=8) if signature == "y" else st.lists(values, max_size=3)

    def struct_(members: list[Typed]) -> Typed:
        return "(" + "".join(m[0] for m in members) + ")", st.tuples(*(m[1] for m in members)).map(list)

    def dictionary(entry: tuple[Typed, Typed]) -> Typed:
        (key, keys), (value, values) = entry
        return f"a{{{key}{value}}}", st.dictionaries(keys, values, max_size=3)

    return st.one_of(
        types.map(array),
        st.lists(types, min_size=1, max_size=3).map(struct_),
        st.tuples(st.sampled_from(_BASIC), types).map(dictionary),
    )


_TYPES = st.recursive(st.sampled_from(_BASIC), _containers, max_leaves=6)


@st.composite
def bodies(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[str, list[Any]]:
    types: list[Typed] = draw(st.lists(_TYPES, min_size=1, max_size=3))
    return "".join(signature for signature, _ in types), [draw(values) for _, values in types]


@given(bodies())
def test_any_value_crosses_from_library_to_library(typed: tuple[str, list[Any]]) -> None:
    message = signal(*typed, unix_fds=16)
    encoded = [CODECS[library].encode(message) for library in LIBRARIES]
    assert encoded[0] == encoded[1]
    for encoder, decoder in zip(LIBRARIES, reversed(LIBRARIES), strict=True):
        assert round_trip(CODECS[encoder], CODECS[decoder], message) == message.body


@given(bodies(), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bodies_decode_alike_or_not_at_all(
    typed: tuple[str, list[Any]], changes: list[tuple[int, int]]
) -> None:
    body = bytearray(CODECS["dbus-next"].encode(signal(*typed, unix_fds=16)))
    header = parse_header(body)
    assert header is not None
    for position, value in changes:
        body[-1 - position % header.body_length] = value
    results = [_decoded(CODECS[library], bytes(body), header) for library in LIBRARIES]
    assert results[0] == results[1]


@given(_TYPES, st.binary(min_size=1, max_size=200))
def test_noise_decodes_alike_or_not_at_all(type_: Typed, noise: bytes) -> None:
    raw, header = raw_body("v" + type_[0], noise, unix_fds=16)
    results = [_decoded(CODECS[library], raw, header) for library in LIBRARIES]
    assert results[0] == results[1]


def _decoded(codec: ModuleType, raw: bytes, header: Header) -> Any:
    try:
        return _comparable(codec.decode_body(raw, header))
    except ProtocolError:
        return ProtocolError


def _comparable(value: Any) -> Any:
    """Values of both libraries in a form in which they compare; NaN by name."""
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if isinstance(value, dict):
        return [(_comparable(key), _comparable(item)) for key, item in value.items()]
    if hasattr(value, "signature"):
        return ("v", value.signature, _comparable(value.value))
    return "NaN" if isinstance(value, float) and math.isnan(value) else value
