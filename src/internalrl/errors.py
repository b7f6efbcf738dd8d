"""The one exception for mistakes a user can correct."""

from __future__ import annotations


class InternalRLError(Exception):
    """A mistake in the input, a file or the machine, told in one sentence.

    The sentence says what was wrong, what was expected and what to do. The command line prints it alone,
    without a traceback, and exits with code 2.
    """


class OptionError(ValueError):
    """A value that an option must not have; the text begins with the option's own name.

    A config does not know what it is nested in. Whoever does, a YAML file's reader or the command line, puts that in
    front, so that the option is named as it was typed: `--base.heads is 3; ...`.
    """

    def __init__(self, option: str, complaint: str):
        super().__init__(f"{option} {complaint}")
        self.option, self.complaint = option, complaint
