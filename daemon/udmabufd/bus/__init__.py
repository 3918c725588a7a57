# SPDX-License-Identifier: MIT
"""The D-Bus edge: who calls, what the XML allows, how answers and errors travel. Holds no decision of its own."""
