# SPDX-License-Identifier: MIT
"""udmabufctl's arguments: what is accepted, what is not, what it costs to find out, and that help teaches."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from udmabufd_client import cli
from udmabufd_client.cli import explain, main, make_parser
from udmabufd_client.cli.buffer_id import Named, parse_buffer, parse_named
from udmabufd_client.cli.constraint import parse_constraint, parse_size
from udmabufd_client.contract import BUFFER_PATH_PREFIX, SPEC_KEYS
from udmabufd_client.spec import marshal_spec

VERBS = [
    "alloc",
    "explain",
    "list",
    "top",
    "info",
    "verify",
    "move",
    "evict",
    "release",
    "devices",
    "allocators",
    "limits",
    "drain",
    "recover",
]

FLAGS = {"devices": "--device", "constraints": "--constraint"}
"""Options that are given once for each."""


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


def test_the_verbs_are_those_of_the_manual() -> None:
    parser = make_parser()
    assert list(verbs_of(parser)) == VERBS
    for each in (parser, *verbs_of(parser).values()):
        assert each.description
        assert each.epilog
        assert "udmabufctl " in each.epilog
        # It is kept line by line, on terminals of 80 columns and in the manual page.
        assert max(map(len, each.epilog.splitlines())) <= 78


@pytest.mark.parametrize(("verb", "without"), [("alloc", set()), ("explain", {"name", "request_id"})])
def test_every_key_of_spec_is_an_option(verb: str, without: set[str]) -> None:
    options = verbs_of(make_parser())[verb]._option_string_actions
    for key, known in SPEC_KEYS.items():
        flag = FLAGS.get(key, "--" + key.replace("_", "-"))
        if key in without:
            assert flag not in options
            continue
        action = options[flag]
        assert action.dest == key
        assert known.meaning in str(action.help)


def test_general_options_stand_on_either_side_of_the_verb() -> None:
    parser = make_parser()
    for words in (
        ["--json", "--bus", "session", "--timeout", "3", "list"],
        ["list", "--json", "--bus", "session", "--timeout", "3"],
    ):
        arguments = parser.parse_args(words)
        assert (arguments.json, arguments.bus, arguments.timeout) == (True, "session", 3.0)
    plain = parser.parse_args(["list"])
    assert (plain.json, plain.bus, plain.timeout) == (False, "system", None)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["list"], 25.0),
        (["move", "0" * 16], 120.0),
        (["evict", "0" * 16], 120.0),
        (["drain", "udmabuf"], 3600.0),
        (["drain", "udmabuf", "--timeout", "25"], 25.0),
        (["--timeout", "25", "drain", "udmabuf"], 25.0),
    ],
)
def test_a_verb_that_takes_long_has_patience_unless_told_otherwise(
    words: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    verb = next(word for word in words if word in VERBS)
    module = {each.VERB: each for each in cli._VERBS}[verb]

    def run(arguments: argparse.Namespace) -> int:
        found.append(arguments.timeout)
        return 0

    monkeypatch.setattr(module, "run", run)
    assert main(words) == 0
    assert found == [seconds]
    assert f"(default: {getattr(module, 'TIMEOUT', 25):g}, at most" in verbs_of(make_parser())[verb].format_help()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "VERB"),
        (["paint"], "invalid choice"),
        (["list", "--timeout", "0"], "invalid number of seconds"),
        (["list", "--timeout", "nan"], "invalid number of seconds"),
        (["list", "--timeout", "soon"], "invalid number of seconds"),
        (["list", "--timeout", "86400.1"], "at most 86400"),
        (["--timeout", "1e300", "release", "0" * 16], "at most 86400"),
        (["alloc", "--size", "-5"], "--size"),
        (["alloc", "--size", "5X"], "invalid size"),
        (["alloc", "--kind", "shm"], "--kind"),
        (["alloc", "--hold", "--background"], "not allowed with"),
        (["alloc", "--hold", "--", "true"], "without a COMMAND"),
        (["alloc", "--size", "4K", "true"], 'put "--" before COMMAND'),
        (["alloc", "--size", "4K", "--"], "COMMAND is missing"),
        (["alloc", "--size", "4K", "--dynamic", "--device", "mem:null"], "add --hold or --background"),
        (["alloc", "--size", "4K", "--dynamic", "--hold"], "add --device"),
        (["alloc", "--size", "4K", "--dynamic", "--device", "mem:null", "--", "true"], "without a COMMAND"),
        (["move"], "BUFFER"),
        (["move", "1920x1080"], "invalid buffer id, path or ticket"),
        (["evict", "0" * 31], "invalid buffer id, path or ticket"),
        (["drain"], "ALLOCATOR"),
        (["list", "--", "true"], "only alloc"),
        (["info"], "BUFFER"),
        (["info", "xyz"], "invalid buffer id or path"),
        (["release"], "BUFFER"),
        (["top", "-n", "0"], "invalid number of refreshes"),
        (["top", "--interval", "0.01"], "invalid number of seconds"),
        (["top", "--interval", "inf"], "invalid number of seconds"),
        (["top", "--sort", "colour"], "--sort"),
        (["explain"], "say what is wanted"),
        (["explain", "1920x1080"], "say what is wanted"),
        (["explain", "--format", "NV12"], "say what is wanted"),
        (["explain", "--format", "NV12", "1920"], "invalid picture size, WIDTHxHEIGHT"),
        (["explain", "--format", "NV12", "--width", "3", "1920x1080"], "without --width"),
        (["explain", "--size", "4K", "--constraint", "colour=1"], "no such constraint: 'colour'; there are address_"),
        (["explain", "--size", "4K", "--constraint", "max_segments"], "max_segments needs a value"),
        (["explain", "--size", "4K", "--constraint", "cache="], "cache needs a value"),
        (["alloc", "--size", "4K", "--constraint", "alignment=big"], "alignment: invalid number: 'big'"),
        (["alloc", "--size", "4K", "--constraint", "contiguous=1"], "contiguous stands alone"),
        (["alloc", "--constraint", "contiguous=no", "--constraint", "contiguous"], "contiguous is given twice"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4k", 4096), ("8M", 8 << 20), ("8MiB", 8 << 20), ("1G", 1 << 30), ("2T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("max_segments=8", ("max_segments", 8)),
        ("max-segments=8", ("max_segments", 8)),
        ("alignment=64K", ("alignment", 65536)),
        ("contiguous", ("contiguous", True)),
        ("contiguous=yes", ("contiguous", True)),
        ("contiguous=no", ("contiguous", False)),
        ("cache=write-combine,uncached", ("cache", ["write-combine", "uncached"])),
        ("allocators=heap:*", ("allocators", ["heap:*"])),
    ],
)
def test_constraints_as_they_are_typed(text: str, constraint: tuple[str, object]) -> None:
    assert parse_constraint(text) == constraint
    key, value = constraint
    # What leaves is of the contract's type.
    assert marshal_spec({"constraints": {key: value}}, {})["constraints"].value[key].value == value


def test_what_is_typed_becomes_a_spec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["explain", "--device", "./node", "--device", "drm:card0", "--format", "NV12", "1920x1080"]
    words += ["--constraint", "contiguous", "--constraint", "address-bits=32", "--cache-policy", "require"]
    arguments = make_parser().parse_args(words)
    assert explain.spec(arguments) == {
        "width": 1920,
        "height": 1080,
        "format": "NV12",
        "cache_policy": "require",
        # The service does not know this directory, and is never given a path that depends on it.
        "devices": [str(tmp_path / "node"), "drm:card0"],
        "constraints": {"contiguous": True, "address_bits": 32},
    }


def test_a_buffer_is_named_by_id_or_path() -> None:
    assert (
        parse_buffer("0123456789ABCDEF") == parse_buffer(BUFFER_PATH_PREFIX + "0123456789abcdef") == "0123456789abcdef"
    )
    assert parse_named(BUFFER_PATH_PREFIX + "0123456789ABCDEF") == Named(id="0123456789abcdef")
    assert parse_named("0123456789ABCDEF" * 2) == Named(ticket="0123456789abcdef" * 2)


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_comes_at_once_and_fits(words: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "COLUMNS": "80"}
    code = (
        "import sys, atexit; from udmabufd_client.cli import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "main(sys.argv[1:])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True, env=environment
    )
    assert "examples:" in run.stdout
    loaded = set(run.stderr.split())
    assert "udmabufd_client.cli" in loaded
    assert not loaded & {"asyncio", "socket", "dbus_next", "dbus_fast", "udmabufd_base", "subprocess"}


def test_an_unreachable_bus_is_status_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bus", "unix:path=/nonexistent/bus", "list"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("udmabufctl: The bus 'unix:path=/nonexistent/bus' cannot be reached")
    assert said.err.count("\n") == 1


def test_a_bad_address_is_status_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bus", "nonsense", "limits"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
