# SPDX-License-Identifier: MIT
"""What this boot's kernel does to memory that it hands out; what follows from it is left to the caller."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_CMDLINE: Final = Path("/proc/cmdline")

_YES: Final = ("y", "1", "on")
_NO: Final = ("n", "f", "d", "0", "of")
"""What kstrtobool (lib/kstrtox.c) takes, by first characters; "t" and "e", which only newer kernels know for yes, are
left out: a doubt must not become a yes."""


def zeroed_at_allocation(cmdline: Path = _CMDLINE, configs: Sequence[Path] | None = None) -> bool:
    """Return whether every page is known to be zeroed when it is allocated, so that no page shows what it held before.

    Decided by init_on_alloc= on the command line, else by CONFIG_INIT_ON_ALLOC_DEFAULT_ON in the first of `configs`
    that can be read; by default /boot/config-*, the file beside the modules, and /proc/config.gz, for the running
    kernel. What cannot be found out is False, and so is a kernel told to poison pages, which then zeroes none
    (init_mem_debugging_and_hardening, mm/mm_init.c).
    """
    try:
        parameters = _parameters(cmdline.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False
    if parameters.get("page_poison"):
        return False
    asked = parameters.get("init_on_alloc")
    return _is_default(_configs() if configs is None else configs) if asked is None else asked


def _parameters(cmdline: str) -> dict[str, bool]:
    """Return the parameters of a kernel's command line that are booleans, as the kernel reads them.

    Split outside of quotes up to "--" (next_arg, lib/cmdline.c), the last counts, '-' is '_' in names (parameq,
    kernel/params.c), and a value that is none is as if not there.
    """
    found = {}
    for word in re.findall(r'(?:"[^"]*"?|[^\s"])+', cmdline):
        text = word.replace('"', "")
        if text == "--":
            break
        name, _, value = text.partition("=")
        value = value.lower()
        if value.startswith((*_YES, *_NO)):
            found[name.replace("-", "_")] = value.startswith(_YES)
    return found


def _configs() -> list[Path]:
    release = os.uname().release
    return [Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config"), Path("/proc/config.gz")]


def _is_default(configs: Sequence[Path]) -> bool:
    for path in configs:
        try:
            data = path.read_bytes()
            text = gzip.decompress(data) if path.suffix == ".gz" else data
        except (OSError, EOFError, zlib.error):
            continue
        return b"CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y" in text.splitlines()
    return False
