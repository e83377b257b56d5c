"""The one error for users' mistakes; any other error is a bug of ours, and shows its traceback."""


class UserError(ValueError):
    """Something that a user gave cannot be used; the message says what was given, what was expected, what to do."""
