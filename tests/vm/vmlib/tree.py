# SPDX-License-Identifier: MIT
"""The working tree as it is now: what git tracks and what it would, uncommitted changes included."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .cache import digest
from .report import Report, VmError

TOP = Path(__file__).resolve().parents[3]
# What cannot change what gets installed; everything else is part of the installation's key.
NOT_INSTALLED = ("tests/", ".")
LARGE_BYTES = 64 << 20


def tree_files(report: Report) -> list[Path]:
    """Paths of the working tree's files, relative to TOP, sorted. Without git: all but hidden ones at the top."""
    if (TOP / ".git").exists():
        # root looks at a clone that belongs to somebody else: git would refuse without safe.directory
        argv = ["git", "-c", "safe.directory=*", "-C", str(TOP), "ls-files", "-z"]
        argv += ["--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(argv, stdout=subprocess.PIPE)
        if listed.returncode:
            raise VmError(f"git cannot list the files of {TOP}")
        names = {os.fsdecode(name) for name in listed.stdout.split(b"\0") if name}
    else:
        found = (Path(folder, name).relative_to(TOP) for folder, _, names in os.walk(TOP) for name in names)
        names = {str(path) for path in found if not path.parts[0].startswith(".")}
    files = [path for path in sorted(map(Path, names)) if (TOP / path).is_symlink() or (TOP / path).is_file()]
    _warn_if_large(report, files)
    return files


def installed_key(files: list[Path]) -> str:
    """A hash over names, modes and contents of the files that an installation can depend on."""
    parts: list[bytes] = []
    for path in files:
        if str(path).startswith(NOT_INSTALLED):
            continue
        full = TOP / path
        content = os.fsencode(full.readlink()) if full.is_symlink() else full.read_bytes()
        parts += [os.fsencode(path), oct(full.lstat().st_mode).encode(), content]
    return digest(parts)


def copy_tree(files: list[Path], target: Path) -> None:
    """Copies the files into target."""
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TOP / path, target / path, follow_symlinks=False)


def _warn_if_large(report: Report, files: list[Path]) -> None:
    sizes: dict[str, int] = {}
    for path in files:
        sizes[path.parts[0]] = sizes.get(path.parts[0], 0) + (TOP / path).lstat().st_size
    if sum(sizes.values()) > LARGE_BYTES:
        largest = max(sizes, key=lambda top: sizes[top])
        report.say(
            f"the working tree has {sum(sizes.values()) >> 20} MiB ({largest}: {sizes[largest] >> 20}), all of which"
            " is unpacked in the guest; should .gitignore name something?"
        )
