"""What a user is told; anyone may raise these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DRTError(ValueError):
    """A mistake of the user's: a wrong file, a wrong setting. The message says what was expected and what was given.

    The `drt` command prints the message without a traceback and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after what was done so far has been written. The message says how to go on.

    It is a `KeyboardInterrupt`, so what lets Ctrl-C through lets it through. The `drt` command prints the message
    and exits with code 130.
    """


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Begin messages of mistakes with the option or file that is wrong."""
    try:
        yield
    except DRTError as error:
        raise DRTError(f"{what}: {error}") from error


def reason(error: Exception) -> str:
    """What went wrong, for a message that names the file itself: without the number and the name of an `OSError`."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
