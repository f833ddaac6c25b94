"""The training program, from top to bottom: open, resume, step, and once in a while log, validate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qvlmoe_jax import Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, make_mesh
from qvlmoe_jax.adapters import adapt
from qvlmoe_jax.checkpoint import left_out_router_bias, load_params, open_weights
from qvlmoe_jax.errors import ConfigError
from train import early_end, processes
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.config_tree import plain
from train.data_config import DataConfig
from train.errors import TrainingError
from train.evaluate import make_evaluate, validate
from train.feed import Counts, Data, DataIterator, Feed, Interrupted, Shares, WholeBatches
from train.flops import peak_tflops, step_flops
from train.lora import Base, as_library, first_adapters, load_base
from train.metrics import Metrics, memory_gib, router_load
from train.optim import make_optimizer, schedule
from train.router import bias_shape
from train.run_files import EXPORT_DIR, HF_DIR, export, export_adapted, only_writer, save_config, side_directory, start_run
from train.state import TrainState, all_params, init_state
from train.step import make_train_step

log = logging.getLogger("train")

SHOWN = ("loss", "grad_norm", "learning_rate", "accuracy", "tokens_per_second", "step_seconds", "data_wait_fraction", "mfu")
SHOWN_VALIDATION = ("validation_loss", "token_accuracy", "exact_match")


@dataclass
class Interrupt:
    """SIGTERM sets `asked`; all processes save and leave before the next step that none of them has begun."""

    asked: bool = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches SIGTERM inside the block (in the main thread; elsewhere Python allows no handlers)."""

        def note(*_: object) -> None:
            self.asked = True

        try:
            before = signal.signal(signal.SIGTERM, note)
        except ValueError:
            before = None
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


@dataclass
class Interval:
    """The steps since the last line."""

    started: float = field(default_factory=time.perf_counter)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    paused: float = 0.0  # validation and saving, which are not step time

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block is left out of the step time."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def summary(self, waited: float, flops: Callable[[Counts], float], peak_flops: float | None) -> dict[str, Any]:
        """Averages over the interval, of all processes (a collective). Waits for the device.

        Args:
          waited: seconds that this process waited for data; the longest of all counts. flops: what the model needs for a batch.
        """
        steps = jax.device_get(self.metrics)
        seconds = time.perf_counter() - self.started - self.paused
        said = processes.gather({"waited": waited, **vars(self.counts)})
        waited = max(own.pop("waited") for own in said)
        counts = sum((Counts(**own) for own in said), Counts())
        tokens = np.array([step["tokens"] for step in steps], np.float64)
        weights = tokens if tokens.any() else None  # without a target token all steps count alike
        last = steps[-1]
        means = {
            key: None if last[key] is None else float(np.average([float(step[key]) for step in steps], weights=weights))
            for key in ("loss", "aux_loss", "z_loss", "router_z_loss", "accuracy")
        }
        routers = [step["router"] for step in steps if step["router"] is not None]
        load = router_load(jax.tree.map(lambda *sums: np.sum(sums, axis=0), *routers), last["router_bias"]) if routers else None
        achieved = flops(counts) / seconds
        return {
            **means,
            "grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
            "learning_rate": float(last["learning_rate"]),
            "bad_steps": int(last["bad_steps"]),
            "bad_in_a_row": int(last["bad_in_a_row"]),
            "tokens": float(tokens.sum()),
            "tokens_per_second": counts.tokens / seconds,
            "samples_per_second": counts.samples / seconds,
            "step_seconds": seconds / len(steps),
            "data_wait_seconds": waited / len(steps),
            "data_wait_fraction": waited / seconds,
            "model_tflops_per_second": achieved / 1e12,
            "mfu": None if peak_flops is None else achieved / peak_flops,
            "text_padding": 1 - counts.tokens / max(counts.slots, 1),
            "vision_padding": 1 - counts.patches / counts.patch_slots if counts.patch_slots else None,
            "router": load,
            **memory_gib(),
        }


def open_mesh(config: TrainConfig) -> Mesh | None:
    """The mesh the config asks for, or None when every axis is 1.

    Raises:
      ConfigError: fewer devices than that; or, with several processes, more: one of them might have no part in the mesh.
    """
    sizes = plain(config.mesh)
    wanted, found = math.prod(sizes.values()), jax.device_count()
    if jax.process_count() > 1 and wanted != found:
        raise ConfigError(
            f"mesh has {wanted} device{'s' * (wanted > 1)}, and the {jax.process_count()} processes have {found}; expected mesh "
            f"sizes whose product is {found}"
        )
    return None if all(size == 1 for size in sizes.values()) else make_mesh(**sizes)


