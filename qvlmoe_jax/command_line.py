"""What the commands have in common: how they read a command line, and how they say what is wrong. Imports no jax."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import sys
from typing import NoReturn

from qvlmoe_jax.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other user error: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def accept_any_text() -> None:
    """For the start of a command: what the terminal cannot show is printed as `\\xfc`, what is read and is no text is kept."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # a caller in this process has read from stdin before
                stream.reconfigure(errors=errors)


def printable(line: str) -> str:
    """Names come from files that others wrote: a terminal gets no control characters, an encoding no lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def one_line(error: BaseException) -> str:
    """What it says, whatever it quotes."""
    return printable(" ".join(str(error).split()))


def print_error(error: BaseException) -> None:
    """One line on stderr; none where stdout's reader has gone (`| head`), since a command ends without a word then."""
    if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout.fileno()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which flushes once more as it ends
        return
    print("error:", one_line(error), file=sys.stderr, flush=True)


def _is_unread(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
