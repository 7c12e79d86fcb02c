"""The one exception type for mistakes a person can fix."""


class InputError(ValueError):
    """Bad input from outside: a config field, a file, a data set or a checkpoint.

    The message is one line that names the field or file, what was found, what was expected and
    the likely fix. `main.py` and the tools print it without a traceback and exit non-zero.
    """
