"""`python -m train plan CONFIG.yaml --topology v5p:4x4x4`: does it fit, what does it send, how long does a step take."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlmoe_jax import Qwen3VLMoeConfig, make_mesh
from train.aot import GIB, Program, compile_step, model_config
from train.config import TrainConfig
from train.config_tree import plain
from train.errors import DoesNotFit, TrainingError
from train.hlo import Collective, by_kind, collectives
from train.roofline import RUNS, Estimate, calibrate, estimate, gaps
from train.topology import Topology, open_devices
from train.wire import Term, by_axes, least
from train.work import full_counts, work


@dataclass(frozen=True)
class Plan:
    """What a compiled step shows. `hosts`: of the topology; the other fields as in the modules they come from."""

    config: TrainConfig
    model: Qwen3VLMoeConfig
    topology: Topology
    hosts: int
    program: Program
    sent: list[Collective]
    least: list[Term]
    roofline: Estimate

    @property
    def limit_gib(self) -> float:
        """Memory of one device, as the compiler gives it to a program: the chip's, less 0.75 GiB that the runtime keeps."""
        return self.topology.chip.hbm_gib / self.topology.chip.devices - 0.75

    @property
    def fits(self) -> bool:
        return self.program.memory["peak"] / GIB <= self.limit_gib

    @property
    def tokens(self) -> int:
        """Text tokens of a step."""
        return full_counts(self.config).tokens


def check(config: TrainConfig, topology: Topology) -> None:
    """
    Raises:
      TrainingError: the config's mesh is not the topology's size.
    """
    sizes = plain(config.mesh)
    count = 1
    for size in sizes.values():
        count *= size
    if count != topology.devices:
        shown = ", ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "no axis above 1"
        raise TrainingError(
            f"the config's mesh ({shown}) has {count} devices and {topology.name} has {topology.devices}; "
            "set mesh.* so that their product is the topology's"
        )


def make_plan(config: TrainConfig, topology: Topology) -> Plan:
    """Compiles the config's step for the topology and reads the program.

    Raises:
      TrainingError: the mesh is not the topology's size, or libtpu refuses the topology.
      DoesNotFit: the compiler gave up on memory, so there is no program to read.
    """
    check(config, topology)
    devices = open_devices(topology)
    hosts = len({device.process_index for device in devices})
    model = model_config(config)
    sizes = plain(config.mesh)
    program = compile_step(config, make_mesh(**sizes, devices=devices))
    sent = collectives(program.hlo, sizes)
    minimum = least(config, model)
    todo = work(config, model, topology.devices, sum(one.wire_bytes for one in sent))
    return Plan(config, model, topology, hosts, program, sent, minimum, estimate(todo, topology))


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _axes(axes: Sequence[str]) -> str:
    return " x ".join(axes) or "-"


def memory_lines(plan: Plan) -> Iterator[str]:
    """Memory per device by kind, and whether it fits."""
    memory = plan.program.memory
    yield "Memory per device, GiB"
    for kind in ("arguments", "output", "temporaries", "program", "peak"):
        note = "  alive at once, as the compiler counts; kinds share memory and do not add up to it" if kind == "peak" else ""
        yield f"  {kind:<12}{memory[kind] / GIB:9.2f}{note}"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"  {verdict}: {memory['peak'] / GIB:.2f} of {plan.limit_gib:.2f}"


def wire_lines(plan: Plan) -> Iterator[str]:
    """Collectives by kind and axes, then by axes beside the least that the mesh and dispatch need."""
    yield "Collectives, GB on the wire per device and step"
    total = sum(one.wire_bytes for one in plan.sent)
    for (kind, axes), amount in by_kind(plan.sent).items():
        if amount >= 5e-4 * total:
            yield f"  {kind:<20}{_axes(axes):<28}{amount / 1e9:9.2f}"
    yield "Beside the least possible for this mesh, dispatch and recomputation, GB"
    sent: dict[tuple[str, ...], float] = {}
    for one in plan.sent:
        sent[one.axes] = sent.get(one.axes, 0.0) + one.wire_bytes
    minimum = by_axes(plan.least)
    for axes in sorted({*sent, *minimum}, key=lambda axes: -sent.get(axes, 0)):
        have, need = sent.get(axes, 0.0), minimum.get(axes, 0.0)
        if max(have, need) >= 5e-4 * total:
            ratio = f"{have / need:6.2f}x" if need else "  extra"
            what = "; ".join(
                f"{term.what} {term.bytes / 1e9:.2f}" for term in plan.least if term.axes == axes and term.bytes >= 5e-4 * total
            )
            yield f"  {_axes(axes):<28}{have / 1e9:9.2f} / {need / 1e9:<9.2f}{ratio}  {what}"
    need = sum(minimum.values())
    yield f"  {'total':<28}{total / 1e9:9.2f} / {need / 1e9:<9.2f}{total / need if need else 1:6.2f}x"


