"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in a command, a config or a file that the user can mend.

    ``main`` prints the message on one line and exits with status 2; no traceback. The message names the option,
    its value and the way out.
    """
