"""Rows travel to the device of their expert and back (all-to-all expert parallelism). Dropless and exact, whatever the routing.

Each device sends every other only the rows that it owns, so wire bytes follow the routing; an all-gather sends every token to
every device. It pays above some 8 expert shards (docs/scaling.md).

S tokens of this device, k choices, R = S*k rows, D hidden, W devices on the `expert` axis, E experts, e = E/W of this device.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qvlmoe_jax.sharding import active_mesh, on_cpus


def _stand_in(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` where XLA has no lowering for it (CPU): everything is gathered, each takes its own rows."""
    me = jax.lax.axis_index(axis_name)
    rows_WRD = jax.lax.all_gather(operand, axis_name)
    starts_W = jax.lax.all_gather(input_offsets, axis_name)[:, me]
    lands_W = jax.lax.all_gather(output_offsets, axis_name)[:, me]
    for source in range(rows_WRD.shape[0]):
        slot = jnp.arange(output.shape[0]) - lands_W[source]
        mine = (slot >= 0) & (slot < recv_sizes[source])
        picked = jnp.take(rows_WRD[source], starts_W[source] + slot, axis=0, mode="clip")
        output = jnp.where(mine[:, None], picked, output)
    return output


def ragged_all_to_all(*arguments: jax.Array, axis_name: str) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, or its stand-in on a mesh of CPU devices."""
    return (_stand_in if on_cpus(active_mesh()) else jax.lax.ragged_all_to_all)(*arguments, axis_name=axis_name)


@dataclass(frozen=True)
class Exchange:
    """Who sends how many rows where, for one routing; `to_experts` and `back` are each other's inverse.

    Attributes:
      sends: `[W]` rows this device sends to each. receives: `[W]` rows it gets from each.
      counts: `[W,e]` how many rows each device sends to each of this one's experts.
      buffer: rows that may arrive at most.
      remote_starts: `[W]` where this device's rows begin in each receiver's buffer.
      returned_starts: `[W]` where the rows of this device's experts begin in each sender's rows.
    """

    sends: jax.Array
    receives: jax.Array
    counts: jax.Array
    buffer: int
    remote_starts: jax.Array
    returned_starts: jax.Array
    axis_name: str = "expert"

    @classmethod
    def plan(cls, group_sizes_E: jax.Array, num_rows: int, k: int, axis_name: str = "expert") -> Exchange:
        """From this device's rows per expert (all E of them); every device calls it at the same time.

        Args:
          num_rows: R, the static number of rows each device holds.
          k: choices per token. A token chooses distinct experts, so at most min(k, e) of its rows arrive at one device.
        """
        W = jax.lax.axis_size(axis_name)
        me = jax.lax.axis_index(axis_name)
        local = group_sizes_E.shape[0] // W
        counts_WWe = jax.lax.all_gather(group_sizes_E, axis_name).reshape(W, W, local)  # from, to, expert there
        sent_WW = jnp.sum(counts_WWe, axis=2)
        lands = jnp.cumsum(sent_WW, axis=0) - sent_WW  # receivers keep rows in the order of their senders
        leaves = jnp.cumsum(sent_WW, axis=1) - sent_WW
        return cls(
            sends=sent_WW[me],
            receives=sent_WW[:, me],
            counts=counts_WWe[:, me],
            buffer=W * (num_rows // k) * min(k, local),
            remote_starts=lands[me],
            returned_starts=leaves[:, me],
            axis_name=axis_name,
        )

    def to_experts(self, rows_RD: jax.Array) -> jax.Array:
        """This device's rows, sorted by expert, to their owners: `[buffer,D]`, sorted by sender, then expert; zeros after."""
        empty = jnp.zeros((self.buffer, rows_RD.shape[1]), rows_RD.dtype)
        starts = jnp.cumsum(self.sends) - self.sends
        sizes = starts, self.sends, self.remote_starts, self.receives
        return ragged_all_to_all(rows_RD, empty, *(a.astype(jnp.int32) for a in sizes), axis_name=self.axis_name)

    def back(self, rows: jax.Array, num_rows: int) -> jax.Array:
        """The experts' answers, in the order of `to_experts`, to the devices that sent the rows: `[R,D]`, zeros after."""
        empty = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        starts = jnp.cumsum(self.receives) - self.receives
        sizes = starts, self.receives, self.returned_starts, self.sends
        return ragged_all_to_all(rows, empty, *(a.astype(jnp.int32) for a in sizes), axis_name=self.axis_name)

    def experts_of_rows(self) -> jax.Array:
        """`[buffer]` int32, this device's expert that each arrived row is for; e where there is none."""
        W, local = self.counts.shape
        ends = jnp.cumsum(self.counts.reshape(-1))
        which = jnp.searchsorted(ends, jnp.arange(self.buffer), side="right")
        return jnp.where(which < W * local, which % local, local).astype(jnp.int32)
