"""Generation against transformers on the same machine, weights and prompts, in one process, pair by pair.

    python benchmarks/generation.py [--layers 16] [--pairs 5] [--one-core] [--write benchmarks/generation.md]

A mixture of experts with the ratios of Qwen3-VL-30B-A3B at a quarter of its width (128 experts, 8 per token), float32, random
weights. Ours is `qvlmoe_jax.generate`; theirs is `transformers.generate` with grouped_mm experts and sdpa attention. A pair
measures both within seconds of each other, so that a busy machine slows both; the ratio reported is the median of the pairs'.
On a machine that others use, threads of either side that wait for each other are what is measured: `--one-core` binds the
process to one core, gives both sides one thread, and counts CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/ is no installed package
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ONE_CORE = "--one-core" in sys.argv  # before jax makes its threads
if ONE_CORE:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import flax
import jax
import numpy as np
import torch
import transformers
from flax import nnx

from qvlmoe_jax import Batch, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.generate import generate
from qvlmoe_jax.hf import expand
from qvlmoe_jax.param_tree import flatten
from tests import reference, tiny

PROMPT, ANSWER = 128, 48
CASES = (("prefill", 1, 512), ("prefill", 1, 2048), ("decode", 1, PROMPT), ("decode", 8, PROMPT))
GOALS = {("prefill", 1): 1.0, ("decode", 1): 1.5, ("decode", 8): 1.1}


def model_config(layers: int) -> dict[str, Any]:
    """30B-A3B's decoder at a quarter of the width, as many of its layers, a smaller vocabulary; the tower is not measured."""
    return tiny.variant(
        tiny.TINY,
        text_config=dict(
            vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=1, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=192,
            mlp_only_layers=[], rope_scaling={"mrope_section": [24, 20, 20]},
        ),
        vision_config=dict(out_hidden_size=512),
    )  # fmt: skip


def hub_tensors(model: Qwen3VLMoeForConditionalGeneration) -> dict[str, np.ndarray]:
    """The model's weights under the hub's keys."""
    flat = flatten(model.params())

    def array(path: str, index: tuple[int | slice, ...]) -> np.ndarray:
        return np.asarray(flat[path][index] if index else flat[path])

    return {row.key: row.to_hf(array(row.path, row.index)) for row in expand(model.config)}


def seconds(run: Callable[[], Any]) -> float:
    """Of CPU time with --one-core, else of wall time."""
    clock = time.process_time if ONE_CORE else time.perf_counter
    start = clock()
    run()
    return clock() - start


def tokens_per_second(call: Callable[[int], Any], kind: str, rows: int, prompt: int) -> float:
    """Prompt tokens per second until the first new token, or new tokens per second after it."""
    first = seconds(lambda: call(1))
    return rows * prompt / first if kind == "prefill" else rows * ANSWER / (seconds(lambda: call(ANSWER + 1)) - first)


def measure(layers: int, pairs: int) -> tuple[float, list[tuple[str, int, int, list[float], list[float]]]]:
    """Billions of parameters, and per case the tokens per second of ours and theirs, pair by pair."""
    config = model_config(layers)
    ours = Qwen3VLMoeForConditionalGeneration.from_config(config, nnx.Rngs(0))
    theirs: Any = reference.build_model(config, hub_tensors(ours), experts="grouped_mm")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    theirs.generation_config.eos_token_id = None
    rng = np.random.default_rng(0)
    results = []
    for kind, rows, prompt in CASES:
        ids = rng.integers(0, 200, (rows, prompt))
        batch = Batch.from_hf(ours.config, input_ids=ids)
        torch_ids = torch.from_numpy(ids)
        mask = torch.ones_like(torch_ids)

        def ours_call(n: int, batch: Batch = batch) -> Any:
            return generate(ours, batch, max_new_tokens=n, eos_token_id=())

        def theirs_call(n: int, ids: torch.Tensor = torch_ids, mask: torch.Tensor = mask) -> Any:
            theirs.model.rope_deltas = None
            return theirs.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]

        a, b = ours_call(ANSWER + 1), theirs_call(ANSWER + 1).numpy()  # warm-up; random weights may tie, so agreement is a figure
        ours_call(1)
        print(f"{kind} batch {rows}, {prompt} columns: {np.mean(a == b):.0%} of the tokens agree", flush=True)
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(pairs):
            for call, out in zip((ours_call, theirs_call), rates, strict=True):
                out.append(tokens_per_second(call, kind, rows, prompt))
            own, other = rates[0][-1], rates[1][-1]
            print(f"  ours {own:9.1f}   transformers {other:9.1f}   ratio {own / other:.2f}", flush=True)
        results.append((kind, rows, prompt, *rates))
    return sum(leaf.size for leaf in jax.tree.leaves(ours)) / 1e9, results


def cpu_name() -> str:
    """As the kernel calls it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def report(billions: float, layers: int, pairs: int, results: list[tuple[str, int, int, list[float], list[float]]]) -> str:
    """The results as Markdown."""
    where = "one core, CPU seconds" if ONE_CORE else f"{os.cpu_count()} cores, wall clock"
    lines = [
        f"{billions:.2f} B parameters ({layers} layers, 128 experts, 8 per token, width 512), float32, {pairs} pairs.",
        f"{cpu_name()}, {where}, load {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, "
        f"jax {jax.__version__}, flax {flax.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        "| | batch | prompt | ours, tokens/s | transformers, tokens/s | ratio (median of pairs) | smallest, largest | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, rows, prompt, own, other in results:
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        lines.append(
            f"| {kind} | {rows} | {prompt} | {statistics.median(own):.1f} | {statistics.median(other):.1f} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f}, {max(ratios):.2f} | {GOALS[kind, rows]} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one-core", action="store_true", help="one thread each, CPU seconds: for a machine that others use")
    parser.add_argument("--write", type=Path, help="replace the results in this file, below its first line that says Results")
    args = parser.parse_args()
    text = report((measured := measure(args.layers, args.pairs))[0], args.layers, args.pairs, measured[1])
    print(text)
    if args.write:
        head = args.write.read_text(encoding="utf-8").partition("## Results")[0]
        args.write.write_text(f"{head}## Results\n\n{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
