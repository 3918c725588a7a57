# SPDX-License-Identifier: MIT
"""What the C compiler makes of the kernel's headers: numbers, sizes and offsets, to compare ours with."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path


def values(header: str, expressions: Iterable[str], folder: Path) -> dict[str, int]:
    """Return what each C expression is, unsigned, where `header` is included."""
    lines = "\n".join(f'printf("%s %llu\\n", "{one}", (unsigned long long)({one}));' for one in expressions)
    source, program = folder / "values.c", folder / "values"
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <{header}>\nint main(void)\n{{\n{lines}\nreturn 0;\n}}\n"
    )
    subprocess.run(["gcc", "-I/usr/include/libdrm", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: int(value) for name, _, value in (line.rpartition(" ") for line in printed.splitlines())}


def layout(structures: Mapping[str, type[ctypes.Structure]]) -> dict[str, int]:
    """Return the size of each structure by its C expression, and the offset of each member that has C's name."""
    known = {}
    for name, structure in structures.items():
        known[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for member, *_ in structure._fields_:
            known[f"offsetof(struct {name}, {member})"] = getattr(structure, member).offset
    return known
