"""A training step, a forward pass, decoding and the vision tower on one GPU or TPU, with MFU: 30B-A3B's widths, fewer layers.

    python -m benchmarks.accelerator [--layers 2] [--tokens 4096] [--rows 1] [--rounds 10] [--write benchmarks/accelerator.md]

bfloat16 weights (float32 master and moments in the training step), random values, balanced routing or the router's own. Model
FLOPs are those of `train.flops`: what the model needs, recomputation not counted. Where jax finds only a CPU it says so and ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.true_widths import true_widths
from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.generate import generate
from train.config import LossConfig, OptimizerConfig
from train.feed import count
from train.flops import forward_flops, peak_tflops, step_flops
from train.optim import make_optimizer, split_frozen
from train.state import init_state
from train.step import make_train_step


@dataclass(frozen=True)
class Row:
    """Seconds of each call; `amount` of `unit` per call; the model's FLOPs per call (None: MFU says nothing of it)."""

    name: str
    amount: float
    unit: str
    flops: float | None
    seconds: list[float]
    compile_seconds: float

    def line(self, peak: float | None) -> str:
        middle = statistics.median(self.seconds)
        mfu = f"{self.flops / middle / (peak * 1e12):.1%}" if self.flops and peak else "-"
        low, high = 1e3 * min(self.seconds), 1e3 * max(self.seconds)
        return (
            f"| {self.name} | {1e3 * middle:.2f} | {low:.2f}, {high:.2f} | {self.amount / middle:,.0f} {self.unit}/s | {mfu} | "
            f"{self.compile_seconds:.1f} |"
        )


def timed(call: Callable[[], Any], rounds: int) -> tuple[list[float], float]:
    """Seconds of each of the rounds, and what the first call took more."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    first = once()
    once()
    seconds = [once() for _ in range(rounds)]
    return seconds, max(0.0, first - statistics.median(seconds))


def text_batch(config: Qwen3VLMoeConfig, rows: int, tokens: int) -> Batch:
    """Documents that fill their rows, every token a target."""
    special = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    ordinary = np.setdiff1d(np.arange(min(1000, config.text_config.vocab_size)), special)
    ids = np.random.default_rng(0).choice(ordinary, (rows, tokens))
    return Batch.from_hf(config, input_ids=ids, labels=ids)


def picture_batch(config: Qwen3VLMoeConfig, patches: int) -> Batch:
    """One square picture of so many patches."""
    vision = config.vision_config
    side = int(patches**0.5) // vision.spatial_merge_size * vision.spatial_merge_size
    ids = np.full((1, side * side // vision.merge_unit), config.image_token_id)
    pixels = np.random.default_rng(0).normal(size=(side * side, vision.patch_width)).astype(np.float32)
    return Batch.from_hf(config, input_ids=ids, pixel_values=pixels, image_grid_thw=np.array([[1, side, side]]))


def measure(
    config: Qwen3VLMoeConfig,
    backend: BackendConfig,
    *,
    rows: int,
    tokens: int,
    rounds: int,
    patches: int = 4096,
    new_tokens: int = 64,
) -> Iterator[Row]:
    """The table's rows, one after another."""
    model = Qwen3VLMoeForConditionalGeneration.from_config(config, nnx.Rngs(0), dtype=jnp.bfloat16, backend=backend)
    batch = text_batch(config, rows, tokens)
    counts = count(batch)

    forward = jax.jit(lambda model, batch: model(batch, logits_to_keep=1).logits)
    flops = forward_flops(config, counts)["text"]
    yield Row(f"forward, {rows} x {tokens}", counts.tokens, "tokens", flops, *timed(lambda: forward(model, batch), rounds))

    pictures = picture_batch(config, patches)
    seen = count(pictures)
    tower = jax.jit(lambda model, batch: model.model.visual_features(batch))
    parts = forward_flops(config, seen)
    name = f"vision tower, one picture of {seen.patches} patches"
    flops = parts["vision"] + parts["merger"]
    yield Row(name, seen.patches, "patches", flops, *timed(lambda: tower(model, pictures), rounds))

    for size in (1, 8):
        prompt = text_batch(config, size, 128)

        def answer(new: int, prompt: Batch = prompt) -> Any:
            return generate(model, prompt, max_new_tokens=new, eos_token_id=())

        seconds, compiled = timed(lambda answer=answer: answer(new_tokens + 1), rounds)
        start, _ = timed(lambda answer=answer: answer(1), rounds)
        seconds = [(s - statistics.median(start)) / new_tokens for s in seconds]
        yield Row(f"decode, batch {size}, prompt 128", size, "tokens", None, seconds, compiled)

    tx = make_optimizer(OptimizerConfig())
    step = make_train_step(
        model, tx, lambda _: jnp.float32(1e-5), loss=LossConfig(chunk_tokens=1024), compute_dtype=jnp.bfloat16
    )
    state = [init_state(model.params(), tx, param_dtype=jnp.float32, compute_dtype=jnp.bfloat16)]
    stacked = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)

    def train() -> Any:
        state[0], metrics = step(state[0], stacked)
        return metrics["loss"]

    flops = step_flops(config, counts, *split_frozen(model.params(), ()))
    name = f"train step, {rows} x {tokens}, remat {backend.remat}"
    yield Row(name, counts.tokens, "tokens", flops, *timed(train, rounds))


def report(rows: list[Row], layers: int, backend: BackendConfig) -> str:
    """The rows as Markdown, under the device's name."""
    device = jax.devices()[0]
    peak = peak_tflops(device.device_kind)
    known = f"{peak:.0f} TFLOP/s in bfloat16" if peak else "its peak is not known here, so no MFU"
    lines = [
        f"{device.device_kind} ({known}), one device; jax {jax.__version__}, {layers} decoder layers of "
        f"Qwen3-VL-30B-A3B's widths and its whole tower; {backend.resolve(device.platform)}.",
        "",
        "| | ms (median) | least, most | rate | MFU | compile s |",
        "|---|---|---|---|---|---|",
        *(row.line(peak) for row in rows),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument("--balanced", action="store_true", help="tokens go to experts in turn instead of as a random router says")
    parser.add_argument("--write", type=Path, help="replace the results in this file, below its first line that says Results")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        print("benchmarks.accelerator needs a GPU or a TPU, and jax finds only a CPU here; nothing was measured", file=sys.stderr)
        return 2
    config = Qwen3VLMoeConfig.from_hf(true_widths(args.layers))
    backend = BackendConfig(remat=args.remat, fake_balanced_gate=args.balanced)
    rows = []
    for row in measure(config, backend, rows=args.rows, tokens=args.tokens, rounds=args.rounds):
        print(row.line(peak_tflops(jax.devices()[0].device_kind)), flush=True)
        rows.append(row)
    text = report(rows, args.layers, backend)
    print(text)
    if args.write:
        head = args.write.read_text(encoding="utf-8").partition("## Results")[0]
        args.write.write_text(f"{head}## Results\n\n{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
