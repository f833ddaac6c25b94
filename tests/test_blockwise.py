"""Attention at once and by blocks: numbers and gradients of its definition, only blocks that share a segment, linear memory."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import (
    BackendConfig,
    Batch,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    blocks,
    dense,
    make_mesh,
    splash,
)
from qvlmoe_jax.attention import attention
from qvlmoe_jax.blocks import columns, cut, spans
from qvlmoe_jax.blockwise import blockwise_attention
from qvlmoe_jax.dense import dense_attention
from tests import cases, tiny, training
from tests.plain import plain_attention
from train.aot import abstract_batch
from train.config import LossConfig
from train.optim import make_optimizer
from train.state import init_state
from train.step import make_train_step

SEGMENTS = {
    "one document": lambda rng, B, T: np.ones((B, T), np.int32),
    "padding around": lambda rng, B, T: np.pad(np.ones((B, T - 9), np.int32), ((0, 0), (4, 5))),
    "packed": lambda rng, B, T: np.sort(rng.integers(0, 6, (B, T))).astype(np.int32)[:, ::-1],
    "in order": lambda rng, B, T: np.sort(rng.integers(1, 9, (B, T))).astype(np.int32),
    "scattered": lambda rng, B, T: rng.integers(0, 4, (B, T)).astype(np.int32),
    "no token": lambda rng, B, T: np.stack([np.zeros(T), *[np.ones(T)] * (B - 1)]).astype(np.int32),
}


def arrays(T: int = 37, *, B: int = 2, N: int = 6, K: int = 2) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, T, heads, 8)) for key, heads in zip(keys, (N, K, K), strict=True)]


def compare(kernel: Any, segments: np.ndarray, *, causal: bool) -> None:
    """A kernel's output and gradients beside plain attention's, at the columns that mean something."""
    qkv = arrays(segments.shape[1], B=len(segments))
    valid, ids = jnp.asarray(segments > 0)[..., None, None], jnp.asarray(segments)

    def run(attend: Any) -> list[jax.Array]:
        def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.where(valid, attend(*qkv), 0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
        return [out, *gradients]

    ours = run(lambda *qkv: kernel(*qkv, q_segments=ids, kv_segments=ids, causal=causal))
    plain = run(lambda *qkv: plain_attention(*qkv, segment_ids=ids, causal=causal))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6, rtol=1e-5)


BLOCKS = [(kind, causal, block, 2) for kind in SEGMENTS for causal, block in ((True, 8), (False, 5))]


@pytest.mark.parametrize(("kind", "causal", "block", "wide"), [*BLOCKS, ("packed", True, 8, 1), ("packed", False, 4, None)])
def test_blocks_are_attention(kind: str, causal: bool, block: int, wide: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of keys at a time and a rest, one by one, half of them."""
    if wide:
        monkeypatch.setattr(blocks, "PRODUCT", wide * 3 * block**2 * 8)
    segments = SEGMENTS[kind](np.random.default_rng(0), 2, 37)
    compare(functools.partial(blockwise_attention, block=block), segments, causal=causal)


ROWS = [(kind, causal, 2) for kind in SEGMENTS for causal in (True, False)]


