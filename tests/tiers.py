# SPDX-License-Identifier: MIT
"""Runs every test of the project: installs what they need, then tier by tier, with one summary at the end.

Two tiers run at a time, each of which keeps about one processor busy. What a tier says is shown in one piece when it
is over. What is tested, and how, is left to the commands of the tiers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from vm.vmlib.host import need_packages
from vm.vmlib.report import Report, VmError

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"

DESCRIPTION = """\
Installs what the tests need (Debian packages by apt, Python packages into .venv), then runs them tier by tier, two at
a time: the checks and the longest tiers begin first. What a tier says is shown when it is over; one that runs alone
(--tier) is shown as it runs:

  checks             linters, types, import direction, unit files, manual pages, packaging
  unit               what needs neither a bus nor a kernel interface
  bus (LIBRARY)      a private dbus-daemon with the system bus's limits and our policy; once per D-Bus library
  guest (BUS)        real kernel, systemd and Weston in the emulated machine of tests/vm/run, once per system bus:
                     dbus-daemon with dbus-next and init_on_alloc=0, dbus-broker with dbus-fast
  guest (nopat)      the same, booted without page attribute tables: what depends on them
  guest (moves)      buffers that move and are evicted, and random histories of the service, by themselves
"""

EPILOG = """\
examples:
  tests/run                  everything: the command that CI runs
  tests/run --fast           without the guest: some minutes
  tests/run --long           with the full counts of the tests that name two
  tests/run --tier checks    one tier, or all of that first word; may be given several times
  tests/run --tier 'guest (nopat)'
  tests/run -- -k ticket     further arguments for pytest

The exit status is 0 when every test passed and none was skipped.
"""

PACKAGES = {
    # Debian package: a file that shows that it is there.
    "python3-venv": "/usr/lib/python3*/ensurepip",
    "python3-pip": "/usr/lib/python3/dist-packages/pip",  # systemd/install takes the system's
    "python3-dev": "/usr/include/python3*/Python.h",
    "gcc": "/usr/bin/gcc",
    "libcap-dev": "/usr/include/sys/capability.h",  # python-prctl is compiled
    "linux-libc-dev": "/usr/include/linux/udmabuf.h",
    "libudev1": "/usr/lib/*/libudev.so.1",
    "dbus": "/usr/bin/dbus-daemon",
    "systemd": "/usr/bin/systemd-analyze",
    "git": "/usr/bin/git",
    "man-db": "/usr/bin/man",
    "groff": "/usr/bin/groff",
    "mandoc": "/usr/bin/mandoc",
    "shellcheck": "/usr/bin/shellcheck",
}

NO_TEST_CHOSEN = 5
"""pytest's exit status when nothing was left to run."""

LIBRARIES = ("dbus-next", "dbus-fast")

AT_A_TIME = 2
"""Tiers that run at the same time."""

SILENCE = 60.0
"""Seconds without a word after which is said what is running."""

_output = threading.Lock()


@dataclass
class Tier:
    """A part of the run: a command that leaves JUnit files in the folder `results`, and what they told."""

    name: str
    minutes: float
    """About how long it takes with the usual counts, which decides when it begins."""
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    choosy: bool = False
    """Whether arguments chose among the tests, so that a tier may have none to run."""
    began: float | None = None
    seconds: float = 0.0
    status: int | None = None
    """Exit status of the command; None before it is over."""
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def run(self, results: Path, output: TextIO | None = None) -> None:
        """Run the command and count its results; what it says goes to `output`, or to our own."""
        results.mkdir()
        print(f"\n=== {self.name}: {' '.join(self.command)}", file=output, flush=True)
        self.began = time.monotonic()
        command = [word.replace("{results}", str(results)) for word in self.command]
        strict = {"UDMABUFD_STRICT": "1", "PYTHONUNBUFFERED": "1"}
        self.status = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | strict | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            check=False,
        ).returncode
        self.seconds = time.monotonic() - self.began
        for file in sorted(results.glob("*.xml")):
            try:
                self._count(ET.parse(file).getroot())
            except ET.ParseError as error:
                self.status = self.status or 1
                print(f"{self.name}: the results in {file.name} are not whole: {error}", file=output, flush=True)
        if self.status == NO_TEST_CHOSEN and self.choosy:
            self.status = 0
        elif self.status == 0 and self.passed == 0:
            self.status = 1
            print(f"{self.name}: no test was run", file=output, flush=True)

    def run_aside(self, results: Path) -> None:
        """Run beside other tiers: what it says is shown in one piece when it is over."""
        say(f"=== {self.name} begins")
        log = results.with_suffix(".log")
        try:
            with open(log, "w", encoding="utf-8") as output:
                self.run(results, output)
        finally:
            say(log.read_text(encoding="utf-8", errors="replace"))

    def _count(self, results: ET.Element) -> None:
        for suite in results.iter("testsuite"):
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            self.failed += bad
            self.skipped += skipped
            self.passed += int(suite.get("tests", 0)) - bad - skipped

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return self.status == 0 and self.failed == 0


