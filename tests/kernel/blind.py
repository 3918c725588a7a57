# SPDX-License-Identifier: MIT
"""A program: the service, but for constraints, which it takes and ignores. What test_pains.py must find out about.

Started as `python -m udmabufd` is, by tests.bus.service.own_service(). Everything else is the service's own code: the
first allocator in order serves whatever devices there are, and pictures are laid out for none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from udmabufd.core import constraints


def ignore(demands: Iterable[constraints.Demand]) -> constraints.Merged:
    """Say that nobody demands anything, to all that choose and lay out: in the place of merge()."""
    return constraints.Merged(constraints.NONE, {})


def main() -> int:
    """Replace it before any other module has it, and run the service."""
    users = [name for name in sys.modules if name.startswith(("udmabufd.core.", "udmabufd.bus."))]
    known = {"udmabufd.core.constraints", "udmabufd.core.errors"}
    assert known.issuperset(users), f"these have the true merge() already: {users}"
    constraints.merge = ignore
    from udmabufd.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
