"""Experts in a scan over layers, whose gradients go into one array for all layers: the tiles of CPU and GPU without a mesh.

R rows, D hidden, L layers, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from qvlmoe_jax.experts import ExpertStack, expert_weights, gradients_of_tile, run_tiles, write_gradients
from qvlmoe_jax.grouped import zero_past
from qvlmoe_jax.tiles import Tiles, for_each_tile

Passed = tuple[jax.Array, jax.Array]
"""gate_up `[L,E,D,2,F]` and down `[L,E,F,D]` as they go from layer to layer."""


@dataclass
class TrainedStack:
    """A stack to read from, and the same weights as they are passed from layer to layer, which nobody reads.

    What is passed comes back as a cotangent through all layers, one array, and each writes its own experts' gradients into it.
    As the gradient of a layer's own weights, they would begin as a copy of those and then be copied into the stack of all.

    `run` hands on what it was passed by assigning it: as a result it would go through the signatures of the block and the layer.
    """

    stack: ExpertStack
    passed: Passed

    def run(self, rows_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        """As `experts.tiled_experts`."""
        rows, self.passed = _passed_experts(rows_RD, group_sizes_E, self.stack, self.passed)
        return rows


def passed_on(stack: ExpertStack | None) -> Passed | None:
    """What a scan over layers has to carry for `TrainedStack`; None if nobody takes the gradient of these experts.

    Inside a `jit` that is differentiated as a whole this cannot be seen, and None is said as well: the layer's own weights then
    have the gradient, which is the same.
    """
    return None if stack is None or not _is_differentiated(stack) else (stack.gate_up, stack.down)


def _is_differentiated(stack: ExpertStack) -> bool:
    seen = []

    @jax.custom_jvp
    def look(gate_up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gate_up, down

    @look.defjvp
    def _(primals: Any, tangents: Any) -> Any:  # is called, and at once, only where one of them has a tangent
        seen.append(True)
        return primals, tangents

    look(stack.gate_up, stack.down)
    return bool(seen)


@jax.custom_vjp
def _passed_experts(rows_RD: jax.Array, group_sizes_E: jax.Array, stack: ExpertStack, passed: Passed) -> tuple[jax.Array, Passed]:
    gate_up, down, first = stack.flat()
    return run_tiles(rows_RD, gate_up, down, group_sizes_E, first), passed


def _passed_forward(*inputs: Any) -> tuple[Any, Any]:
    return _passed_experts(*inputs), inputs[:3]


def _passed_backward(residuals: Any, cotangents: tuple[jax.Array, Passed]) -> tuple[jax.Array, None, None, Passed]:
    rows, group_sizes, stack = residuals
    d_out, d_passed = cotangents
    gate_up, down, first = stack.flat()

    def weights(_: Passed, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        return expert_weights(gate_up, down, first + expert)

    def close(gradients: Passed, expert: jax.Array, sums: tuple[jax.Array, jax.Array]) -> Passed:
        # Set and not added: each layer runs once, so what comes back has zeroes there.
        return write_gradients(gradients, (stack.layer, expert), sums)

    d_rows, d_passed = for_each_tile(Tiles(weights, gradients_of_tile, close), group_sizes, (rows,), d_out, d_passed)
    return zero_past(d_rows, group_sizes), None, None, d_passed


_passed_experts.defvjp(_passed_forward, _passed_backward)
