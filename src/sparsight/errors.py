"""The one error for users' mistakes, and the warning of old names; other errors are bugs, and show their traceback."""

import warnings


class UserError(ValueError):
    """Something that a user gave cannot be used; the message says what was given, what was expected, what to do."""


class RenamedWarning(FutureWarning):
    """An old name was used; it goes with the next release."""


def warn_renamed(old: str, new: str) -> None:
    """Warn at the caller's caller that ``old`` is now called ``new``."""
    warnings.warn(f"{old} is now called {new}; the old name goes with the next release", RenamedWarning, stacklevel=3)
