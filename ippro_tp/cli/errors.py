"""The one exception that the command line turns into a message and exit code 2."""


class UsageError(ValueError):
    """Bad input: one line that names the cause and the fix."""
