"""Patches in pieces: the same numbers and gradients, and only where it serves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvlmoe_jax import make_mesh, pieces
from tests import tolerances

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)) / 8, jnp.float32)


def mlp(x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ W) @ W.T


def seen(x: jax.Array, monkeypatch: pytest.MonkeyPatch, piece: int) -> list[tuple[int, ...]]:
    """Shapes that the function is given, for pieces of so many rows at most."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece * 32 * 4)
    shapes: list[tuple[int, ...]] = []

    def f(x: jax.Array) -> jax.Array:
        shapes.append(x.shape)
        return mlp(x)

    got = pieces.in_pieces(f, x, width=32)
    np.testing.assert_allclose(got, mlp(x), rtol=tolerances.MODULE, atol=tolerances.MODULE)
    return shapes


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("shape, piece, given", [
    ((2, 96, 8), 64, (1, 64, 8)),  # across rows of patches
    ((1, 96, 8), 40, (1, 32, 8)),  # equal pieces only
    ((1, 96, 8), 96, (1, 96, 8)),
    ((1, 97, 8), 40, (1, 97, 8)),  # no divisor
    ((1, 96, 8), 1, (1, 96, 8)),  # would be more pieces than 64
    ((0, 96, 8), 40, (0, 96, 8)),  # no pictures
])  # fmt: skip
def test_equal_pieces(shape: tuple[int, ...], piece: int, given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(seen(normal(*shape), monkeypatch, piece)) == {given}


def test_gradients_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 32 * 32 * 4)
    x, direction = normal(2, 96, 8), normal(2, 96, 8)[::-1]
    found = jax.jit(jax.grad(lambda x: jnp.sum(pieces.in_pieces(mlp, x, width=32) * direction)))(x)
    np.testing.assert_allclose(
        found, jax.grad(lambda x: jnp.sum(mlp(x) * direction))(x), rtol=tolerances.MODULE, atol=tolerances.MODULE
    )


def test_a_mesh_keeps_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert seen(normal(2, 96, 8), monkeypatch, 32) == [(2, 96, 8)]
