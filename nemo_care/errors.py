"""The one exception that means "the user can mend this": it ends a command with exit status 2."""


class InputError(Exception):
    """A recipe or an input that can't be used.

    The message is one line that names the key or the file and the remedy. The command line prints
    it without a traceback and exits with status 2.
    """
