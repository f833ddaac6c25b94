"""The true training step of a config, compiled for devices that nobody has: abstract state, abstract batch, no memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qvlmoe_jax import Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from qvlmoe_jax.adapters import adapt, split_adapters
from qvlmoe_jax.sharding import batch_shardings
from train.config import TrainConfig
from train.errors import DoesNotFit
from train.lora import as_library
from train.optim import make_optimizer, schedule
from train.router import bias_shape
from train.run_files import side_directory
from train.state import TrainState, init_state, state_shardings
from train.step import make_train_step

GIB = 2**30
_OUT_OF_MEMORY = re.compile(r"[Rr]an out of memory on HBM[^\n]*?exceeds[^\n]*?\)")
"""What the TPU compiler says of a program that it cannot fit into a device, up to the two sizes."""


@dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      hlo: the optimised program's text.
      memory: bytes per device: `arguments` (state and batch), `output` that is not donated, `temporaries`, `peak` (all live at
        once, as the compiler says).
      seconds: of tracing and compiling. host_gib: peak memory of this process.
    """

    hlo: str
    memory: Mapping[str, float]
    seconds: float
    host_gib: float


def abstract_batch(config: TrainConfig, model: Qwen3VLMoeConfig) -> Batch:
    """The Batch of one step, `[A,B,T]` and `[A,G,R,P,..]`, as ShapeDtypeStructs."""
    data = config.data
    A, B, T = data.accumulation, data.batch_rows, data.sequence_length
    G, R, P = data.num_groups(config.mesh.batch_shards), data.vision_rows, data.row_patches

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((A, *shape), dtype)

    return Batch(
        input_ids=of(np.int32, B, T),
        position_ids=of(np.int32, 3, B, T),
        segment_ids=of(np.int32, B, T),
        visual_index=of(np.int32, B, T),
        pixel_values=of(np.float32, G, R, P, model.vision_config.patch_width),
        patch_segment_ids=of(np.int32, G, R, P),
        patch_coords=of(np.int32, G, R, P, 2),
        pos_index=of(np.int32, G, R, P, 4),
        pos_weight=of(np.float32, G, R, P, 4),
        labels=of(np.int32, B, T),
    )


def model_config(config: TrainConfig) -> Qwen3VLMoeConfig:
    """The model's config, from the directory that the run names."""
    return Qwen3VLMoeConfig.from_json(side_directory(config.model.path))


def abstract_state(config: TrainConfig, model: Qwen3VLMoeForConditionalGeneration, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with the shardings the run would give them."""

    def make(params: Any) -> TrainState:
        return init_state(
            params,
            make_optimizer(config.optimizer),
            freeze=config.model.freeze,
            param_dtype=jnp.dtype(config.model.param_dtype),
            compute_dtype=jnp.dtype(config.model.compute_dtype),
            router_bias=bias_shape(config.router, model.config),
        )

    if config.lora is None:
        state = jax.eval_shape(make, model.params())
    else:
        adapters, base = split_adapters(model.params())
        state = dataclasses.replace(jax.eval_shape(make, adapters), frozen=base)
    return jax.tree.map(_placed, state, state_shardings(state, mesh))


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compile_step(config: TrainConfig, mesh: Mesh, *, platform: str = "tpu") -> Program:
    """Compiles `train_step` of the config for the mesh's devices.

    Args:
      platform: of those devices; settles the backend's `auto` choices.
    Raises:
      DoesNotFit: the compiler finds no way to hold the step in a device's memory.
    """
    start = time.perf_counter()
    described = model_config(config)
    compute_dtype = jnp.dtype(config.model.compute_dtype)
    kept = jnp.float32 if config.lora is None else compute_dtype  # a LoRA run's base is held in the compute dtype
    model = Qwen3VLMoeForConditionalGeneration.abstract(described, dtype=kept, backend=config.backend.resolve(platform))
    if config.lora is not None:
        model = adapt(model, as_library(config.lora), dtype=compute_dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        state = abstract_state(config, model, mesh)
        batch = abstract_batch(config, described)
        batch = jax.tree.map(_placed, batch, batch_shardings(batch, mesh))
        step: Any = make_train_step(
            model,
            make_optimizer(config.optimizer),
            schedule(config.schedule, config.optimizer.learning_rate, config.steps),
            loss=config.loss,
            optimizer=config.optimizer,
            router=config.router,
            compute_dtype=compute_dtype,
            state=state,
            mesh=mesh,
        )
        lowered = step.lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (short := _OUT_OF_MEMORY.search(str(error))) is None:
                raise
            raise DoesNotFit(short[0]) from None
    seconds = time.perf_counter() - start
    return Program(
        compiled.as_text() or "", _memory(compiled), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    )


def _memory(compiled: Any) -> dict[str, float]:
    sizes = compiled.memory_analysis()
    alias = sizes.alias_size_in_bytes
    peak = getattr(sizes, "peak_memory_in_bytes", 0)
    parts = {
        "arguments": float(sizes.argument_size_in_bytes),
        "output": float(sizes.output_size_in_bytes - alias),  # the donated state is written in place
        "temporaries": float(sizes.temp_size_in_bytes),
        "program": float(sizes.generated_code_size_in_bytes),
    }
    return {**parts, "peak": float(peak or sum(parts.values()))}
