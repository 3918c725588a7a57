# SPDX-License-Identifier: MIT
"""The host: root rights, Debian packages, its archive mirrors, and how its pip reaches a package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .report import Report, VmError, run_step

# program that must be there -> Debian package that brings it
NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "mkswap": "util-linux",
    "unshare": "util-linux",
    "git": "git",
}
ARCHIVE_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
# What a process needs from the environment to reach a package index the way the host's own pip does.
NETWORK_VARIABLES = re.compile(r"(PIP_\w+|\w+_proxy|\w+_PROXY|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)")


def become_root() -> None:
    """Returns as root, if need be by starting the same command again with sudo."""
    if os.geteuid() == 0:
        return
    if not shutil.which("sudo"):
        raise VmError("making the image and sharing folders need root: run this as root, or install sudo")
    keep = [f"{name}={value}" for name, value in os.environ.items() if NETWORK_VARIABLES.fullmatch(name)]
    keep.append(f"XDG_CACHE_HOME={os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'}")
    os.execvp("sudo", ["sudo", "env", *keep, sys.executable, *sys.argv])


def need_packages(report: Report) -> None:
    """Installs what is missing on the host by apt-get, and says so."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    missing = {package for program, package in NEEDED.items() if not shutil.which(program)}
    if not ARCHIVE_KEYS.exists():
        missing.add("debian-archive-keyring")
    if not missing:
        return
    names = sorted(missing)
    if not shutil.which("apt-get"):
        raise VmError(f"needed on this machine, which has no apt-get to get them: {' '.join(names)}")
    hint = f"Install by hand: {' '.join(names)}"
    run_step(report, "apt-get update", ["apt-get", "-q", "update"], hint=hint)
    install = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y", "--no-install-recommends", "install"]
    run_step(report, f"installing on this machine: {' '.join(names)}", [*install, *names], hint=hint)


def archive_mirrors() -> dict[str, str]:
    """The mirrors that this machine's apt uses: "main" for Debian's archive, "security" for its updates, if known."""
    fields = "$(LABEL)|$(SUITE)|$(REPO_URI)"
    try:
        listed = subprocess.run(
            ["apt-get", "indextargets", "--format", fields, "Created-By: Packages", "Origin: Debian"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    mirrors: dict[str, str] = {}
    for line in listed.splitlines():
        label, suite, uri = line.split("|", 2)
        if suite.endswith("-security"):
            mirrors.setdefault("security", uri)
        elif label == "Debian":
            mirrors.setdefault("main", uri)
    return mirrors


def pip_environment() -> dict[str, str]:
    """The variables by which this machine's pip and its TLS library are configured."""
    return {name: value for name, value in os.environ.items() if NETWORK_VARIABLES.fullmatch(name)}


def pip_files() -> list[tuple[Path, str]]:
    """(path here, path in the chroot) of what the host's pip and resolver read: configuration and what it names."""
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    configs = [
        (Path("/etc/pip.conf"), "/etc/pip.conf"),
        (Path.home() / ".pip/pip.conf", "/root/.pip/pip.conf"),
        (config_home / "pip/pip.conf", "/root/.config/pip/pip.conf"),
        (Path("/etc/resolv.conf"), "/etc/resolv.conf"),
        (Path("/etc/hosts"), "/etc/hosts"),
    ]
    found = [(here.resolve(), there) for here, there in configs if here.exists()]
    texts = list(pip_environment().values())
    texts += [here.read_text() for here, there in found if there.endswith("pip.conf")]
    named = {path for text in texts for path in paths_in(text)}
    return found + [(path, str(path)) for path in sorted(named)]


def paths_in(text: str) -> Iterator[Path]:
    """The existing absolute paths among text's words; of an index (file:///…/simple) also the folder beside it."""
    for url_path, bare_path in re.findall(r"file://(/\S+)|(?<!\S)(/\S+)", text):
        path = Path(bare_path or url_path)
        if path.name == "simple":
            path = path.parent
        if path.exists():
            yield path