def roofline_lines(plan: Plan) -> Iterator[str]:
    """Step time and MFU as a range, the binding term, and what the formula says of published runs."""
    e, kind = plan.roofline, plan.topology.kind
    yield f"Model FLOPs per device and step: {e.model * plan.topology.chip.tflops / plan.topology.chip.devices:.1f} TFLOP"
    yield "Roofline, seconds per step (assumptions: train/roofline.py)"
    yield f"  compute {e.compute:.3f}   HBM {e.hbm:.3f}   ICI {e.ici_fast:.3f} (all torus sides) to {e.ici_slow:.3f} (one)"
    yield f"  best  {_time(e.best):>9}  MFU {e.mfu_best:5.1%}  all three overlapped; bound by {e.binding}"
    yield f"  worst {_time(e.worst):>9}  MFU {e.mfu_worst:5.1%}  nothing overlapped, slow ICI"
    low, high = gaps(kind)
    own = any(run.kind == kind for run in RUNS)
    yield (
        f"  calibrated MFU {e.mfu_best * low:5.1%} to {e.mfu_best * high:5.1%}: published runs on "
        f"{kind if own else 'any TPU'} reached {low:.2f} to {high:.2f} of what the formula's best says of them"
    )
    yield "Published runs: measured MFU / the formula's best / their ratio"
    for run in RUNS:
        c = calibrate(run)
        how = "all terms" if run.tokens else "compute alone: its batch is not published"
        yield f"  {run.name:<28}{run.mfu:6.1%} {c.formula:6.1%} {c.gap:6.2f}  ({how})"


def clock_line(plan: Plan, dataset_tokens: float) -> str:
    """How long one pass over a data set of so many text tokens takes."""
    steps = dataset_tokens / plan.tokens
    low, high = gaps(plan.topology.kind)
    best = plan.roofline.best
    return (
        f"Data set of {dataset_tokens:.3g} tokens: {steps:.0f} steps of {plan.tokens} tokens; at best {_time(steps * best)}, "
        f"worst {_time(steps * plan.roofline.worst)}, calibrated {_time(steps * best / high)} to {_time(steps * best / low)}"
    )


