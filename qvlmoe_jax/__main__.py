"""`python -m qvlmoe_jax`: ask a model about pictures and videos. jax is imported by the work, not by `--help` or bad input."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvlmoe_jax.command_line import Parser, accept_any_text, print_error
from qvlmoe_jax.errors import QvlmoeError, UsageError

if TYPE_CHECKING:
    from qvlmoe_jax.chat import Answer, Chat

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")


class _Part(argparse.Action):
    """Collects --image and --video in the order given, as the parts of a message."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = (option_string or "").lstrip("-")
        namespace.media = [*namespace.media, {"type": kind, kind: values}]


def parse_mesh(text: str) -> dict[str, Any]:
    """`fsdp=8,expert=8` as axis sizes.

    Raises:
      UsageError: an axis that does not exist or comes twice, or a size that is not a positive integer.
    """
    sizes: dict[str, Any] = {}
    for entry in text.split(","):
        axis, _, size = entry.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise UsageError(
                f"--mesh: {entry!r} is not an axis and its size; expected for example fsdp=8,expert=8 of the axes "
                f"{', '.join(MESH_AXES)}"
            )
        sizes[axis] = int(size)
    return sizes


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = Parser(prog="python -m qvlmoe_jax", description="Run Qwen3-VL-MoE (and dense Qwen3-VL) checkpoints.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="answer a question about pictures and videos",
        description="Answer a question about pictures and videos. The answer goes to stdout as it is made, progress to stderr.",
    )
    add = generate.add_argument
    add("directory", metavar="DIR", type=Path, help="Hugging Face checkpoint directory or converted one")
    add("--prompt", help="the question (with --chat: the first one)")
    add("--image", action=_Part, dest="media", default=[], metavar="FILE", help="a picture: file or URL; may be repeated")
    add("--video", action=_Part, dest="media", metavar="FILE", help="a video: file or URL; may be repeated")
    add("--system", metavar="TEXT", help="system prompt")
    add("--chat", action="store_true", help="go on with questions from stdin, one a line; /image FILE and /video FILE add to it")
    add("--json", action="store_true", help="print each answer as one JSON object instead of streaming its text")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="per answer (default: %(default)s)")
    of_file = generate.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    of_file.add_argument("--temperature", type=float, help="0 = always the likeliest token")
    of_file.add_argument("--top-k", type=int, help="draw from the k likeliest tokens; 0 = all")
    of_file.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    of_file.add_argument("--min-p", type=float, help="draw from tokens at least this fraction as likely as the likeliest")
    of_file.add_argument("--repetition-penalty", type=float, help="1 = none")
    of_file.add_argument("--presence-penalty", type=float, help="0 = none")
    of_file.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    how = generate.add_argument_group("how it runs")
    how.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="default: as in DIR")
    how.add_argument("--mesh", metavar="AXIS=N,...", help="spread over devices, for example fsdp=8,expert=8")
    how.add_argument("--prefill-chunk", type=int, default=2048, metavar="N", help="prompt tokens read at a time (%(default)s)")
    generate.set_defaults(run=_generate)
    return parser


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _generate(args: argparse.Namespace) -> None:
    if args.prompt is None and not args.chat:
        raise UsageError("nothing to answer: expected --prompt TEXT, or --chat to read questions from stdin")
    for flag, value in (("--max-new-tokens", args.max_new_tokens), ("--prefill-chunk", args.prefill_chunk)):
        if value < 1:
            raise UsageError(f"{flag} {value}: expected at least 1")
    mesh_sizes = None if args.mesh is None else parse_mesh(args.mesh)
    from qvlmoe_jax.checkpoint import open_weights
    from qvlmoe_jax.generation_config import GenerationConfig
    from qvlmoe_jax.hub import find_source
    from qvlmoe_jax.processor import Processor

    directory = find_source(args.directory)
    files = open_weights(directory).side_directory
    processor = Processor.from_pretrained(files)
    messages = [] if args.system is None else [{"role": "system", "content": [{"type": "text", "text": args.system}]}]
    question = None if args.prompt is None else [*args.media, {"type": "text", "text": args.prompt}]
    arrays = None if question is None else processor.encode([[*messages, {"role": "user", "content": question}]])
    sampling: dict[str, Any] = dict(GenerationConfig.from_directory(files).sampling)
    sampling |= {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}

    import jax  # all that can be refused without it has been

    from qvlmoe_jax.chat import Chat
    from qvlmoe_jax.compilation import CompileLog, persistent_cache
    from qvlmoe_jax.model import Qwen3VLMoeForConditionalGeneration
    from qvlmoe_jax.sampling import Sampling
    from qvlmoe_jax.sharding import make_mesh

    Sampling.of(**sampling)
    try:
        mesh = None if mesh_sizes is None else make_mesh(**mesh_sizes)
    except ValueError as error:
        raise UsageError(f"--mesh: {error}") from error

    persistent_cache()
    log = CompileLog()
    _note(f"loading {args.directory} ...")
    start = time.perf_counter()
    with _within_memory("spread the model with --mesh, or read it with --dtype bfloat16"):
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(
            directory, dtype=None if args.dtype == "keep" else args.dtype, mesh=mesh
        )
        jax.block_until_ready(model)
    leaves = jax.tree.leaves(model)
    where = f"{mesh.size} devices" if mesh else str(leaves[0].devices().pop())
    size = sum(leaf.size for leaf in leaves)
    _note(f"loaded {size / 1e9:.3g} B parameters ({leaves[0].dtype}) on {where} in {time.perf_counter() - start:.1f} s")
    options = sampling | {
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "prefill_chunk": args.prefill_chunk,
    }
    chat = Chat(model, processor, options, messages)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        if question is not None:
            _answer(chat, question, arrays, as_json=args.json, log=log)
        if args.chat:
            _converse(chat, args.media if question is None else [], as_json=args.json, log=log)


