"""A small checkpoint, from Hugging Face's files to logits: build it, convert it, ask about a picture, compare with transformers.

python examples/demo.py [--out DIR] [--image FILE] [--question TEXT]

Without torch the comparison is with committed logits, which transformers computed in float64 (`--write-golden` makes them anew).
Exits 1 when a logit is further off than 1e-4.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError
from prompt import encode
from tiny_checkpoint import NUM_SHARDS, SEED, write_checkpoint

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.errors import QvlmoeError

HERE = Path(__file__).resolve().parent
IMAGE, QUESTION = HERE / "cat.png", "What animal is this?"
GOLDEN = HERE / "golden.npz"
GOLDEN_STRIDE = 16  # every 16th vocabulary entry is kept, and each position's logsumexp, to which all of them contribute
BOUND = 1e-4

Inputs = Mapping[str, Any]  # name -> numpy array, under the names of Hugging Face's processor


forward = jax.jit(lambda model, batch: model(batch).logits)


def run_model(directory: Path, inputs: Inputs) -> tuple[np.ndarray, dict[str, float]]:
    """Logits `[T,V]` in float32, and seconds per phase."""
    times = [time.perf_counter()]
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(directory, dtype=jnp.float32)
    batch = Batch.from_hf(model.config, **inputs)
    times.append(time.perf_counter())
    jax.block_until_ready(forward(model, batch))
    times.append(time.perf_counter())
    logits = np.asarray(forward(model, batch))
    times.append(time.perf_counter())
    length = inputs["input_ids"].shape[1]  # the rest of the bucket is padding
    return logits[0, :length], dict(zip(("load", "first forward", "second forward"), np.diff(times).tolist(), strict=True))


def run_transformers(
    directory: Path, inputs: Inputs, dtype: str = "float32", modify: Callable[[Any, dict[str, Any]], None] | None = None
) -> np.ndarray:
    """The reference logits `[T,V]`. `modify(model, tensors)` may put in a bug first (docs/plot_parity.py does)."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(
        directory, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == model.config.image_token_id).int()
    if modify is not None:
        modify(model, tensors)
    with torch.no_grad():
        return model(**tensors, use_cache=False).logits[0].numpy()


def logsumexp(logits: np.ndarray) -> np.ndarray:
    """`[T,V]` -> `[T]`, in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1))


def write_golden(directory: Path, inputs: Inputs) -> None:
    """Stores the reference of the default picture and question."""
    logits = run_transformers(directory, inputs, "float64")
    np.savez(
        GOLDEN,
        input_ids=inputs["input_ids"],
        logits=logits[:, ::GOLDEN_STRIDE].astype(np.float32),
        logsumexp=logsumexp(logits).astype(np.float32),
    )


def golden_error(logits: np.ndarray, golden: Inputs) -> float:
    """Largest difference to the stored logits, over all positions."""
    entries = np.abs(logits[:, ::GOLDEN_STRIDE] - golden["logits"]).max()
    return float(max(entries, np.abs(logsumexp(logits) - golden["logsumexp"]).max()))


def report_parity(reference: str, errors: Mapping[str, float]) -> bool:
    """Prints one line per reference; True when every error is within the bound (NaN is not)."""
    good = all(error <= BOUND for error in errors.values())
    numbers = ", ".join(f"{error:.1e} {where}" for where, error in errors.items())
    print(f"parity      {reference}: {numbers} (bound {BOUND:.0e}) {'OK' if good else 'TOO FAR OFF'}")
    return good


def demo(out: Path, image_file: Path, question: str, rewrite_golden: bool) -> int:
    """Runs all of it; the exit status."""
    source, converted = out / "hf", out / "jax"
    num_params = write_checkpoint(source)
    print(f"checkpoint  {source}: {num_params / 1e6:.1f} M parameters in {NUM_SHARDS} shards, bfloat16, random (seed {SEED})")

    command = [sys.executable, "-m", "convert", "hf2jax", str(source), str(converted), "--overwrite"]
    print(f"convert     $ python {' '.join(command[1:])}", flush=True)
    print(textwrap.indent(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, " " * 12), end="")

    with Image.open(image_file) as image:
        inputs, tokenizer = encode(source, image, question)
        size = f"{image.width} x {image.height}"
    _, rows, columns = inputs["image_grid_thw"][0]
    length = inputs["input_ids"].shape[1]
    print(f"picture     {image_file.name}, {size} pixels -> {rows} x {columns} patches -> {rows * columns // 4} visual tokens")
    print(f"question    {question!r}, {length} tokens in all")
    if rewrite_golden:
        write_golden(source, inputs)

    logits, seconds = {}, {}
    for where, directory in (("from HF", source), ("converted", converted)):
        logits[where], seconds[where] = run_model(directory, inputs)
    print("answer      next token, likeliest first (random weights: the words mean nothing, the numbers must agree)")
    last = {where: values[-1].astype(np.float64) for where, values in logits.items()}
    for token in np.argsort(-last["converted"])[:5]:
        numbers = ", ".join(f"{values[token]:.6f} {where}" for where, values in last.items())
        probability = np.exp(last["converted"][token] - logsumexp(last["converted"][None])[0])
        print(f"            {token:3} {tokenizer.id_to_token(int(token))!r:12} {probability:6.2%}   logit {numbers}")
    for where, phases in seconds.items():
        print(f"seconds     {where}: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items()))

    good = True
    if importlib.util.find_spec("torch"):
        import transformers

        reference = run_transformers(source, inputs)
        errors = {where: float(np.abs(values - reference).max()) for where, values in logits.items()}
        good &= report_parity(f"max |difference| to transformers {transformers.__version__} at all {length} positions", errors)
    golden = np.load(GOLDEN)
    if np.array_equal(inputs["input_ids"], golden["input_ids"]) and image_file == IMAGE:
        errors = {where: golden_error(values, golden) for where, values in logits.items()}
        good &= report_parity(f"max |difference| to stored float64 logits at all {length} positions", errors)
    elif not importlib.util.find_spec("torch"):
        print("parity      not checked: another picture or question than the stored one, and torch is not installed")
    return 0 if good else 1


def main() -> int:
    """Parses the command line; user errors are one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where the two directories go (default: %(default)s)")
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--write-golden", action="store_true", help="store transformers' logits anew (needs torch)")
    args = parser.parse_args()
    try:
        return demo(args.out, args.image, args.question, args.write_golden)
    except (QvlmoeError, FileNotFoundError, UnidentifiedImageError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"demo: the conversion failed with exit status {error.returncode}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
