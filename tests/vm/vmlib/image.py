# SPDX-License-Identifier: MIT
"""The guest's root file system: Debian 13 made from the lists in image/, without a kernel. See vmlib/kernel.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

from . import host
from .cache import cache_root, cached, digest
from .chroot import run_in_root
from .report import Report, VmError, run_step

SUITE = "trixie"
IMAGES_KEPT = 2
# Raise when what this module does to the image changes.
RECIPE_VERSION = b"1"
ROOT_SIZE = "8G"
SWAP_BYTES = 1 << 30
SITE_PACKAGES = "/usr/local/lib/python3.13/dist-packages"

RECIPE = Path(__file__).parent.parent / "image"
PACKAGES, PYPI, CUSTOMIZE = RECIPE / "packages", RECIPE / "pypi", RECIPE / "customize"

DEBSTRAP_HINT = (
    "If a package could not be found or fetched: does `apt-get update` work on this machine, and does its mirror have "
    f"the suite {SUITE}? The list of packages is {PACKAGES}."
)


def read_list(path: Path) -> list[str]:
    """The words of a list file: one a line, comments after '#'."""
    lines = (line.split("#", 1)[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def get_image(report: Report) -> Path:
    """The image's directory: root/ (the files), root.img (ext4), swap.img; made if the recipe is new (minutes)."""
    recipe = [RECIPE_VERSION, " ".join(read_list(PACKAGES)).encode(), " ".join(read_list(PYPI)).encode()]
    key = digest([*recipe, CUSTOMIZE.read_bytes()])
    return cached(report, cache_root() / "images", key, IMAGES_KEPT, lambda target: _make(report, target))


def _make(report: Report, target: Path) -> None:
    report.say("making the guest's image, once: some 3 minutes and 5 GB on the disk")
    root = target / "root"
    # Mirrors of this machine where it has some, otherwise mmdebstrap's own default.
    mirrors = host.archive_mirrors()
    sources = []
    if "main" in mirrors:
        sources.append(f"deb {mirrors['main']} {SUITE} main")
    if sources and "security" in mirrors:
        sources.append(f"deb {mirrors['security']} {SUITE}-security main")
    # in a mount namespace of its own: what it mounts vanishes with it, however it ends
    argv: list[str | Path] = [
        "unshare",
        "--mount",
        "mmdebstrap",
        "--variant=minbase",
        f"--include={','.join(read_list(PACKAGES))}",
    ]
    argv += ["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    argv += [f"--customize-hook=cp '{CUSTOMIZE}' \"$1/customize\"", '--customize-hook=chroot "$1" sh /customize']
    argv += ['--customize-hook=rm "$1/customize"', SUITE, root, *sources]
    run_step(report, "mmdebstrap: Debian 13 with the packages of image/packages", argv, hint=DEBSTRAP_HINT)
    built = target / "pypi"
    built.mkdir()
    run_in_root(
        report,
        f"pip: {', '.join(read_list(PYPI))}",
        root,
        ["pip", "install", "--no-deps", "--target=/out", *read_list(PYPI)],
        {"/out": built},
        hint="Does `pip download` reach a package index on this machine?",
    )
    site = root / SITE_PACKAGES.lstrip("/")
    site.mkdir(parents=True, exist_ok=True)
    for entry in built.iterdir():
        entry.rename(site / entry.name)
    built.rmdir()
    make_ext4(report, "mke2fs: the root file system", root, target / "root.img", ROOT_SIZE)
    swap = target / "swap.img"
    with open(swap, "wb") as file:
        file.truncate(SWAP_BYTES)
    swap.chmod(0o600)
    subprocess.run(["mkswap", "--quiet", swap], check=True, stdout=subprocess.DEVNULL)


def make_ext4(report: Report, what: str, tree: Path, image: Path, size: str) -> None:
    """Packs tree into a sparse ext4 image of that size; no journal, because no guest ever writes it back."""
    with open(image, "wb"):
        pass
    argv: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
    run_step(report, what, [*argv, "-d", tree, image, size], hint="Is the disk full? See df.")
    if not image.stat().st_size:
        raise VmError(f"{image}: mke2fs made nothing")
