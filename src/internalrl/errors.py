"""The one exception for mistakes a user can correct."""

from __future__ import annotations


class InternalRLError(Exception):
    """A mistake in the input, a file or the machine, told in one sentence.

    The sentence says what was wrong, what was expected and what to do. The command line prints it alone,
    without a traceback, and exits with code 2.
    """
