"""A training step against torch + transformers on the same machine, weights and batch, in one process, pair by pair.

    python benchmarks/training.py [--layers 4] [--pairs 7] [--write benchmarks/training.md] [--profile DIR]

Forward, backward, clipping and AdamW in float32 on rows of text with pictures. Ours is `train.step`; theirs is a plain torch loop
over transformers' model with grouped_mm experts and sdpa attention. A pair measures both within seconds of each other, so that a
busy machine slows both; the ratio reported is the median of the pairs'.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is no installed package
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig
from tests import cases, ours, reference, tiny
from tests.hf_checkpoints import random_hf_tensors
from train.config import LossConfig, OptimizerConfig, ScheduleConfig
from train.optim import make_optimizer, schedule
from train.state import init_state
from train.step import make_train_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)
ROWS = {
    "text": [[cases.Text(512)]] * 2,
    "pictures": [[cases.Text(100), cases.Image(8, 12), cases.Text(314)], [cases.Text(200), cases.Image(12, 8), cases.Text(214)]],
}


def model_config(layers: int) -> dict[str, Any]:
    """30B-A3B's decoder and tower at a quarter of their widths, `layers` layers each, a smaller vocabulary."""
    return tiny.variant(
        tiny.TINY,
        text_config=dict(
            vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=1, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=192,
            mlp_only_layers=[], rope_scaling={"mrope_section": [24, 20, 20]},
        ),
        vision_config=dict(
            depth=layers, hidden_size=288, intermediate_size=1076, num_heads=4, out_hidden_size=512, patch_size=16,
            num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2],
        ),
    )  # fmt: skip


class Torch:
    """The torch loop."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]):
        self.model: Any = reference.build_model(config, tensors, experts="grouped_mm").requires_grad_(True).train()
        torch.set_num_threads(os.cpu_count() or 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)

    def step(self, inputs: dict[str, np.ndarray]) -> float:
        out = reference.run(self.model, inputs)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()


class Ours:
    """The jitted step."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]):
        model = ours.build_model(config, tensors, BackendConfig())
        tx = make_optimizer(OPTIMIZER)
        rate = schedule(ScheduleConfig(name="constant"), OPTIMIZER.learning_rate, 1)
        self.train_step = make_train_step(model, tx, rate, loss=LossConfig(chunk_tokens=512), optimizer=OPTIMIZER)
        self.state = init_state(model.params(), tx)

    def step(self, batch: Batch) -> float:
        self.state, metrics = self.train_step(self.state, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def measure(layers: int, pairs: int, profile: str | None) -> tuple[float, dict[str, tuple[list[float], list[float]]]]:
    """Billions of parameters, and the tokens per second of ours and theirs by kind of batch, pair by pair."""
    config = model_config(layers)
    tensors = random_hf_tensors(config)
    own, theirs = Ours(config, tensors), Torch(config, tensors)
    results = {}
    for kind, rows in ROWS.items():
        inputs = cases.build(config, rows)
        labels = cases.shifted_labels(inputs, config)
        batch = Batch.from_hf(Qwen3VLMoeConfig.from_hf(config), **inputs, labels=labels)
        batch = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
        tokens = int((inputs["attention_mask"] != 0).sum())
        losses = own.step(batch), theirs.step(inputs | {"labels": labels})
        print(f"{kind}: first losses {losses[0]:.5f} and {losses[1]:.5f}", flush=True)
        rates: tuple[list[float], list[float]] = ([], [])
        calls = (functools.partial(own.step, batch), functools.partial(theirs.step, inputs | {"labels": labels}))
        for _ in range(pairs):
            for call, out in zip(calls, rates, strict=True):
                start = time.perf_counter()
                call()
                out.append(tokens / (time.perf_counter() - start))
            print(f"  ours {rates[0][-1]:8.1f}   torch {rates[1][-1]:8.1f}   ratio {rates[0][-1] / rates[1][-1]:.2f}", flush=True)
        results[kind] = rates
        if profile:
            with jax.profiler.trace(f"{profile}/{kind}"):
                own.step(batch)
    return sum(t.size for t in tensors.values()) / 1e9, results


def report(billions: float, layers: int, pairs: int, results: dict[str, tuple[list[float], list[float]]]) -> str:
    """The results as Markdown."""
    lines = [
        f"{billions:.2f} B parameters ({layers} layers, 128 experts, 8 per token, width 512), float32, 2 rows of 512 tokens, "
        f"{pairs} pairs.",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; Python "
        f"{platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        "| batch | ours, tokens/s | torch, tokens/s | ratio (median of pairs) | smallest, largest | goal |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (own, other) in results.items():
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        lines.append(
            f"| {kind} | {statistics.median(own):.1f} | {statistics.median(other):.1f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f}, {max(ratios):.2f} | 1.0, better 1.5 |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--profile", metavar="DIR", help="also write a trace of one of our steps per kind of batch")
    parser.add_argument("--write", type=Path, help="replace the results in this file, below its first line that says Results")
    args = parser.parse_args()
    billions, results = measure(args.layers, args.pairs, args.profile)
    text = report(billions, args.layers, args.pairs, results)
    print(text)
    if args.write:
        head = args.write.read_text(encoding="utf-8").partition("## Results")[0]
        args.write.write_text(f"{head}## Results\n\n{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
