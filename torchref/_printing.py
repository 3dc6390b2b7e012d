"""What the scripts print, where its reader may have gone and its encoding may lack letters."""

import io
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printing(parser: ArgumentParser, what: str = "the results") -> Iterator[None]:
    """Print in here; a reader that has enough, as `head`, is no error to tell of."""
    try:
        yield
        print(end="", flush=True)  # nothing where the stream is closed, and so None
    except OSError as error:
        # Python flushes once more at its end: what is left goes nowhere, instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            parser.exit(1)  # as Python's documentation has it, "Note on SIGPIPE"
        parser.error(f"{what} cannot be written: {error.strerror}")


def escape_what_cannot_be_printed() -> None:
    """A letter that standard output's encoding lacks is written as its number, as in ``\\xfc``."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