def report(plan: Plan, dataset_tokens: float | None = None) -> str:
    """The plan as text."""
    data, mesh = plan.config.data, plan.config.mesh
    sizes = " ".join(f"{axis}={n}" for axis, n in plain(mesh).items() if n > 1)
    lines = [
        f"{plan.topology.name}: {plan.topology.devices} devices, {plan.hosts} hosts; mesh {sizes}",
        f"{data.accumulation} x {data.batch_rows} rows of {data.sequence_length} tokens, {data.vision_rows} vision rows of "
        f"{data.row_patches} patches in each of {data.num_groups(mesh.batch_shards)} groups; remat {plan.config.backend.remat}, "
        f"dispatch {plan.config.backend.dispatch}",
        f"compiled in {plan.program.seconds:.0f} s with {plan.program.host_gib:.2f} GiB of this machine's memory",
        *memory_lines(plan),
        *wire_lines(plan),
        *roofline_lines(plan),
    ]
    if dataset_tokens is not None:
        lines.append(clock_line(plan, dataset_tokens))
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures."""
    e = plan.roofline
    return {
        "topology": plan.topology.name,
        "config": plain(plan.config),
        "fits": plan.fits,
        "limit_gib": plan.limit_gib,
        "memory_bytes": dict(plan.program.memory),
        "compile_seconds": plan.program.seconds,
        "host_gib": plan.program.host_gib,
        "collectives": [dataclasses.asdict(one) for one in plan.sent],
        "least": [dataclasses.asdict(term) for term in plan.least],
        "roofline": {**dataclasses.asdict(e), "best": e.best, "worst": e.worst, "binding": e.binding},
        "mfu": {"best": e.mfu_best, "worst": e.mfu_worst, "calibrated": [e.mfu_best * gap for gap in gaps(plan.topology.kind)]},
        "tokens_per_step": plan.tokens,
    }


_REMATS = ("full", "dots")
"""What a sweep tries, by what is kept."""


@dataclass(frozen=True)
class Candidate:
    """A choice of the sweep, with what the formula says before compiling: seconds per text token."""

    config: TrainConfig
    per_token: float

    @property
    def name(self) -> str:
        sizes = " ".join(f"{axis}={n}" for axis, n in plain(self.config.mesh).items() if n > 1)
        backend, data = self.config.backend, self.config.data
        return f"{sizes} remat={backend.remat} dispatch={backend.dispatch} batch_rows={data.batch_rows}"

    def holds_no_less(self, other: Candidate) -> bool:
        """Whether it surely needs the memory of `other`: the same but for more rows, or more kept for the backward pass."""
        mine, its = self.config, other.config
        alike = mine.mesh == its.mesh and mine.backend.dispatch == its.backend.dispatch
        kept = _REMATS.index(mine.backend.remat) >= _REMATS.index(its.backend.remat)
        return alike and kept and mine.data.batch_rows >= its.data.batch_rows


def candidates(config: TrainConfig, topology: Topology) -> list[Candidate]:
    """Meshes (fsdp x expert, the other axes as configured), dispatch, remat and batch choices, quickest per token first by the
    formula with the least wire bytes and slow ICI."""
    model = model_config(config)
    sizes = plain(config.mesh)
    spread = sizes["fsdp"] * sizes["expert"]
    experts = max(1, model.text_config.num_experts)
    found = []
    for expert in (n for n in (1, 2, 4, 8, 16, 32, 64) if spread % n == 0 and experts % n == 0):
        dispatches = ("allgather", "all_to_all") if expert > 1 else ("allgather",)
        for dispatch, remat, times in itertools.product(dispatches, _REMATS, (1, 2, 4)):
            tried = dataclasses.replace(
                config,
                mesh=dataclasses.replace(config.mesh, expert=expert, fsdp=spread // expert),
                backend=dataclasses.replace(config.backend, dispatch=dispatch, remat=remat),
                data=dataclasses.replace(config.data, batch_rows=config.data.batch_rows * times),
            )
            wire = sum(term.bytes for term in least(tried, model))
            e = estimate(work(tried, model, topology.devices, wire), topology)
            found.append(Candidate(tried, _slow_links(e) / full_counts(tried).tokens))
    return sorted(found, key=lambda candidate: candidate.per_token)


def sweep(config: TrainConfig, topology: Topology, *, programs: int, say: Any = print) -> Plan | None:
    """Compiles candidates from the quickest down, at most so many `programs`, until none of the others can be quicker than the
    best that fits: the formula counts the least a mesh must send, the compiled program may send more. What needs the memory of
    one that did not fit, and more, is not compiled.

    Returns:
      the quickest that fits, by what its program sends, or None.
    """
    check(config, topology)
    ranked = candidates(config, topology)
    say(f"{len(ranked)} choices, quickest first by the formula; compiling at most {programs}")
    best, best_seconds = None, math.inf
    compiled: list[Candidate] = []
    too_big: list[Candidate] = []
    for candidate in ranked:
        if len(compiled) == programs or candidate.per_token >= best_seconds:
            break
        if any(candidate.holds_no_less(other) for other in too_big):
            continue
        compiled.append(candidate)
        try:
            made = make_plan(candidate.config, topology)
        except DoesNotFit as error:
            say(f"  {candidate.name}: {candidate.per_token * 1e9:.2f} ns per token by the formula, does not fit: {error}")
            too_big.append(candidate)
            continue
        seconds = _slow_links(made.roofline) / made.tokens
        peak = made.program.memory["peak"] / GIB
        verdict = "fits" if made.fits else "does not fit"
        time = f"{candidate.per_token * 1e9:.2f} ns per token by the formula, {seconds * 1e9:.2f} by what it sends"
        say(f"  {candidate.name}: {time}, peak {peak:.2f} GiB, {verdict}")
        if not made.fits:
            too_big.append(candidate)
        elif seconds < best_seconds:
            best, best_seconds = made, seconds
    if best is None:
        rest = [c for c in ranked if c not in compiled and not any(c.holds_no_less(other) for other in too_big)]
        say("  none of these fits; not compiled: " + "; ".join(c.name for c in rest[:3]))
    return best


def _slow_links(e: Estimate) -> float:
    """Seconds of a step, all overlapped, over one torus side."""
    return max(e.compute, e.hbm, e.ici_slow)


def write_json(plan: Plan, path: Path) -> None:
    """Writes `as_json` to a file."""
    path.write_text(json.dumps(as_json(plan), indent=1) + "\n", encoding="utf-8")
