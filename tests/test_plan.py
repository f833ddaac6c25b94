"""The planner's parts without a TPU compiler: reading HLO text, the least on the wire, the roofline, the command's refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from qvlmoe_jax import Qwen3VLMoeConfig, hf, make_mesh
from tests import tiny, training
from train import aot, hlo, plan, roofline, topology, wire, work
from train.config import TrainConfig, dump_config, load_config
from train.config_tree import plain
from train.flops import attention_flops, forward_flops
from train.parameters import parameters

CONFIGS = Path(__file__).parent.parent / "configs"
MESH = {"data": 1, "fsdp": 4, "expert": 2, "tensor": 1, "context": 1}

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%body.1 (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %p = (s32[], bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %ag.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), metadata={op_name="f/layer/gather"}
  %kernel = f32[8]{0} custom-call(%y), backend_config={"text": "
} // a line of the kernel that begins with a brace
  %fake = f32[] all-reduce-like
"}
  ROOT %t = (s32[], bf16[64,32]{1,0}) tuple(%p, %ag.1)
}

%wrapped (a: s32[], b: s32[]) -> pred[] {
  %c = s32[] constant(7)
  ROOT %lt = pred[] compare(%a, %c), direction=LT
}

%condition.1 (p: (s32[], bf16[64,32])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%wrapped
}

%outer_body (p: (s32[])) -> (s32[]) {
  %w = (s32[], bf16[64,32]) while(%p), condition=%condition.1, body=%body.1
}

%outer_condition (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
}

%scatter (p: bf16[64,32]) -> bf16[8,32] {
  ROOT %rs = bf16[8,32]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%cheap (p: f32[]) -> f32[] {
  ROOT %ar = f32[] all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%dear (p: f32[]) -> f32[100] {
  ROOT %ar = (f32[100]{0}, /*index=1*/f32[25]{0}) all-reduce(%p, %q), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%all-reduce-scatter.1 (input: bf16[8,36,128]) -> bf16[80,128] {
  %pad = bf16[320,128]{1,0} pad(%bitcast, %zero), padding=0_32x0_0
  %ar = bf16[320,128]{1,0} all-reduce(%pad), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %slice = bf16[80,128]{1,0} dynamic-slice(%ar, %mine, %zero), dynamic_slice_sizes={80,128}
}

ENTRY %main.2 (p: f32[8]) -> f32[8] {
  %padded = bf16[80,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %loop = (s32[], bf16[64,32]) while(%t), condition=%outer_condition, body=%outer_body
  %start = ((bf16[64,32]), bf16[8,32], u32[]) async-start(%a), calls=%scatter
  %done = bf16[8,32] async-done(%start)
  %ags = (bf16[16,32], bf16[64,32]) all-gather-start(%b), replica_groups=mesh['fsdp'=4,'expert'=2] {'fsdp'}, dimensions={0}
  %agd = bf16[64,32]{1,0} all-gather-done(%ags)
  %cond = f32[] conditional(%pred, %p, %p), branch_computations={%cheap, %dear}
  ROOT %perm = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_are_counted_as_often_as_they_run() -> None:
    found = {(one.kind, one.axes, one.times): one for one in hlo.collectives(PROGRAM, MESH)}
    whole = 64 * 32 * 2
    assert {key: one.wire_bytes for key, one in found.items()} == {
        ("all-gather", ("fsdp",), 21): 21 * whole * 3 / 4,  # 7 times inside 3 times
        ("reduce-scatter", ("fsdp", "expert"), 1): 8 * 32 * 2 * 7,
        ("reduce-scatter", ("fsdp",), 1): 80 * 128 * 2 * 3,  # an all-reduce and its slice, as one fusion
        ("all-gather", ("fsdp",), 1): whole * 3 / 4,
        ("all-reduce", ("expert",), 1): 2 * 500 / 2,  # the dearer branch
        ("collective-permute", ("expert",), 1): 32,
    }
    assert found["all-gather", ("fsdp",), 21].scope == "f/layer/gather"
    assert hlo.by_kind(list(found.values()))["all-gather", ("fsdp",)] == 22 * whole * 3 / 4


def test_a_collective_in_pieces_counts_once() -> None:
    gather = (
        "all-gather(%p), replica_groups=mesh['fsdp'=4,'expert'=2] {'fsdp'}, dimensions={0}, "
        'frontend_attributes={chain_id="9"}, metadata={op_name="jit(f)/gather"}'
    )
    program = f"""
