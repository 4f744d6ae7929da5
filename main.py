"""Command-line entry point: ``python main.py COMMAND [options]``; see :mod:`commands`."""

import sys

from commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]

if __name__ == "__main__":
    sys.exit(main())