@contextmanager
def _within_memory(advice: str) -> Iterator[None]:
    """XLA's report of an allocation that fails, as the user's error."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UsageError(f"not enough memory on the device: {str(error).splitlines()[0]}; {advice}") from error


def _converse(chat: Chat, media: list[dict[str, Any]], *, as_json: bool, log: Any) -> None:
    """Questions from stdin until it ends. A question that cannot be answered (no such picture) costs that question only."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        command, _, rest = (line := line.strip()).partition(" ")
        if command in ("/image", "/video") and rest:
            media = [*media, {"type": command[1:], command[1:]: rest.strip()}]
        elif line:
            try:
                _answer(chat, [*media, {"type": "text", "text": line}], None, as_json=as_json, log=log)
            except (QvlmoeError, OSError) as error:
                print_error(error)
            media = []


def _answer(chat: Chat, content: list[dict[str, Any]], arrays: Any, *, as_json: bool, log: Any) -> None:
    before = log.seconds
    arrays = chat.encode(content) if arrays is None else arrays
    _note("reading the prompt (a length not met before compiles first) ...")
    show = (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True))
    with _within_memory("lower --max-new-tokens or --prefill-chunk, ask for less, or spread with --mesh"):
        answer = chat.ask(content, show, arrays)
    print(_as_json(_summary(answer)) if as_json else "", flush=True)
    _note(
        f"read {answer.read_tokens} of {answer.prompt_tokens} prompt tokens, first token after "
        f"{answer.first_token_seconds:.2f} s; {len(answer.ids)} tokens, {answer.tokens_per_second:.1f} tokens/s"
        + (f"; {log}" if log.seconds > before else "")
    )


def _as_json(summary: dict[str, Any]) -> str:
    """Readable where stdout can show it; elsewhere JSON's own escapes, since those of the stream (`\\xfc`) would be no JSON."""
    return json.dumps(summary, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))


def _summary(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": answer.ids,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.ids),
        "finish_reason": answer.finish_reason,
        "first_token_seconds": round(answer.first_token_seconds, 4),
        "tokens_per_second": round(answer.tokens_per_second, 2),
    }


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
