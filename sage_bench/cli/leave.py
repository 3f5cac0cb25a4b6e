"""How the command line tells of an error: one line on standard error and the documented exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

from sage_core.errors import SageError


def leave(error: SageError) -> NoReturn:
    """Print what went wrong, whose fault it was follows from the exit code, and exit."""
    print(f"sage: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