def open_model(config: TrainConfig, mesh: Mesh | None) -> tuple[Qwen3VLMoeForConditionalGeneration, Callable[[], dict[str, Any]]]:
    """The model's structure (abstract parameters) and what makes or reads its parameters: a LoRA run's are its adapters.

    Raises:
      ConfigError: a path or a kernel that is not for here.
    """
    if config.backend.attention == "splash" and jax.default_backend() != "tpu":
        raise ConfigError(f"backend.attention = splash is the TPU's kernel, and this is a {jax.default_backend()}; expected auto")
    side = side_directory(config.model.path)
    model_config = Qwen3VLMoeConfig.from_json(side)
    abstract = Qwen3VLMoeForConditionalGeneration.abstract(model_config, backend=config.backend)

    if config.lora is not None:
        abstract = adapt(abstract, as_library(config.lora), dtype=jnp.dtype(config.model.compute_dtype))
        return abstract, lambda: first_adapters(config, abstract, mesh)

    def params() -> dict[str, Any]:
        dtype = jnp.dtype(config.model.param_dtype)
        if not config.model.from_scratch:
            return load_params(open_weights(config.model.path), dtype=dtype, mesh=mesh)
        rngs = nnx.Rngs(config.seed)
        return Qwen3VLMoeForConditionalGeneration.from_config(model_config, rngs, dtype=dtype, mesh=mesh).params()

    return abstract, params


@functools.lru_cache(maxsize=1)  # validation opens its data anew each time, and a real tokenizer takes a second to read
def _processor(directory: Path) -> Any:
    from qvlmoe_jax.processor import Processor

    return Processor.from_pretrained(directory)


def open_data(config: TrainConfig, section: DataConfig, mesh: Mesh | None, began_with: int | None = None) -> Data:
    """The data pipeline of one section (`data` or `validation.data`) for this process.

    Args:
      began_with: vision groups of the run that is resumed.
    """
    from train.data import make_data

    hf = Path(config.run).resolve() / HF_DIR
    shares = Shares.on(mesh, section.num_groups(config.mesh.batch_shards, began_with))
    return make_data(section, Qwen3VLMoeConfig.from_json(hf), _processor(hf), shares=shares)


def train(
    config: TrainConfig,
    *,
    data: DataIterator | None = None,
    validation: Callable[[], Iterable[Batch]] | None = None,
) -> TrainState:
    """Runs the config to its last step, from the newest checkpoint of its run if there is one.

    Args:
      data: replaces the pipeline of `config.data`: whole batches, the same in every process. validation: gives such held-out
        batches anew each time, instead of `config.validation.data`.
    Returns:
      the final state. After SIGTERM, the state it saved: its step is then less than `config.steps`.
    Raises:
      ConfigError, CheckpointError, TrainingError: what is wrong, in a line.
    """
    mesh = open_mesh(config)
    if config.profile is not None:  # where no trace can be written is said now: jax would raise it after the last step
        Path(config.profile).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        _open_run(config, stack)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        base = None if config.lora is None else Base(config)
        model, make_params = open_model(config, mesh)
        tx = make_optimizer(config.optimizer)
        compute_dtype = jnp.dtype(config.model.compute_dtype)
        state = init_state(
            make_params(),
            tx,
            freeze=config.model.freeze,
            param_dtype=jnp.dtype(config.model.param_dtype),
            compute_dtype=compute_dtype,
            router_bias=bias_shape(config.router, model.config),
            seed=config.seed,
            mesh=mesh,
        )
        if base is not None:
            state = dataclasses.replace(state, frozen=load_base(config, base.weights, mesh))
        checkpoints = stack.enter_context(Checkpoints(config.run, config.checkpoint, adapters=base is not None))
        if validation is None and config.validation is not None:
            _open_validation(config, mesh).close()  # what is wrong with it is said now, not at the first validation
        restored = checkpoints.restore(state)
        streams = None
        if restored is not None:
            state, loop = restored
            streams = loop["data"]
        if data is not None:
            source: Data = WholeBatches(data)
        else:
            source = processes.in_all(lambda: open_data(config, config.data, mesh, len(streams) if streams else None))
            stack.callback(source.close)
        if streams is not None:
            states = {str(group): stream for group, stream in enumerate(streams)}
            processes.in_all(lambda: source.set_state(states))
            if processes.is_first():
                log.warning("resumed from the checkpoint of step %d", int(state.step))
        if processes.is_first():
            save_config(config)
            if base is not None:
                base.record()
        start = int(state.step)
        metrics = Metrics(config.run, config.metrics, plain(config), resume_step=start)
        stack.callback(metrics.close)
        step_fn = make_train_step(
            model,
            tx,
            schedule(config.schedule, config.optimizer.learning_rate, config.steps),
            loss=config.loss,
            optimizer=config.optimizer,
            router=config.router,
            compute_dtype=compute_dtype,
            state=state,
            mesh=mesh,
        )
        evaluate = make_evaluate(model, chunk_tokens=config.loss.chunk_tokens, compute_dtype=compute_dtype, mesh=mesh)
        interrupt = Interrupt()
        feed = Feed(source, mesh=mesh, stop=lambda: interrupt.asked)
        stack.callback(feed.close)
        stack.enter_context(interrupt.listening())
        peak_flops = _peak_flops(config, mesh)

        trained, frozen = (jax.tree.map(jax.typeof, part) for part in (state.params, state.frozen))

        def log_interval(done: int) -> None:
            nonlocal interval
            values = interval.summary(feed.waited, lambda c: step_flops(model.config, c, trained, frozen), peak_flops)
            feed.waited, interval = 0.0, Interval()
            metrics.write("train", done, values, show=SHOWN)
            _check_bad_steps(config, done, values)

        def keep(done: int) -> str | None:
            if interval.metrics:
                log_interval(done)
            return early_end.keep(checkpoints, done, config, state, fed)

        interval, compiled, fed = Interval(), None, None
        for number in range(start, config.steps):
            if config.profile is not None and number == min(start + 3, config.steps - 1):
                jax.profiler.start_trace(config.profile)
                stack.callback(jax.profiler.stop_trace)
            try:
                ahead = next(feed)
            except StopIteration:
                raise early_end.ended(config, number, keep(number), own_data=data is None) from None
            except Interrupted:
                saved = keep(number) or "no step to save yet"
                if processes.is_first():
                    print(f"SIGTERM: {saved}; the same command goes on from there", flush=True)
                return state
            except Exception:
                # Where reading failed all processes are here. Where another one died this one is alone, and must not wait for it.
                saved = keep(number) if feed.failed else None
                if saved is not None and processes.is_first():
                    log.warning("the data failed: %s; the same command goes on from there once the cause is mended", saved)
                raise
            fed = ahead
            if interval.metrics:  # at most one step is in flight behind the one that starts
                jax.block_until_ready(interval.metrics[-1]["loss"])
                _check_bad_steps(config, number, interval.metrics[-1])
            if compiled is None:
                feed.waited = 0.0  # opening the data is not waiting for it
                with interval.pause():
                    compiled = step_fn.lower(state, fed.batch).compile()
            state, step_metrics = compiled(state, fed.batch)  # another shape would be an error, not a second compilation
            interval.metrics.append(step_metrics)
            interval.counts += fed.counts
            done, last = number + 1, number + 1 == config.steps
            every = config.checkpoint.every
            saves = last or (every and done % every == 0)

            if done % config.metrics.every == 0 or saves:  # a killed run goes on from what is saved: no line may reach beyond
                log_interval(done)
            scores = None
            if config.validation is not None and (done % config.validation.every == 0 or last):
                with interval.pause(), contextlib.suppress(Interrupted):
                    scores = validate(evaluate, state, _validation_batches(config, mesh, validation, interrupt))
                    metrics.write("validation", done, scores, show=SHOWN_VALIDATION)
            if saves:
                with interval.pause():
                    checkpoints.save(done, state, {"data": early_end.streams(fed)}, scores)
        checkpoints.wait()
        if config.checkpoint.export:
            run, dtype = Path(config.run), config.checkpoint.export_dtype
            if state.router_bias is not None and processes.is_first():
                log.warning("%s", left_out_router_bias(run / EXPORT_DIR, jax.device_get(state.router_bias)))
            if base is None:
                export(run / EXPORT_DIR, run, model.config, all_params(state), dtype)
            elif processes.is_first():
                export_adapted(run, dtype)
        return state


