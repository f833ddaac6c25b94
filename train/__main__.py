"""`python -m train CONFIG.yaml [--dotted.key value]`, and the commands `plan`, `plot` and `export`."""

from __future__ import annotations

import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from qvlmoe_jax.command_line import Parser, accept_any_text, print_error
from qvlmoe_jax.errors import QvlmoeError, UsageError

USAGE = """usage: python -m train CONFIG.yaml [--dotted.key value ...]     train, or go on where the run was stopped
       python -m train plot RUN                                draw RUN/curves.png from its metrics
       python -m train plan CONFIG.yaml --topology v5p:4x4x4   compile the step for TPUs that are not here: memory, wire, time
       python -m train export RUN|RUN/checkpoints/STEP DST [--dtype bfloat16]    write a Hugging Face directory
       python -m train export RUN|RUN/checkpoints/STEP DST --adapter    write a LoRA run's adapters as PEFT does

Every key of the config can be set on the command line, e.g. --optimizer.learning_rate 1e-4 --steps 200 --profile TRACE_DIR.
With several processes (docs/pods.md) the same command runs in each: where a cluster starts them, nothing is to be said, else
--distributed.coordinator HOST:PORT --distributed.num_processes N --distributed.process_id I.

Exit status: 0 done, 1 the plan does not fit or this or another process broke, 2 an error of yours (one line on stderr),
130 interrupted, 143 stopped by SIGTERM after saving."""

STOPPED = 143  # 128 + SIGTERM, what a shell reports for a program ended by it


def _train(arguments: Sequence[str]) -> int:
    from train.config import load_config

    config = load_config(arguments[0], arguments[1:])
    from qvlmoe_jax.compilation import persistent_cache
    from train.processes import initialize

    initialize(config.distributed)
    from train.loop import train

    persistent_cache()

    state = train(config)
    return 0 if int(state.step) >= config.steps else STOPPED


def _plot(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise UsageError(f"plot takes one RUN, got {len(arguments)} arguments; see python -m train --help")
    from train.plot import plot

    print(plot(arguments[0]))
    return 0


def _plan(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m train plan", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--topology", help="kind:AxB[xC] of v4, v5e, v5p, v6e, tpu7x; v5p:4x4x4 is 64 chips")
    parser.add_argument("--dataset-tokens", type=float, help="also say how long one pass over so many text tokens takes")
    sweep = "try fsdp x expert, dispatch, remat full and dots, and 1, 2 and 4 times the batch rows; print the best that fits"
    parser.add_argument("--sweep", action="store_true", help=sweep)
    parser.add_argument("--programs", type=int, default=4, help="how many programs a sweep compiles at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    options, overrides = parser.parse_known_args(arguments)
    if options.topology is None:
        raise UsageError("plan needs --topology, such as v5p:4x4x4; see python -m train plan --help")
    if options.dataset_tokens is not None and not 0 < options.dataset_tokens < math.inf:
        raise UsageError(f"--dataset-tokens {options.dataset_tokens}, expected a number of tokens above 0")
    if options.programs < 1:
        raise UsageError(f"--programs {options.programs}, expected 1 or more")
    if options.json is not None and not options.json.parent.is_dir():  # known before the minutes of compiling
        raise UsageError(f"--json {options.json}: {options.json.parent} is no directory, expected one to write to")
    from train import topology

    chosen = topology.Topology.parse(options.topology)
    topology.prepare_environment()
    from train.config import load_config

    config = load_config(options.config, overrides)
    from train import plan
    from train.errors import DoesNotFit

    try:
        made = plan.sweep(config, chosen, programs=options.programs) if options.sweep else plan.make_plan(config, chosen)
    except DoesNotFit as error:
        print(f"{chosen.name}: DOES NOT FIT: {error}")
        return 1
    if made is None:
        return 1
    print(plan.report(made, options.dataset_tokens))
    if options.json is not None:
        plan.write_json(made, options.json)
    return 0 if made.fits else 1


def _export(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m train export")
    parser.add_argument("source", metavar="RUN", type=Path)
    parser.add_argument("destination", metavar="DST", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--adapter", action="store_true")
    options = parser.parse_args(arguments)
    from train.run_files import export_adapter, export_run

    if options.adapter:
        if options.dtype is not None:
            raise UsageError("--adapter writes float32, expected no --dtype")
        export_adapter(options.source, options.destination)
    else:
        export_run(options.source, options.destination, options.dtype)
    print(options.destination)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    As one of several processes it does not return after an error: an orderly end would wait for the others, which wait for it.
    """
    try:
        status = _run(argv)
    except Exception:
        if not _among_others():
            raise
        traceback.print_exc()
        status = 1
    if status not in (0, STOPPED) and _among_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _among_others() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _run(argv: Sequence[str] | None) -> int:
    accept_any_text()
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    commands = {"plan": _plan, "plot": _plot, "export": _export}
    # Orbax and Grain report each file there, and each error, which they also raise, with every stack it passes through.
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE)
            status = 0 if arguments else 2
        elif arguments[0] in commands:
            status = commands[arguments[0]](arguments[1:])
        else:
            status = _train(arguments)
        sys.stdout.flush()  # an error of it is told as others are
        return status
    except ModuleNotFoundError as error:
        if error.name not in ("yaml", "grain", "pyarrow"):
            raise
        print(
            f"error: training needs the package {error.name}, which is not installed; pip install 'qvlmoe_jax[train]'",
            file=sys.stderr,
        )
        return 2
    except (QvlmoeError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the run goes on from its newest checkpoint", file=sys.stderr)
        return 130
    finally:
        absl.setLevel(level)  # a program that calls `main` has its own use for it


if __name__ == "__main__":
    sys.exit(main())
