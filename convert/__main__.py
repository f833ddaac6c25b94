"""`python -m convert`: the command line. jax is imported by the work itself, not by `--help` or by refusing bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qvlmoe_jax.errors import QvlmoeError


class UsageError(QvlmoeError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other user error: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _hf2jax(args: argparse.Namespace) -> None:
    from convert.hf2jax import hf2jax

    hf2jax(args.source, args.destination, dtype=args.dtype, overwrite=args.overwrite, report=print)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = _Parser(prog="python -m convert", description="Convert Qwen3-VL-MoE (and dense Qwen3-VL) checkpoints.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    hf2jax = commands.add_parser(
        "hf2jax",
        help="Hugging Face safetensors -> Orbax",
        description="Convert a Hugging Face checkpoint directory to Orbax. DST appears whole or not at all.",
    )
    hf2jax.add_argument("source", metavar="SRC", type=Path, help="checkpoint directory: config.json and safetensors")
    hf2jax.add_argument("destination", metavar="DST", type=Path, help="directory to make")
    hf2jax.add_argument(
        "--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="of the stored parameters (default: as in SRC)"
    )
    hf2jax.add_argument("--overwrite", action="store_true", help="replace a converted DST once the new one is whole")
    hf2jax.set_defaults(run=_hf2jax)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 the user's error (one line on stderr), 130 interrupted."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except (QvlmoeError, OSError) as error:
        # one line whatever the message quotes: names come from files that others wrote
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