%start (p: u8[2,6]) -> (u8[2,6], u8[8,6]) {{
  %p = u8[2,6]{{1,0}} parameter(0)
  %all-gather.1 = u8[8,6]{{1,0}} {gather}
  %all-gather.9 = u8[8,6]{{1,0}} {gather.replace('"9"', '"8"')}
  ROOT %custom-call.1 = (u8[2,6]{{1,0}}, u8[8,6]{{1,0}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}
%beside (p: u8[2,6]) -> u8[8,6] {{
  %p = u8[2,6]{{1,0}} parameter(0)
  ROOT %all-gather.2 = u8[8,6]{{1,0}} {gather}
}}
%done (p: u8[2,6]) -> u8[8,6] {{
  %p = u8[2,6]{{1,0}} parameter(0)
  %all-gather.3 = u8[8,6]{{1,0}} {gather}
  ROOT %custom-call.2 = u8[8,6]{{1,0}} custom-call(%p, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
ENTRY %main (p: u8[2,6]) -> u8[8,6] {{
  %p = u8[2,6]{{1,0}} parameter(0)
  %fusion.1 = (u8[2,6]{{1,0}}, u8[8,6]{{1,0}}) fusion(%p), kind=kCustom, calls=%start
  %fusion.2 = u8[8,6]{{1,0}} fusion(%p), kind=kOutput, calls=%beside
  ROOT %fusion.3 = u8[8,6]{{1,0}} fusion(%p), kind=kCustom, calls=%done
}}
"""
    (found,) = hlo.collectives(program, MESH)
    assert (found.kind, found.axes, found.times, found.wire_bytes) == ("all-gather", ("fsdp",), 1, 8 * 6 * 3 / 4)


RAGGED = """HloModule m

ENTRY %main (p: bf16[64,32]) -> bf16[64,32] {
  %rows = bf16[64,32]{1,0} parameter(0)
  %buffer = bf16[256,32]{1,0} broadcast(%zero), dimensions={}
  %there = bf16[256,32]{1,0} ragged-all-to-all(%rows, %buffer, %a, %b, %c, %d), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  ROOT %back = bf16[64,32]{1,0} ragged-all-to-all(%there, %rows, %a, %b, %c, %d), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def test_rows_are_counted_not_the_buffer_that_the_worst_routing_fills() -> None:
    there, back = hlo.collectives(RAGGED, MESH)
    assert there.wire_bytes == back.wire_bytes == 64 * 32 * 2 / 2


@pytest.mark.parametrize(
    "text, axes, size",
    [
        ("replica_groups=mesh['fsdp'=4,'expert'=2] {'expert'}", ("expert",), 2),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, use_global", ("fsdp", "expert"), 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[8]", ("expert",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("fsdp",), 4),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("fsdp",), 4),
        ("replica_groups={}", ("fsdp", "expert"), 8),
    ],
)
def test_groups_in_every_spelling(text: str, axes: tuple[str, ...], size: int) -> None:
    assert hlo.groups(text, MESH) == (axes, size)


def step_config(tmp_path: Path, mesh: dict[str, int], *, described: Any = None, **changes: Any) -> TrainConfig:
    """A small model and step whose shapes every mesh axis of 2 and 4 divides. `described` changes the model."""
    divided = {"text_config": {"vocab_size": 256}, "vision_config": {"num_position_embeddings": 64}}
    described = tiny.variant(tiny.variant(training.SMALL, **divided), **(described or {}))
    data = {
        "sources": [{"path": "unused.jsonl"}],
        "sequence_length": 256,
        "batch_rows": 8,
        "vision_groups": 8,
        "row_patches": 256,
    }
    directory = training.write_model(tmp_path / "model", described)
    backend = {"remat": "full", "attention": "chunked", "attention_chunk": 64}
    return training.make_config(tmp_path / "run", directory, mesh=mesh, data=data, backend=backend, **changes)


def compiled(config: TrainConfig) -> tuple[aot.Program, list[hlo.Collective], list[wire.Term]]:
    sizes = plain(config.mesh)
    program = aot.compile_step(config, make_mesh(**sizes), platform="cpu")
    return program, hlo.collectives(program.hlo, sizes), wire.least(config, aot.model_config(config))


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 4, "expert": 2}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow)], ids=["fsdp expert", "fsdp"]
)
def test_the_compiled_step_sends_little_more_than_the_least(tmp_path: Path, mesh: dict[str, int]) -> None:
    config = step_config(tmp_path, mesh)
    program, sent, least = compiled(config)
    total, minimum = sum(one.wire_bytes for one in sent), sum(term.bytes for term in least)
    assert 0.95 * minimum <= total <= 1.15 * minimum, (hlo.by_kind(sent), least)
    assert program.memory["arguments"] > 0
    reduced = [one for one in sent if one.kind == "all-reduce" and "context" not in one.axes]
    assert sum(one.wire_bytes for one in reduced) < 0.05 * total  # scalars, norms and biases


def test_the_least_by_hand(tmp_path: Path) -> None:
    config = step_config(tmp_path, {"fsdp": 4, "expert": 2})
    model = aot.model_config(config)
    terms = {(term.what, term.axes): term.bytes for term in wire.least(config, model)}
    text = model.text_config
    D, E, F, L = text.hidden_size, text.num_experts, text.moe_intermediate_size, text.num_hidden_layers
    experts = L * E * 3 * D * F * 4 / 2  # float32; half of them on this device once gathered over fsdp
    assert terms["experts gathered", ("fsdp",)] == pytest.approx(2 * experts * 3 / 4)
    assert terms["experts' gradients scattered", ("fsdp",)] == pytest.approx(experts * 3 / 4)
    assert terms["tokens to experts", ("expert",)] == 5 * L * 256 * D * 4
    frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze=("experts",)))
    assert ("experts' gradients scattered", ("fsdp",)) not in {(t.what, t.axes) for t in wire.least(frozen, model)}


