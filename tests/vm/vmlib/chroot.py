# SPDX-License-Identifier: MIT
"""Runs programs of the image natively, in a throw-away overlay of its root file system, with the host's network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import host
from .report import Report, run_step

SCRIPT = Path(__file__).parent.parent / "image" / "throwaway-root"


def run_in_root(
    report: Report, what: str, root: Path, argv: Sequence[str], shared: dict[str, Path], *, hint: str = ""
) -> None:
    """Runs argv in the image's root; only what it writes below the paths in shared (path there -> here) stays.

    Raises VmError with the end of its output if it fails.
    """
    binds = [(here, there, "ro") for here, there in host.pip_files()]
    binds += [(here, there, "rw") for there, here in shared.items()]
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    environment |= {"LANG": "C.UTF-8", "PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_CACHE_DIR": "1"}
    environment |= host.pip_environment()
    with tempfile.TemporaryDirectory(prefix="udmabufd-vm-root-") as work:
        listing = Path(work) / "binds"
        listing.write_text("".join(f"{here}\t{there}\t{mode}\n" for here, there, mode in binds))
        mounts = Path(work) / "mounts"
        mounts.mkdir()
        enter: list[str | Path] = ["unshare", "--mount", "bash", SCRIPT, root, mounts, listing]
        enter += ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in environment.items())]
        run_step(report, what, [*enter, *argv], hint=hint)