@pytest.mark.parametrize(("kind", "causal", "rows"), [*ROWS, ("in order", True, 5)])
def test_all_at_once_is_attention(kind: str, causal: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows two by two with one left, and together."""
    monkeypatch.setattr(dense, "_SCORES_BYTES", rows * 4 * 6 * 37**2)
    compare(dense_attention, SEGMENTS[kind](np.random.default_rng(0), 5, 37), causal=causal)


@pytest.mark.parametrize("kernel", [dense_attention, functools.partial(blockwise_attention, block=16)])
def test_scores_of_any_size(kernel: Any) -> None:
    """Of 1e30, where only the largest counts, and of next to nothing."""
    q, k, v = arrays(37)
    ids = jnp.asarray(SEGMENTS["in order"](np.random.default_rng(0), 2, 37))
    for scale in (1e15, 1e3, 1e-20):
        ours = kernel(q * scale, k * scale, v, q_segments=ids, kv_segments=ids, causal=True)
        plain = plain_attention(q * scale, k * scale, v, segment_ids=ids, causal=True)
        np.testing.assert_allclose(np.asarray(ours), np.asarray(plain), atol=2e-6, rtol=1e-5)


def test_padding_is_zero_and_sends_no_gradient() -> None:
    ids = jnp.asarray(SEGMENTS["padding around"](np.random.default_rng(0), 2, 37))

    def run(*qkv: jax.Array) -> jax.Array:
        return blockwise_attention(*qkv, q_segments=ids, kv_segments=ids, causal=True, block=8)

    out, pullback = jax.vjp(run, *arrays())
    assert not np.asarray(out)[:, :4].any() and not np.asarray(out)[:, -5:].any()
    for gradient in pullback(jnp.ones_like(out)):
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[:, :4].any()


def _pairs(segments: np.ndarray, *, block: int, causal: bool) -> int:
    """Pairs of columns in the blocks that the loops visit."""
    ids = cut(jnp.asarray(segments), min(block, segments.shape[1]))
    where = spans(ids, ids, jnp.int32(0), causal)
    return int(jnp.sum(jnp.maximum(where.end - where.begin, 0))) * ids.shape[2] ** 2


def test_small_pictures_beside_a_big_one_cost_what_they_need() -> None:
    """One of 4096 patches and 64 of 64: the work of the loops, and of the TPU's kernel, is at most 1.2 of the exact work."""
    config = Qwen3VLMoeConfig.from_hf(tiny.TINY)
    unit = config.vision_config.merge_unit
    grids = np.array([(1, 64, 64)] + [(1, 8, 8)] * 64)
    order = np.random.default_rng(0).permutation(len(grids))
    grids = grids[order]
    ids = np.concatenate([np.r_[np.full(h * w // unit, config.image_token_id), 1] for _, h, w in grids])[None]
    pixels = np.zeros((int(grids.prod(1).sum()), config.vision_config.patch_width), np.float32)
    batch = Batch.from_hf(config, input_ids=ids, pixel_values=pixels, image_grid_thw=grids)
    rows = batch.patch_segment_ids[0]
    exact = int((grids.prod(1) ** 2).sum())
    done = _pairs(rows, block=columns(rows.shape[1], BackendConfig().attention_chunk, 1), causal=False)
    print(f"pairs of patches: {done / exact:.3f} of the exact work")
    assert exact <= done <= 1.11 * exact
    kernel = splash._kernel(1, rows.shape[1], rows.shape[1], causal=False, shards=1, interpret=True)
    found = splash.only(kernel, splash.running(kernel, jnp.asarray(rows), jnp.asarray(rows)))
    for info in (found.fwd_mask_info, found.dq_mask_info, found.dkv_mask_info):
        assert exact <= int((np.asarray(info.block_mask) > 0).sum()) * splash._BLOCK**2 <= 1.11 * exact
    assert rows.size == len(pixels)  # no padding in the linear maps


def test_causal_blocks_above_the_diagonal_and_other_documents_are_skipped() -> None:
    one, four = np.ones((1, 4096), np.int32), np.repeat(np.arange(1, 5, dtype=np.int32), 1024)[None]
    assert _pairs(one, block=128, causal=True) < 0.53 * 4096**2
    assert _pairs(four, block=128, causal=True) < 4 * 0.57 * 1024**2
    assert _pairs(np.zeros((1, 4096), np.int32), block=128, causal=True) == 0


@pytest.mark.parametrize("sizes", [{"context": 4, "fsdp": 2}, {"tensor": 2, "context": 2, "data": 2}, {"context": 8}])
@pytest.mark.parametrize("causal", [True, False])
def test_spread_over_a_mesh(sizes: dict[str, Any], causal: bool) -> None:
    """Queries over context meet all keys; kv heads that tensor does not divide are shared; rows of pictures take context."""
    backend = BackendConfig(attention="chunked", attention_chunk=8)
    segments = jnp.asarray(SEGMENTS["in order"](np.random.default_rng(0), 2, 64))
    qkv = arrays(64, N=6, K=3)
    rows = 4 if not causal else 1
    qkv, segments = [jnp.concatenate([a] * rows) for a in qkv], jnp.concatenate([segments] * rows)

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(*qkv, segment_ids=segments, causal=causal, backend=backend)))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    alone = gradient(*qkv)
    with jax.set_mesh(make_mesh(**sizes)):
        spread = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=1e-5)


LENGTHS = (4096, 16384, 65536)


def exponent(sizes: list[float]) -> float:
    """Of the power law through a size at each of LENGTHS."""
    return float(np.polyfit(np.log(LENGTHS[: len(sizes)]), np.log(sizes), 1)[0])


def _temporaries(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes


def described() -> Qwen3VLMoeConfig:
    return Qwen3VLMoeConfig.from_hf(tiny.variant(tiny.TINY, text_config={"num_hidden_layers": 2, "mlp_only_layers": []}))


def test_memory_of_the_forward_pass_grows_linearly() -> None:
    sizes = []
    for length in LENGTHS:
        model = Qwen3VLMoeForConditionalGeneration.abstract(described())
        batch = cases.build(tiny.TINY, [[cases.Text(1), cases.Image(2, 2), cases.Text(3)]])
        batch = Batch.from_hf(model.config, **batch, text_length=length, row_patches=length)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
        compiled = jax.jit(lambda model, batch: model(batch, logits_to_keep=1).logits).lower(model, shapes).compile()
        sizes.append(_temporaries(compiled))
    print(f"temporaries of the forward pass, MiB: {[round(s / 2**20) for s in sizes]}, exponent {exponent(sizes):.3f}")
    assert exponent(sizes) <= 1.1


@pytest.mark.slow
def test_memory_of_the_training_step_grows_linearly(tmp_path: Path) -> None:
    sizes = []
    for length in LENGTHS:
        data = {"sources": [{"path": "unused"}], "sequence_length": length, "batch_rows": 1, "row_patches": length}
        directory = training.write_model(tmp_path / f"model{length}", training.SMALL)
        config = training.make_config(tmp_path / f"run{length}", directory, data=data)
        model = Qwen3VLMoeForConditionalGeneration.abstract(
            Qwen3VLMoeConfig.from_json(directory), backend=BackendConfig(remat="full").resolve("cpu")
        )
        tx = make_optimizer(config.optimizer)
        state = jax.eval_shape(lambda params, tx=tx: init_state(params, tx), model.params())
        step = make_train_step(model, tx, lambda _: jnp.float32(1e-3), loss=LossConfig(chunk_tokens=1024))
        compiled = step.lower(state, abstract_batch(config, model.config)).compile()
        sizes.append(_temporaries(compiled))
    print(f"temporaries of the training step, MiB: {[round(s / 2**20) for s in sizes]}, exponent {exponent(sizes):.3f}")
    assert exponent(sizes) <= 1.1


@pytest.mark.slow
def test_resident_memory_of_a_real_process_grows_linearly() -> None:
    """What one forward pass adds to a process, at its peak: one document of 4096, 16384 and 65536 tokens."""
    sizes = []
    for length in LENGTHS:
        done = subprocess.run(
            [sys.executable, "-c", f"from tests.test_blockwise import run_forward; run_forward({length})"],
            capture_output=True, text=True, check=True, timeout=900, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        sizes.append(float(done.stdout.split()[-1]))
    print(f"resident memory of the forward pass, MiB: {[round(s / 2**20) for s in sizes]}, exponent {exponent(sizes):.3f}")
    assert exponent(sizes) <= 1.1


def run_forward(length: int) -> None:
    """Prints the bytes by which a forward pass raises this process's peak of resident memory."""
    text = {"num_hidden_layers": 1, "mlp_only_layers": [], "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3VLMoeConfig.from_hf(tiny.variant(tiny.TINY, text_config=text))
    from flax import nnx

    model = Qwen3VLMoeForConditionalGeneration.from_config(config, nnx.Rngs(0))
    batch = Batch.from_hf(config, input_ids=np.ones((1, length), np.int64))
    run = jax.jit(lambda model, batch: model(batch, logits_to_keep=1).logits).lower(model, batch).compile()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten

    def resident(kind: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

    before = resident("VmRSS")
    jax.block_until_ready(run(model, batch))
    print(resident("VmHWM") - before)


def test_blocks_of_queries() -> None:
    """As many as the user asks for at most, fewer where a kv head serves many, even ones, and keys until a product is large."""
    assert [columns(4096, 512, group) for group in (1, 2, 4, 8, 16)] == [512, 512, 256, 128, 128]
    assert [columns(length, 512, 1) for length in (10, 512, 600, 768, 1100)] == [10, 512, 320, 384, 384]
    assert columns(4096, 16, 1000) == 16
    assert [blocks.wide(count, 512, 512, 72) for count in (1, 2, 8, 100)] == [1, 1, 4, 4]


def test_blocks_over_a_cache_fit_the_processors() -> None:
    assert [BackendConfig().attention_block(heads) for heads in (1, 4, 8, 16, 32, 64)] == [512, 512, 256, 256, 128, 128]
    assert BackendConfig(attention_chunk=16).attention_block(1000) == 16