def test_the_least_of_a_tower_that_is_frozen_or_not_used(tmp_path: Path) -> None:
    config = step_config(tmp_path, {"fsdp": 8})
    model = aot.model_config(config)

    def gathered(**changes: Any) -> float:
        changed = dataclasses.replace(config, **changes)
        return sum(term.bytes for term in wire.least(changed, model) if term.what == "weights gathered")

    frozen = dataclasses.replace(config.model, freeze=("vision", "merger"))
    unused = dataclasses.replace(config.data, vision_rows=0)
    shapes = parameters(config, model)[0]
    sent = {path: math.prod(shape.shape) * 4 * 7 / 8 for path, shape in shapes.items() if shape.ndim > 2 or "embed" in path}
    blocks = sum(size for path, size in sent.items() if "visual/blocks/" in path)
    assert gathered() - gathered(model=frozen) == pytest.approx(blocks, rel=0.01)  # no backward pass, so not gathered again
    assert gathered(data=unused) < gathered(model=frozen) - blocks


def test_a_lora_step_is_counted_as_one(tmp_path: Path) -> None:
    lora = {"rank": 2, "targets": ["attention", "experts"]}
    config = step_config(tmp_path, {"fsdp": 4, "expert": 2}, lora=lora)
    _, sent, least = compiled(config)
    # CPU devices take turns (qvlmoe_jax/turns.py), for which they compute and scatter the text's gradients too.
    trained = dataclasses.replace(config, lora=None, model=dataclasses.replace(config.model, freeze=("vision", "merger")))
    base = sum(term.bytes for term in wire.least(trained, aot.model_config(config)) if "scattered" in term.what)
    total, minimum = sum(one.wire_bytes for one in sent), sum(term.bytes for term in least) + base
    assert 0.95 * minimum <= total <= 1.15 * minimum, (hlo.by_kind(sent), least)
    gathered = sum(one.wire_bytes for one in sent if one.kind == "all-gather" and one.axes == ("fsdp",))
    minimum = sum(term.bytes for term in least if "gathered" in term.what and term.axes == ("fsdp",))
    assert 0.99 * minimum <= gathered <= 1.01 * minimum, (hlo.by_kind(sent), least)
    scattered = sum(term.bytes for term in least if "scattered" in term.what)
    assert 0 < scattered < 0.1 * sum(term.bytes for term in least if "gathered" in term.what)


