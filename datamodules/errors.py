"""Errors caused by the user's input, and the text of other errors on one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a command, a config or a file that the user can fix.

    ``main`` prints the message on one line, without a traceback, and exits with status 2. The message names the option,
    its value, the problem and the fix.
    """


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """Returns an error's text on one line.

    Args:
        error: the error, or its text.
        limit: largest number of characters; the rest is cut off.

    Returns:
        The text with each run of whitespace replaced by one space; the name of the error's class if it has no text.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]
