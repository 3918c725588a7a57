# SPDX-License-Identifier: MIT
"""A D-Bus interface, read from its introspection XML: what the daemon dispatches from and the client checks against.

Where the document comes from is left to the caller; it must be one's own, for nothing here is safe against a peer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

DOC: Final = "org.gtk.GDBus.DocString"
EMITS_CHANGED: Final = "org.freedesktop.DBus.Property.EmitsChangedSignal"


@dataclass(frozen=True, slots=True)
class Method:
    """Signatures of the arguments in and out."""

    name: str
    in_signature: str
    out_signature: str


@dataclass(frozen=True, slots=True)
class Property:
    """Type, whether it may be written, what a change announces (true, invalidates, const, false), and its meaning."""

    name: str
    signature: str
    writable: bool
    emits: str
    doc: str


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface: its members by name (signals: their signatures), and its element of an introspection document."""

    name: str
    methods: dict[str, Method]
    properties: dict[str, Property]
    signals: dict[str, str]
    element: str


def parse(document: str, name: str) -> Interface:
    """Read the interface `name` from `document`. Raises ValueError when the document does not describe it."""
    root = ET.fromstring(document)  # noqa: S314 (the caller's own)
    element = next((e for e in root.findall("interface") if e.get("name") == name), None)
    if element is None:
        raise ValueError(f"the XML does not describe {name}")
    element.tail = "\n"
    return Interface(
        name,
        methods={
            m.attrib["name"]: Method(m.attrib["name"], _arguments(m, "in"), _arguments(m, "out"))
            for m in element.findall("method")
        },
        properties={p.attrib["name"]: _property(p) for p in element.findall("property")},
        signals={s.attrib["name"]: _arguments(s, "out") for s in element.findall("signal")},
        element=ET.tostring(element, encoding="unicode"),
    )


def _arguments(member: ET.Element, direction: str) -> str:
    # The specification's defaults: in for a method's argument, out for a signal's.
    default = "out" if member.tag == "signal" else "in"
    return "".join(a.attrib["type"] for a in member.findall("arg") if a.get("direction", default) == direction)


def _property(element: ET.Element) -> Property:
    annotations = {a.attrib["name"]: a.attrib["value"] for a in element.findall("annotation")}
    return Property(
        element.attrib["name"],
        element.attrib["type"],
        "write" in element.attrib["access"],
        annotations.get(EMITS_CHANGED, "true"),
        annotations.get(DOC, ""),
    )