def test_a_lora_step_computes_no_gradient_of_its_base(tmp_path: Path) -> None:
    config = step_config(tmp_path, {"fsdp": 4, "expert": 2}, lora={"rank": 1, "targets": ["attention", "experts"]})
    model = aot.model_config(config)
    forward = forward_flops(model, work.full_counts(config))
    needed = 8 * work.work(config, model, 8, 0.0).model_flops
    # the tower only forward; gradients of the inputs through text and head, two in attention; the adapters' own are little
    inner = attention_flops(model, work.full_counts(config))["text"]
    expected = forward["vision"] + forward["merger"] + 2 * (forward["text"] + forward["head"]) + inner
    assert expected < needed < 1.05 * expected


def test_roofline_arithmetic() -> None:
    v5p = topology.Topology.parse("v5p:4x4x4")
    e = roofline.estimate(roofline.Work(459e12, 2 * 459e12, 2765e9 / 2, 600e9), v5p)
    assert (e.compute, e.hbm, e.ici_fast, e.ici_slow) == pytest.approx((2, 0.5, 1, 3))
    assert (e.best, e.worst, e.binding) == (pytest.approx(2), pytest.approx(5.5), "compute")
    assert (e.mfu_best, e.mfu_worst) == pytest.approx((0.5, 1 / 5.5))
    v6e = topology.Topology.parse("v6e:8x8")  # 8 does not wrap around on v6e: a corner has one link along each side
    e = roofline.estimate(roofline.Work(1, 1, 1, 400e9), v6e)
    assert (e.ici_fast, e.ici_slow) == pytest.approx((2, 4))
    links = {"v6e:8x16": (1, 2), "v6e:16x16": (2, 2), "v5e:1x1": (0, 0), "v5p:2x2x1": (1, 1, 0), "v5p:2x4x4": (1, 1, 1)}
    assert {name: topology.Topology.parse(name).links for name in links} == links
    assert roofline.estimate(roofline.Work(1, 1, 1, 0), topology.Topology.parse("v5e:1x1")).ici_fast == 0
    tpu7x = topology.Topology.parse("tpu7x:4x4x4")  # a chip is two devices
    assert tpu7x.devices == 128
    assert roofline.estimate(roofline.Work(1, 2307e12 / 2, 1, 1), tpu7x).compute == pytest.approx(1)


def test_published_runs_stand_beside_the_formula() -> None:
    assert len(roofline.RUNS) == 7
    for run in roofline.RUNS:
        c = roofline.calibrate(run)
        assert c.gap == pytest.approx(run.mfu / c.formula)
        assert 0.2 < c.gap < 1, run.name  # the formula is never beaten by a measurement
    assert roofline.gaps("v6e") == pytest.approx((0.329 / 0.75, 0.362 / 0.75))
    assert roofline.gaps("v5e") == (min(roofline.calibrate(r).gap for r in roofline.RUNS), pytest.approx(0.537 / 0.75))


SHIPPED = re.compile(r"(\w+b)(-128k|-q?lora)?-(v\w+)-([\dx-]+)")


