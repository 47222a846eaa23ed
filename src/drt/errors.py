"""What a user is told; anyone may raise these."""

from __future__ import annotations


class DRTError(ValueError):
    """A mistake of the user's: a wrong file, a wrong setting. The message says what was got and what is wanted.

    The `drt` command prints the message without a traceback and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after what was done so far has been written. The message says how to go on.

    It is a `KeyboardInterrupt`, so what lets Ctrl-C through lets it through. The `drt` command prints the message
    and exits with code 130.
    """


def reason(error: Exception) -> str:
    """What went wrong, for a message that names the file itself: without the number and the name of an `OSError`."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