def main() -> int:
    """Install, run, sum up."""
    arguments, extra = parse(sys.argv[1:])
    started = time.monotonic()
    install_packages()
    python = make_venv()
    tiers = [tier for tier in all_tiers(arguments, python, extra) if wanted(tier, arguments)]
    if not tiers:
        print(f"tests/run: no tier is called {', '.join(arguments.tier)}; see --help", file=sys.stderr)
        return 2
    if any(is_guest(tier) for tier in tiers):
        install_for_guests()
    with tempfile.TemporaryDirectory(prefix="udmabufd-tests-") as results:
        run_all(tiers, Path(results))
    sum_up(tiers, time.monotonic() - started)
    if not any(tier.passed for tier in tiers):
        print("tests/run: no test was run", file=sys.stderr)
        return 1
    return 0 if all(tier.ok for tier in tiers) else 1


def run_all(tiers: Sequence[Tier], results: Path) -> None:
    """Run `tiers`, AT_A_TIME together: the checks, which fail fast, then from the longest to the shortest."""
    if len(tiers) == 1:
        tiers[0].run(results / "0")
        return
    queue = sorted(tiers, key=lambda tier: (tier.name != "checks", -tier.minutes))
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        rest = {workers.submit(tier.run_aside, results / str(number)) for number, tier in enumerate(queue)}
        try:
            while rest:
                done, rest = wait(rest, SILENCE, FIRST_COMPLETED)
                for future in done:
                    future.result()
                if not done:
                    say(running(tiers))
        except BaseException:
            # Interrupted, or broken: what has not begun is not to begin.
            workers.shutdown(cancel_futures=True)
            raise


def running(tiers: Sequence[Tier]) -> str:
    """Return a line that says which of `tiers` are running, and for how long."""
    now = time.monotonic()
    lasting = [(tier.name, now - tier.began) for tier in tiers if tier.began is not None and tier.status is None]
    return "... " + ", ".join(f"{name} has run for {seconds / 60:.0f} min" for name, seconds in lasting)


def say(text: str) -> None:
    """Print `text`, in one piece beside what other threads say."""
    with _output:
        print(text, flush=True)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and those that follow `--`."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="tests/run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fast", action="store_true", help="leave the guest out")
    parser.add_argument("--long", action="store_true", help="take the full counts where a test names two")
    parser.add_argument("--tier", action="append", default=[], metavar="NAME", help="run this tier, by its first word")
    return parser.parse_args(own), extra


def install_packages() -> None:
    """Install the Debian packages that are missing."""
    missing = [name for name, proof in PACKAGES.items() if not list(Path("/").glob(proof.lstrip("/")))]
    if not missing:
        return
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if not shutil.which("apt-get") or (sudo and not shutil.which("sudo")):
        sys.exit(f"tests/run: install these first (they are Debian's names): {' '.join(missing)}")
    print(f"=== installing Debian packages: {' '.join(missing)}", flush=True)
    subprocess.run([*sudo, "apt-get", "update", "-q"], check=True)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]
    subprocess.run([*sudo, *environment, *install, *missing], check=True)


