# SPDX-License-Identifier: MIT
"""Bodies of D-Bus messages to bytes and back: the only module that touches the D-Bus library.

dbus-fast is taken where it can be imported, else dbus-next; the environment variable UDMABUFD_DBUS_LIBRARY
(`dbus-fast` or `dbus-next`) forces one of them. Only their marshalling is used: their connections lose themselves on
EAGAIN and leak descriptors. What differs between the two is levelled here; headers are message's business.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import typing
import warnings
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from udmabufd_base.errors import ProtocolError
from udmabufd_base.message import Header, Message, pack_header
from udmabufd_base.wire import ByteOrder, Reader, parse_signature

ENVIRONMENT: Final = "UDMABUFD_DBUS_LIBRARY"

_CACHE_LIMIT: Final = 256
"""Signatures that the library may remember; an entry can take 44 kB."""


def _choose() -> str:
    known = ("dbus-fast", "dbus-next")
    forced = os.environ.get(ENVIRONMENT, "")
    if forced and forced not in known:
        raise ImportError(f"{ENVIRONMENT}={forced!r} is not one of {', '.join(known)}")
    for name in (forced,) if forced else known:
        if importlib.util.find_spec(name.replace("-", "_")):
            return name
    raise ImportError(f"no D-Bus library: install {forced or 'dbus-next or dbus-fast'}")


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{_NAME.replace('-', '_')}.{name}")


_NAME: Final = _choose()
if _NAME == "dbus-next":
    with warnings.catch_warnings():
        # dbus-next 0.2.3 imports a decorator that Python 3.13 deprecates and 3.15 no longer has. It is the identity.
        warnings.simplefilter("ignore", DeprecationWarning)
        if not hasattr(typing, "no_type_check_decorator"):
            typing.no_type_check_decorator = lambda decorator: decorator
        _load("signature")

_signature = _load("signature")
_Marshaller = _load("_private.marshaller").Marshaller
_Unmarshaller = _load("_private.unmarshaller").Unmarshaller

LIBRARY: Final = f"{_NAME} {metadata.version(_NAME)}"
"""Name and version of the library in use."""

if TYPE_CHECKING:

    class Variant:
        """The library's class for `v`: a value together with its signature, which is one complete type."""

        signature: str
        value: Any

        def __init__(self, signature: str, value: Any) -> None: ...
else:
    Variant = _signature.Variant

if _NAME == "dbus-next":

    class _BoundedCache(dict[str, Any]):
        """What SignatureTree._get remembers: by itself it grows with every new signature that a peer sends."""

        def __setitem__(self, signature: str, tree: Any) -> None:
            if len(self) >= _CACHE_LIMIT:
                self.clear()
            super().__setitem__(signature, tree)

    _signature.SignatureTree._cache = _BoundedCache()
    _signature_tree = _signature.SignatureTree._get
else:
    _signature_tree = _signature.get_signature_tree


def encode(message: Message) -> bytes:
    """Return `message` as bytes, little-endian.

    Raises ValueError when the body does not match its signature, names an fd beyond `message.unix_fds`, or holds what
    D-Bus forbids, such as a NUL in a string: a bus would end the connection.
    """
    try:
        _signature_tree(message.signature).verify(message.body)
        body = bytes(_Marshaller(message.signature, message.body).marshall())
        _check(body, 0, message.signature, "little", message.unix_fds)
    except Exception as error:
        raise ValueError(f"the body does not match signature {message.signature!r}: {error}") from error
    return pack_header(message, len(body)) + body


def decode_body(raw: bytes, header: Header) -> list[Any]:
    """Return the values of the body of the whole message `raw`, one for each complete type of its signature.

    Structs and arrays come as list, `a{..}` as dict, `ay` as bytes, `v` as Variant, and `h` as the index into the fds
    of the message, which is below `header.unix_fds`. Takes up to about a microsecond for each byte: bound the size of
    what is decoded. Raises ProtocolError when the body does not match its signature.
    """
    if not header.body_length:
        return []
    start = header.total_length - header.body_length
    _check(raw, start, header.signature, header.byteorder, header.unix_fds)
    try:
        message = _Unmarshaller(io.BytesIO(_plain_header(header) + raw[start:])).unmarshall()
        body: list[Any] = _level(message.body)
    except Exception as error:
        raise ProtocolError(f"a body that does not match its signature {header.signature!r}") from error
    finally:
        _trim_cache()
    return body


def _check(raw: bytes, start: int, signature: str, byteorder: ByteOrder, max_fds: int) -> None:
    reader = Reader(raw, start, len(raw), byteorder, max_fds)
    for type_ in parse_signature(signature):
        reader.skip(type_)
    if reader.position != reader.end:
        raise ProtocolError(f"{reader.end - reader.position} bytes of body beyond signature {signature!r}")


def _plain_header(header: Header) -> bytes:
    """A header as short as can be: the libraries parse whole messages, and nothing but the body is wanted of them."""
    mark, order = (b"l", "<") if header.byteorder == "little" else (b"B", ">")
    signature = header.signature.encode()
    # REPLY_SERIAL (5), which a method return must have, and SIGNATURE (8).
    fields = struct.pack(order + "B2sxI", 5, b"\1u", 1) + b"\x08\x01g\0" + bytes((len(signature),)) + signature + b"\0"
    fixed = struct.pack(order + "cBBBIII", mark, 2, 0, 1, header.body_length, 1, len(fields))
    return fixed + fields + bytes(-len(fields) % 8)


def _level(value: Any) -> Any:
    """Turn what dbus-fast delivers as tuple and bytearray into what dbus-next delivers: list and bytes."""
    if isinstance(value, (list, tuple)):
        return [_level(item) for item in value]
    if isinstance(value, dict):
        return {key: _level(item) for key, item in value.items()}
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, Variant) and not isinstance(value.value, (str, int, float)):
        value.value = _level(value.value)
    return value


def _trim_cache() -> None:
    """Bound what dbus-fast remembers: 2.44 every signature there ever was, later ones 4096 of them."""
    if _NAME == "dbus-fast" and _signature_tree.cache_info().currsize > _CACHE_LIMIT:
        _signature_tree.cache_clear()
