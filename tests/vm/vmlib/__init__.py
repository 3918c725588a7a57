# SPDX-License-Identifier: MIT
"""What tests/vm/run is made of. Standard library only: it runs before any virtual environment exists."""
