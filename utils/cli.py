"""What every command line shares: one clear sentence on bad input, a quiet Ctrl-C, and an exit status."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one sentence: the file or key, what is wrong, what to do."""


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a `main()`: a `UserError` becomes one line on stderr and status 1; Ctrl-C becomes status 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


def sentence(error: UserError) -> str:
    """The message, also of an error from a loader process: that is wrapped in a traceback, and its last line then."""
    message = str(error)
    if message.startswith("Caught "):
        _, _, message = message.strip().splitlines()[-1].partition(": ")
    return message
