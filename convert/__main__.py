"""`python -m convert`: the command line. jax is imported by the work itself, not by `--help` or by refusing bad input."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlmoe_jax.command_line import Parser, accept_any_text, print_error, printable
from qvlmoe_jax.errors import QvlmoeError, UsageError


def _say(text: str) -> None:
    for line in text.split("\n"):
        print(printable(line), flush=True)


def _hf2jax(args: argparse.Namespace) -> None:
    from convert.hf2jax import hf2jax
    from qvlmoe_jax.hub import find_source

    if not 0 <= args.worker < args.workers:
        raise UsageError(f"--worker {args.worker} of --workers {args.workers}: expected 0 <= worker < workers")
    hf2jax(
        find_source(args.source),
        args.destination,
        dtype=args.dtype,
        overwrite=args.overwrite,
        resume=args.resume,
        worker=args.worker,
        workers=args.workers,
        dry_run=args.dry_run,
        report=_say,
    )


def _jax2hf(args: argparse.Namespace) -> None:
    from convert.jax2hf import jax2hf

    jax2hf(args.source, args.destination, max_shard_size=args.max_shard_size, report=_say)


def _verify(args: argparse.Namespace) -> None:
    from convert.verify import verify
    from qvlmoe_jax.hub import find_source

    verify(find_source(args.source), find_source(args.destination), report=_say)


def _inspect(args: argparse.Namespace) -> None:
    from convert.inspect import inspect
    from qvlmoe_jax.hub import find_source

    inspect(find_source(args.path), report=_say)


def _size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB`, or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?", text.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected one like 5GB or 500MB")
    return max(1, int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")))


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = Parser(prog="python -m convert", description="Convert Qwen3-VL-MoE (and dense Qwen3-VL) checkpoints.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    hf2jax = commands.add_parser(
        "hf2jax",
        help="Hugging Face safetensors -> Orbax",
        description="Convert a Hugging Face checkpoint to Orbax, in bounded memory. DST appears whole or not at all.",
    )
    hf2jax.add_argument("source", metavar="SRC", help="checkpoint directory (config.json and safetensors) or hub repository")
    hf2jax.add_argument("destination", metavar="DST", type=Path, help="directory to make")
    hf2jax.add_argument(
        "--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="of the stored parameters (default: as in SRC)"
    )
    hf2jax.add_argument("--overwrite", action="store_true", help="replace a converted DST once the new one is whole")
    hf2jax.add_argument("--resume", action="store_true", help="go on with DST.converting, which a killed run left")
    hf2jax.add_argument("--worker", type=int, default=0, metavar="I", help="this process's number, from 0")
    hf2jax.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work, each started by you")
    hf2jax.add_argument("--dry-run", action="store_true", help="check SRC and DST, say what would be written, write nothing")
    hf2jax.set_defaults(run=_hf2jax)

    jax2hf = commands.add_parser(
        "jax2hf",
        help="Orbax -> Hugging Face safetensors",
        description="Write a Hugging Face directory in the hub's layout. What came from the hub goes back bit for bit.",
    )
    jax2hf.add_argument("source", metavar="SRC", type=Path, help="converted directory, training RUN, or RUN/checkpoints/STEP")
    jax2hf.add_argument("destination", metavar="DST", type=Path, help="directory to make")
    jax2hf.add_argument("--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE", help="of one file (default: 5GB)")
    jax2hf.set_defaults(run=_jax2hf)

    verify = commands.add_parser(
        "verify", help="compare two directories", description="Compare every tensor of two model directories, bit for bit."
    )
    verify.add_argument("source", metavar="SRC", help="a model directory of any kind")
    verify.add_argument("destination", metavar="DST", help="another")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser(
        "inspect", help="what is in a directory", description="Parameters by part, bytes, dtypes and layout, from headers alone."
    )
    inspect.add_argument("path", metavar="PATH", help="a model directory of any kind")
    inspect.set_defaults(run=_inspect)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 the user's error (one line on stderr), 130 interrupted."""
    accept_any_text()
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()  # an error of it is told as others are
    except (QvlmoeError, OSError) as error:
        print_error(error)
        return 2
    except MemoryError:
        print("error: out of memory; expected about 1 GB to be free, close other programs", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; hf2jax goes on with --resume, the other commands begin again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
