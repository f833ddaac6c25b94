"""Splash attention in interpret mode, beside dense attention: on meshes, and with blocks of other segments skipped."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import splash
from qvlmoe_jax.attention import attention
from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.errors import ConfigError
from qvlmoe_jax.sharding import make_mesh
from qvlmoe_jax.splash import splash_attention
from tests.test_collectives import normal

SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 3, 0], [1, 1, 1, 2, 2]], 26, axis=1))


def both_attentions(
    sizes: dict[str, Any] | None, *, causal: bool, heads: tuple[int, int], width: int, segments: jax.Array = SEGMENTS
) -> list[tuple[Any, Any]]:
    """Outputs and gradients at columns that hold tokens: `dense`, and splash in interpret mode."""
    B, T = segments.shape
    q, k, v = (normal(i, B, T, n, width) for i, n in enumerate((heads[0], heads[1], heads[1])))
    weight = normal(7, B, T, heads[0], width) * (segments > 0)[..., None, None]

    def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, segment_ids=segments, causal=causal, backend=BackendConfig(attention="dense"))

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, q_segments=segments, kv_segments=segments, causal=causal, interpret=True)

    def run(f: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weight), (0, 1, 2)))(q, k, v)

    expected = run(dense)
    if sizes is None:
        return list(zip(jax.tree.leaves(expected), jax.tree.leaves(run(ours)), strict=True))
    with jax.set_mesh(make_mesh(**sizes)):
        return list(zip(jax.tree.leaves(expected), jax.tree.leaves(run(ours)), strict=True))


@pytest.mark.parametrize(
    "sizes, causal, heads, width",
    [
        (None, True, (4, 2), 32),
        (None, False, (2, 2), 72),  # the vision tower's head dim, padded to 128
        ({"context": 2, "tensor": 4}, True, (4, 2), 16),  # more tensor shards than kv heads
        ({"fsdp": 2, "context": 2, "tensor": 2}, True, (4, 2), 16),
    ],
    ids=["text", "vision", "kv heads replicated", "fsdp context tensor"],
)
def test_splash_is_dense_attention(sizes: dict[str, Any] | None, causal: bool, heads: tuple[int, int], width: int) -> None:
    for dense, found in both_attentions(sizes, causal=causal, heads=heads, width=width):
        np.testing.assert_allclose(dense, found, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(dense)))))


DOCUMENTS = np.repeat([[1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0]], [200, 56, 150, 306, 100, 84], axis=1)
"""Rows of seven blocks of 128: padded behind, padded in front too, and empty."""


@pytest.mark.parametrize(
    "causal, sizes", [(True, None), (False, None), (True, {"context": 2})], ids=["causal", "all pairs", "causal context"]
)
def test_splash_skips_blocks_of_other_segments(
    causal: bool, sizes: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers and gradients are those of dense attention, and a block that is skipped is not read: NaN in it stays there."""
    monkeypatch.setattr(splash, "_BLOCK", 128)
    for dense, found in both_attentions(sizes, causal=causal, heads=(4, 2), width=32, segments=jnp.asarray(DOCUMENTS)):
        np.testing.assert_allclose(dense, found, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(dense)))))
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [256, 384, 256], axis=1))
    q, k, v = (normal(i, 1, 896, 2, 32) for i in range(3))
    lost = jnp.where(segments[..., None, None] == 2, jnp.nan, v)
    run = jax.jit(functools.partial(splash_attention, causal=causal, interpret=True, q_segments=segments, kv_segments=segments))
    whole, without = run(q, k, v), run(q, k, lost)
    np.testing.assert_array_equal(jnp.isnan(without[..., 0, 0]), segments == 2)
    np.testing.assert_array_equal(whole[segments != 2], without[segments != 2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_blocks_run_that_share_a_segment_and_the_next_is_loaded(
    causal: bool, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of a device's rows by itself."""
    monkeypatch.setattr(splash, "_BLOCK", 128)
    segments = DOCUMENTS[rows]
    kernel = splash._kernel(2, 896, 896, causal=causal, shards=1, interpret=True)
    found = splash.only(kernel, splash.running(kernel, jnp.asarray(segments), jnp.asarray(segments)))
    same = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    needed = (np.tril(same) if causal else same).reshape(-1, 7, 128, 7, 128).any((2, 4))
    needed[:, :, 0] |= ~needed.any(2)  # blocks of padding alone
    by_key = needed.swapaxes(1, 2)
    for info, expected in ((found.fwd_mask_info, needed), (found.dq_mask_info, needed), (found.dkv_mask_info, by_key)):
        runs, loaded = np.asarray(info.block_mask)[0] > 0, np.asarray(info.data_next)[0]
        if expected is by_key:  # the grid goes through the queries of one block of keys after the other
            runs, loaded = runs.T, loaded.T
        np.testing.assert_array_equal(runs.reshape(expected.shape), expected)
        row, _, block = np.indices(expected.shape)
        np.testing.assert_array_equal(loaded.reshape(expected.shape)[expected], (row * 7 + block)[expected])
        in_order, next_ = runs.ravel(), loaded.ravel()
        behind = [i for i in range(runs.size - 1) if not in_order[i] and in_order[i:].any()]
        assert all(next_[i] == next_[i + 1] for i in behind)  # nothing is loaded for a block that is skipped


def test_splash_is_what_auto_means_on_tpu() -> None:
    assert BackendConfig().resolve("tpu").attention == "splash"
    assert BackendConfig().resolve("tpu").experts == "ragged_dot"
    assert BackendConfig().resolve("cpu").attention == "auto"
    assert BackendConfig(attention="chunked").resolve("tpu").attention == "chunked"
    assert BackendConfig(attention="splash").attention_kernel(1024) == "chunked"  # a chunk of a prefill
    with pytest.raises(ConfigError, match="splash"):
        BackendConfig(attention="magic")  # pyright: ignore[reportArgumentType]
