# SPDX-License-Identifier: MIT
"""`python -m udmabufd_client.cli` is udmabufctl; all else is in the package."""

import sys

from udmabufd_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
