"""The GPU's attention kernel, interpreted: outputs and gradients of dense attention, with segments, shared heads and a mesh."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax.backend import BackendConfig
from qvlmoe_jax.flash import flash_attention, flash_serves
from qvlmoe_jax.sharding import make_mesh
from tests.plain import plain_attention

SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 3, 0], [1, 1, 1, 2, 2]], 30, axis=1))


@pytest.mark.parametrize(
    "sizes, causal, heads, width",
    [
        (None, True, (4, 2), 32),
        (None, False, (2, 2), 72),  # the vision tower's head dim, which the kernel pads
        ({"fsdp": 2, "tensor": 4}, True, (4, 2), 16),  # more tensor shards than kv heads
    ],
    ids=["text", "vision", "mesh"],
)
def test_flash_is_dense_attention(sizes: dict[str, Any] | None, causal: bool, heads: tuple[int, int], width: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, SEGMENTS.shape[1], n, width)), jnp.float32) for n in (heads[0], *[heads[1]] * 2)]
    weight = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32) * (SEGMENTS > 0)[..., None, None]

    def run(f: Any, **options: Any) -> list[jax.Array]:
        def total(*qkv: jax.Array) -> jax.Array:
            return jnp.sum(f(*qkv, segment_ids=SEGMENTS, causal=causal, **options) * weight)

        return jax.tree.leaves(jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*arrays))

    expected = run(plain_attention)
    with jax.set_mesh(make_mesh(**sizes)) if sizes else nullcontext():
        for dense, flash in zip(expected, run(flash_attention, interpret=True), strict=True):
            np.testing.assert_allclose(flash, dense, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(dense)))))


def test_where_it_serves() -> None:
    assert flash_serves(jnp.dtype(jnp.bfloat16), causal=True)
    assert not flash_serves(jnp.dtype(jnp.float32), causal=True)  # TF32 products
    with jax.set_mesh(make_mesh(context=2)):
        assert not flash_serves(jnp.dtype(jnp.bfloat16), causal=True)
        assert flash_serves(jnp.dtype(jnp.bfloat16), causal=False)  # pictures are not cut
    assert BackendConfig(attention="flash").resolve("gpu").attention_kernel(1024) == "chunked"  # a chunk of a prefill