def test_the_gpu_config_is_one_host_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / "30b-8xh100.yaml")
    assert config.mesh.expert * config.mesh.fsdp * config.mesh.data == 8 == config.data.batch_rows
    # 10 bytes per parameter (master, copy, gradients) and adafactor's factored moments
    model = Qwen3VLMoeConfig.from_json(config.model.path)
    parameters = sum(math.prod(shape) for shape in hf.param_shapes(model).values())
    assert config.optimizer.name == "adafactor" and 10 * parameters / 8 < 40e9


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-v*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_their_topology(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    found = SHIPPED.fullmatch(path.stem)  # 30b-v6e-8x8, 30b-128k-v5p-4x4x8
    assert found, path
    size, variant, kind, sides = found.groups()
    where = topology.Topology.parse(f"{kind}:{sides.replace('-', 'x')}")
    config = load_config(path)
    plan.check(config, where)
    model = Qwen3VLMoeConfig.from_json(config.model.path)
    assert (model.text_config.hidden_size, model.text_config.num_hidden_layers) == {"30b": (2048, 48), "235b": (4096, 94)}[size]
    assert config.model.param_dtype == "float32" and config.optimizer.moment_dtype in (None, "float32")
    todo = work.work(config, model, where.devices, 0.0)
    tokens = work.full_counts(config).tokens
    # text alone, the tower adds some; at 131,072 tokens attention is six sevenths
    per_token = 168e9 if variant == "-128k" else {"30b": 23.1e9, "235b": 148.3e9}[size]
    if config.lora is not None:  # gradients of inputs alone, two in attention; the adapters' own products are not counted
        inner = 3 * attention_flops(model, work.full_counts(config))["text"] / tokens
        per_token = (per_token - inner) * 2 / 3 + inner
    assert per_token < todo.model_flops * where.devices / tokens < 1.25 * per_token


def test_the_report_shows_every_part(tmp_path: Path) -> None:
    config = step_config(tmp_path, {"fsdp": 4, "expert": 2})
    model, where = aot.model_config(config), topology.Topology.parse("v5e:2x4")
    program = aot.Program(PROGRAM, {k: 2.0**30 for k in ("arguments", "output", "temporaries", "program", "peak")}, 1.0, 1.0)
    sent, least = hlo.collectives(PROGRAM, plain(config.mesh)), wire.least(config, model)
    todo = work.work(config, model, 8, sum(one.wire_bytes for one in sent))
    made = plan.Plan(config, model, where, 1, program, sent, least, roofline.estimate(todo, where))
    text = plan.report(made, 1e9)
    for part in (
        "mesh fsdp=4 expert=2",
        "fits: 1.00 of 15.25",
        "bound by",
        "Published runs",
        "Data set of 1e+09 tokens",
        "total",
    ):
        assert part in text
    plan.write_json(made, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    big = dataclasses.replace(made, program=dataclasses.replace(program, memory={**program.memory, "peak": 2.0**35}))
    assert "DOES NOT FIT" in plan.report(big)


def test_shards_of_context_wait_for_the_last_one() -> None:
    """Causal pairs of consecutive columns: the last of c shards has (2c - 1) / c times the average."""
    config = load_config(CONFIGS / "30b-v6e-8x8.yaml", ["--model.path", str(CONFIGS / "qwen3-vl-30b-a3b")])
    model = aot.model_config(config)
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, context=4))
    together, apart = (work.work(c, model, 64, 0.0).executed_flops for c in (config, split))
    text, pairs = model.text_config, work.full_counts(config).token_pairs / 64
    attention = 4 * pairs * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    assert apart - together == pytest.approx(4 * attention * 3 / 4)  # forward, again, and twice for the backward


@pytest.mark.slow
def test_a_tpu_program_is_compiled_and_read(tmp_path: Path) -> None:
    if reason := topology.missing():
        pytest.skip(f"no TPU compiler here: {reason}")
    import subprocess

    config = step_config(tmp_path, {"fsdp": 2, "expert": 2})
    (tmp_path / "config.yaml").write_text(dump_config(dataclasses.replace(config, backend=type(config.backend)(remat="full"))))
    arguments = ["plan", str(tmp_path / "config.yaml"), "--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json")]
    result = subprocess.run([sys.executable, "-m", "train", *arguments], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "fits" in result.stdout and "all-gather" in result.stdout
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["memory_bytes"]["peak"] > 0 and figures["collectives"]
    assert jnp.isfinite(figures["roofline"]["best"])
