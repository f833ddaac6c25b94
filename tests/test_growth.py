"""What must not grow: the program with depth, and nothing else hidden in it."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import mesh as mesh_growth
from qvlmoe_jax import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from tests import cases, ours, tiny, training

PATTERNS = {
    "uniform": {"mlp_only_layers": []},
    "every_second_layer": {"mlp_only_layers": [], "decoder_sparse_step": 2},
}


def _lowered(pattern: str, layers: int, vision_depth: int = 5) -> Any:
    config = tiny.variant(
        tiny.TINY, text_config={"num_hidden_layers": layers, **PATTERNS[pattern]}, vision_config={"depth": vision_depth}
    )
    model = Qwen3VLMoeForConditionalGeneration.abstract(Qwen3VLMoeConfig.from_hf(config))
    batch = ours.make_batch(config, cases.build(config, [[cases.Text(3), cases.Image(2, 3), cases.Text(5)]]))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    return jax.jit(lambda model, batch: model(batch).logits).lower(model, shapes)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_program_does_not_grow_with_depth(pattern: str) -> None:
    short, deep = (len(_lowered(pattern, layers).as_text()) for layers in (6, 48))
    assert deep < 1.01 * short


def test_the_program_does_not_grow_with_vision_depth() -> None:
    """From 7 blocks on: the run after the last tap then has more than one block in both."""
    short, deep = (len(_lowered("uniform", 2, depth).as_text()) for depth in (7, 27))
    assert deep < 1.01 * short


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_48_layers_compile_like_6(pattern: str) -> None:
    """Interleaved so that a busy machine disturbs both alike; the smallest of three."""
    seconds: dict[int, list[float]] = {6: [], 48: []}
    sizes = {}
    for _ in range(3):
        for layers, times in seconds.items():
            lowered = _lowered(pattern, layers)
            start = time.perf_counter()
            compiled = lowered.compile()
            times.append(time.perf_counter() - start)
            sizes[layers] = compiled.as_text().count("\n")
    short, deep = np.min(seconds[6]), np.min(seconds[48])
    ratio = deep / short
    print(f"{pattern}: {short:.2f} s at 6 layers, {deep:.2f} s at 48, ratio {ratio:.2f}; HLO lines {sizes}")
    assert ratio < 1.3
    assert sizes[48] <= 1.01 * sizes[6]


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["allgather", "all_to_all"])
def test_the_step_does_not_grow_with_the_square_of_the_devices(dispatch: str) -> None:
    """From 2 devices to 8 on the expert axis. Linear would be 1: the CPU's stand-in for all-to-all has a part for each sender."""
    two, eight = (mesh_growth.measure({"expert": n}, dispatch=dispatch, options=training.QUICK) for n in (2, 8))
    assert mesh_growth.exponent(two.lines, eight.lines, 4) < 0.5
    print(f"{dispatch}: compile {two.compile_seconds:.1f} s on 2 devices, {eight.compile_seconds:.1f} s on 8")
    assert mesh_growth.exponent(two.compile_seconds, eight.compile_seconds, 4) < 1.5


@pytest.mark.slow
def test_the_step_does_not_grow_with_experts() -> None:
    """From 8 to 128: the same program on larger arrays, whose step time grows at most as the experts' weights do."""
    few, many = (mesh_growth.measure({}, experts=n, options=training.QUICK, steps=3) for n in (8, 128))
    assert mesh_growth.exponent(few.lines, many.lines, 16) < 0.05
    print(f"8 experts: {few}; 128: {many}")
    assert mesh_growth.exponent(few.compile_seconds, many.compile_seconds, 16) < 0.5
    assert mesh_growth.exponent(few.step_seconds, many.step_seconds, 16) < 1.25