def _open_run(config: TrainConfig, stack: contextlib.ExitStack) -> None:
    """The run's directory and files, by process 0; the others wait for them."""

    def start() -> None:
        stack.enter_context(only_writer(Path(config.run)))
        for line in start_run(config):
            log.warning("resuming with another config: %s", line)

    processes.by_first(start)


def _peak_flops(config: TrainConfig, mesh: Mesh | None) -> float | None:
    """FLOP/s of the devices that the run uses, which may be fewer than there are; None where their kind is not known."""
    peak = config.metrics.peak_tflops or peak_tflops(jax.devices()[0].device_kind)
    return None if peak is None else peak * 1e12 * (1 if mesh is None else mesh.size)


def _check_bad_steps(config: TrainConfig, done: int, values: Mapping[str, Any]) -> None:
    if int(values["bad_in_a_row"]) >= config.max_bad_steps:
        raise TrainingError(
            f"{int(values['bad_in_a_row'])} steps in a row had a loss or gradient that is not finite (max_bad_steps = "
            f"{config.max_bad_steps}); lower the learning rate, or look at the data around step {done}"
        )


def _open_validation(config: TrainConfig, mesh: Mesh | None) -> Data:
    assert config.validation is not None
    section = config.validation.data
    section = dataclasses.replace(section, epochs=1) if config.validation.batches is None else section
    return processes.in_all(lambda: open_data(config, section, mesh))


def _validation_batches(
    config: TrainConfig, mesh: Mesh | None, validation: Callable[[], Iterable[Batch]] | None, interrupt: Interrupt
) -> Iterator[Batch]:
    """The held-out batches; `Interrupted` ends them on SIGTERM, which leaves seconds where a validation may take minutes."""
    assert config.validation is not None
    data = _open_validation(config, mesh) if validation is None else WholeBatches(validation())
    feed = Feed(data, mesh=mesh, ahead=1, stop=lambda: interrupt.asked)
    try:
        for fed in itertools.islice(feed, config.validation.batches):
            yield fed.batch
    finally:
        feed.close()
        data.close()
