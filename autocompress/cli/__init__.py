"""The command line: thin, with progress, tables of at most 100 columns, and exit codes.

Exit codes: 0 done, 1 nothing fits the limits of `pick` or `solve`, or a search of a sweep failed,
2 bad input, 130 interrupted.
"""

from autocompress.cli import inspecting, searching, choosing, measuring, coding  # isort: skip
from autocompress.cli.program import main

# Importing a module adds its commands, in the order of --help.
COMMANDS = (inspecting, searching, choosing, measuring, coding)

__all__ = ["main"]
