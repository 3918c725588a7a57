# SPDX-License-Identifier: MIT
"""What this boot's kernel does to memory that it hands out or maps; what follows from it is left to the caller."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_CMDLINE: Final = Path("/proc/cmdline")
_CPUINFO: Final = Path("/proc/cpuinfo")
_MTRR: Final = Path("/proc/mtrr")

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
        parameters = _booleans(_words(cmdline))
    except OSError:
        return False
    if parameters.get("page_poison"):
        return False
    asked = parameters.get("init_on_alloc")
    if asked is not None:
        return asked
    return _setting("CONFIG_INIT_ON_ALLOC_DEFAULT_ON", _configs() if configs is None else configs) is True


def is_arm(machine: str | None = None) -> bool:
    """Return whether this `machine` (uname -m) is arm, of either width."""
    return (os.uname().machine if machine is None else machine).startswith(("aarch64", "arm"))


def write_combining(
    cmdline: Path = _CMDLINE,
    cpuinfo: Path = _CPUINFO,
    configs: Sequence[Path] | None = None,
    machine: str | None = None,
    release: str | None = None,
    mtrr: Path = _MTRR,
) -> bool:
    """Return whether a mapping that a driver asks to be write-combined is known to be: else it is uncached.

    arm has it always (pgprot_writecombine is normal non-cacheable memory there). On x86 it takes page attribute
    tables (arch/x86/mm/pat/memtype.c): processor with PAT, and with MTRR, without which kernels before 6.2 (`release`,
    uname -r) do not use it, nor where the firmware leaves MTRRs disabled, so that there must be one in `mtrr`; no
    `nopat` on the command line; no CONFIG_X86_PAT=n in the first of `configs` that can be read, by default those of
    zeroed_at_allocation(). What cannot be found out is False, and so is every other `machine` (uname -m).
    """
    machine = os.uname().machine if machine is None else machine
    if is_arm(machine):
        return True
    if not re.fullmatch(r"x86_64|i[3-6]86", machine):
        return False
    try:
        # An early parameter, which means what it says whatever its value is (do_early_param, init/main.c).
        if any(word.partition("=")[0] == "nopat" for word in _words(cmdline)):
            return False
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        # The file is there for whatever processor can have them. Enabled ones show only by what they are set to.
        if _before_6_2(os.uname().release if release is None else release) and not mtrr.read_bytes().strip():
            return False
    except OSError:
        return False
    if flags is None or not {"pat", "mtrr"} <= set(flags[1].split()):
        return False
    return _setting("CONFIG_X86_PAT", _configs() if configs is None else configs) is not False


def _before_6_2(release: str) -> bool:
    """Whether that is a kernel before 6.2; what is no such number might be one."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is None or (int(found[1]), int(found[2])) < (6, 2)


def _words(cmdline: Path) -> list[str]:
    """Return the words of a kernel's command line, without quotes.

    Split outside of quotes up to "--" (next_arg, lib/cmdline.c). Raises OSError.
    """
    text = cmdline.read_text(encoding="utf-8", errors="replace")
    words = [word.replace('"', "") for word in re.findall(r'(?:"[^"]*"?|[^\s"])+', text)]
    return words[: words.index("--")] if "--" in words else words


def _booleans(words: Sequence[str]) -> dict[str, bool]:
    """Return the parameters that are booleans, as the kernel reads them.

    The last counts, '-' is '_' in names (parameq, kernel/params.c), and a value that is none is as if not there.
    """
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        value = value.lower()
        if value.startswith((*_YES, *_NO)):
            found[name.replace("-", "_")] = value.startswith(_YES)
    return found


def _configs() -> list[Path]:
    release = os.uname().release
    return [Path(f"/boot/config-{release}"), Path(f"/lib/modules/{release}/config"), Path("/proc/config.gz")]


def _setting(name: str, configs: Sequence[Path]) -> bool | None:
    """Return whether the first of `configs` that can be read says `name`=y; None if none can be read."""
    for path in configs:
        try:
            data = path.read_bytes()
            text = gzip.decompress(data) if path.suffix == ".gz" else data
        except (OSError, EOFError, zlib.error):
            continue
        return f"{name}=y".encode() in text.splitlines()
    return None
