"""Errors that a user can act on."""


class UsageError(ValueError):
    """Bad input: the message names the value and what is allowed. The command line exits with code 2."""