def install_for_guests() -> None:
    """Install what tests/vm/run would install by itself: of two guests that begin together, one could not."""
    try:
        need_packages(Report())
    except VmError as error:
        sys.exit(f"tests/run: {error}")


def make_venv() -> str:
    """Make .venv with the project's dependencies, unless it is there already; return its Python."""
    python = VENV / "bin" / "python"
    recipe = VENV / "recipe"
    wanted_recipe = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if not recipe.exists() or recipe.read_text() != wanted_recipe:
        print("=== making .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-e", f"{ROOT}[daemon,fast,dev]", "build", "hatchling"], check=True)
        recipe.write_text(wanted_recipe)
    return str(python)


def all_tiers(arguments: argparse.Namespace, python: str, extra: list[str]) -> list[Tier]:
    """Return every tier, in the order of the summary."""
    path = f"{VENV / 'bin'}:{os.environ.get('PATH', '')}"
    common = {"PATH": path, "UDMABUFD_LONG": "1" if arguments.long else "0"}

    def pytest(*where: str) -> list[str]:
        return [python, "-m", "pytest", "-q", "--junitxml={results}/host.xml", *where, *extra]

    checks = "tests/unit/test_checks.py"
    tiers = [
        Tier("checks", 0.2, pytest(checks), common),
        Tier("unit", 7, pytest("tests/unit", "tests/system", "tests/vm", f"--ignore={checks}"), common),
    ]
    for library in LIBRARIES:
        tiers.append(Tier(f"bus ({library})", 2.5, pytest("tests/bus"), common | {"UDMABUFD_DBUS_LIBRARY": library}))
    seconds = str(3 * 3600 if arguments.long else 4200)
    # Once with a kernel that shows what was in memory before, otherwise as Debian boots it, and without page attribute
    # tables for what depends on them.
    for name, minutes, bus, options in (
        ("dbus-daemon", 31, "dbus-daemon", ["--append", "init_on_alloc=0"]),
        ("dbus-broker", 12, "dbus-broker", []),
        ("moves", 12, "dbus-daemon", []),
        ("nopat", 2.5, "dbus-daemon", ["--append", "nopat"]),
    ):
        guest = ["tests/vm/run", "--bus", bus, *options, "--timeout", seconds]
        inside = ["--share", "{results}", "--", "tests/guest-suite", name, common["UDMABUFD_LONG"], *extra]
        tiers.append(Tier(f"guest ({name})", minutes, [*guest, *inside], common))
    for tier in tiers:
        tier.choosy = bool(extra)
    return tiers


def wanted(tier: Tier, arguments: argparse.Namespace) -> bool:
    """Whether the options ask for `tier`."""
    word = tier.name.split()[0]
    if arguments.tier:
        return word in arguments.tier or tier.name in arguments.tier
    return not (arguments.fast and is_guest(tier))


def is_guest(tier: Tier) -> bool:
    """Whether `tier` needs the emulated machine."""
    return tier.name.startswith("guest ")


def sum_up(tiers: list[Tier], seconds: float) -> None:
    """Print the table of tiers, and the line that counts all tests."""
    print("\n=== summary")
    print(f"{'tier':<22}{'passed':>8}{'failed':>8}{'skipped':>9}{'time':>9}")
    for tier in tiers:
        verdict = "" if tier.ok else f"  FAILED (status {tier.status})"
        minutes = f"{int(tier.seconds) // 60}:{int(tier.seconds) % 60:02}"
        print(f"{tier.name:<22}{tier.passed:>8}{tier.failed:>8}{tier.skipped:>9}{minutes:>9}{verdict}")
    print(f"{'all, with set-up':<47}{int(seconds) // 60:>6}:{int(seconds) % 60:02}\n")
    failed = sum(tier.failed for tier in tiers) + sum(1 for tier in tiers if not tier.ok and not tier.failed)
    print(f"{sum(t.passed for t in tiers)} passed, {failed} failed, {sum(t.skipped for t in tiers)} skipped")


if __name__ == "__main__":
    sys.exit(main())
