"""Each sub-module alone, in fp32, against transformers' module with the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from qvlmoe_jax import BackendConfig, Batch, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, pieces
from qvlmoe_jax.experts import KERNELS
from qvlmoe_jax.frames import block_coordinates
from qvlmoe_jax.layers import LayerNorm, Linear, RMSNorm, einsum
from qvlmoe_jax.moe import combine, dispatch, route
from qvlmoe_jax.rope import text_rotary, vision_rotary
from tests import cases, ours, reference, tiny
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import MODULE


def close(got, expected, tolerance: float = MODULE) -> None:
    if isinstance(expected, torch.Tensor):
        expected = expected.float().numpy()
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=tolerance, rtol=0)


@jax.jit
def call(module: nnx.Module, *args):
    """`module(*args)`, compiled once for all layers of one shape."""
    return module(*args)


@partial(jax.jit, static_argnames="kernel")
def moe(x, routing, weights, experts, *, kernel: str):
    rows, order, sizes = dispatch(x, routing, experts.gate_up_proj.shape[0])
    rows = KERNELS[kernel](rows, experts.gate_up_proj[...], experts.down_proj[...], sizes)
    return combine(rows, order, weights)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=["tiny", "other", "hf_test"])
def pair(request) -> SimpleNamespace:
    """The two models of one configuration."""
    config = tiny.ALL[request.param]
    tensors = random_hf_tensors(config)
    return SimpleNamespace(
        config=config,
        own=Qwen3VLMoeConfig.from_hf(config),
        torch=reference.build_model(config, tensors),
        jax=ours.build_model(config, tensors),
    )


@pytest.fixture
def pictures(pair) -> SimpleNamespace:
    """Three frames of different sizes as transformers sees them (one flat list) and as a Batch packs them (rows with padding)."""
    sizes = [(2, 3), (4, 2), (1, 5)]
    inputs = cases.build(pair.config, [[cases.Image(h, w) for h, w in sizes]])
    unit = pair.own.vision_config.merge_unit
    batch = Batch.from_hf(pair.own, **inputs, row_patches=16 * unit)
    assert batch.patch_segment_ids.shape[1] > 1, "the frames should not all lie in one row"
    # Frame f (numbered from 1, in the order of the input) fills the patches of segment f.
    order = [np.flatnonzero(batch.patch_segment_ids.reshape(-1) == f + 1) for f in range(len(sizes))]
    flat = np.concatenate(order)
    grid = torch.from_numpy(inputs["image_grid_thw"])
    from transformers import vision_utils

    positions = vision_utils.get_vision_position_ids(grid, pair.own.vision_config.spatial_merge_size)
    return SimpleNamespace(
        inputs=inputs,
        batch=batch,
        grid=grid,
        pixels=torch.from_numpy(inputs["pixel_values"]),
        rotary=pair.torch.model.visual.rotary_pos_emb(torch.zeros(1), positions),
        cu_seqlens=vision_utils.get_vision_cu_seqlens(grid),
        unpack=lambda rows: np.asarray(rows).reshape(-1, rows.shape[-1])[flat],
        unpack_merged=lambda rows: np.asarray(rows).reshape(-1, rows.shape[-1])[flat[::unit] // unit],
        pack=lambda values: _scatter(values, flat, batch.patch_segment_ids[0].shape),
    )


def _scatter(values: np.ndarray, flat: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    out = 9 * normal(int(np.prod(rows)), values.shape[-1], seed=3)  # what lies in the padding must not matter
    out[flat] = values
    return out.reshape(*rows, -1)


def test_patch_and_position_embedding(pair, pictures):
    visual, b = pair.torch.model.visual, pictures.batch
    got = pair.jax.model.visual.embed(b.pixel_values[0], b.pos_index[0], b.pos_weight[0])
    from transformers import vision_utils

    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
        pictures.grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=pair.own.vision_config.spatial_merge_size,
    )
    close(pictures.unpack(got), visual.patch_embed(pictures.pixels) + (visual.pos_embed(index) * weight[..., None]).sum(1))


def test_vision_block(pair, pictures):
    x = normal(len(pictures.pixels), pair.own.vision_config.hidden_size)
    b = pictures.batch
    rotary = vision_rotary(
        jnp.asarray(b.patch_coords[0]), head_dim=pair.own.vision_config.head_dim, theta=pair.own.vision_config.rope_theta
    )
    for i, block in enumerate(pair.torch.model.visual.blocks):
        got = call(ours.layer(pair.jax.model.visual.blocks, i), pictures.pack(x), rotary, b.patch_segment_ids[0])
        expected = block(torch.from_numpy(x), cu_seqlens=pictures.cu_seqlens, position_embeddings=pictures.rotary)
        close(pictures.unpack(got), expected)


def test_mergers(pair, pictures):
    x = normal(len(pictures.pixels), pair.own.vision_config.hidden_size)
    visual, own = pair.torch.model.visual, pair.jax.model.visual
    packed = pictures.pack(x)
    close(pictures.unpack_merged(call(own.merger, packed)), visual.merger(torch.from_numpy(x)))
    for i, merger in enumerate(visual.deepstack_merger_list):
        got = call(ours.layer(own.deepstack_merger_list, i), packed)
        close(pictures.unpack_merged(got), merger(torch.from_numpy(x)))


@pytest.mark.parametrize("piece", [pieces.PIECE_BYTES, 1 << 12], ids=["whole", "in pieces"])
def test_vision_tower_and_its_deepstack_order(pair, pictures, piece, monkeypatch):
    """Levels come out in block order, whatever the order of `deepstack_visual_indexes`."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    tokens, deepstack = jax.jit(lambda model, batch: model.visual_features(batch))(pair.jax.model, pictures.batch)
    expected = pair.torch.model.visual(pictures.pixels, grid_thw=pictures.grid)
    columns = pictures.batch.visual_index[pictures.batch.visual_index >= 0]
    close(np.asarray(tokens)[0][columns], expected.pooler_output)
    assert len(deepstack) == len(expected.deepstack_features)
    for got, level in zip(deepstack, expected.deepstack_features, strict=True):
        close(np.asarray(got)[0][columns], level)


@pytest.fixture
def stream(pair) -> SimpleNamespace:
    """A hidden state of two rows, the second one padded on the right, with positions that differ on the three axes."""
    B, T, D = 2, 11, pair.own.text_config.hidden_size
    mask = np.arange(T) < np.array([[T], [T - 4]])
    positions = np.random.default_rng(1).integers(0, 40, (3, B, T))
    x = normal(B, T, D)
    text = pair.own.text_config
    from transformers.masking_utils import create_causal_mask

    return SimpleNamespace(
        x=x,
        mask=mask,
        rotary=text_rotary(
            jnp.asarray(positions), head_dim=text.head_dim, theta=text.rope_theta, mrope_section=text.mrope_section,
            dtype=jnp.float32,
        ),
        torch_rotary=pair.torch.model.language_model.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions)),
        torch_mask=create_causal_mask(
            config=pair.torch.config.text_config,
            inputs_embeds=torch.from_numpy(x),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            past_key_values=None,
        ),
    )  # fmt: skip


def _layers(pair):
    """(number, transformers' layer, ours) for every decoder layer."""
    from qvlmoe_jax.layer_plan import slots

    stacked = pair.jax.model.language_model.layers
    for slot in slots(pair.own.text_config):
        for i, number in enumerate(slot.layers):
            own = stacked[slot.name] if slot.name else stacked
            yield number, pair.torch.model.language_model.layers[number], ours.layer(own, i)


def test_decoder_layers(pair, stream):
    """MoE and dense (the second layer of `tiny`)."""
    kinds = set()
    for _, theirs, own in _layers(pair):
        got, stats = call(own, stream.x, stream.rotary, stream.mask.astype(np.int32))
        expected = theirs(torch.from_numpy(stream.x), attention_mask=stream.torch_mask, position_embeddings=stream.torch_rotary)
        close(np.asarray(got)[stream.mask], expected.numpy()[stream.mask])
        kinds.add(stats is None)
    assert len(kinds) == len(set(pair.own.text_config.layer_kinds()))


def test_text_attention(pair, stream):
    for kernel in ("dense", "chunked"):
        for _, theirs, own in _layers(pair):
            own.self_attn.backend = BackendConfig(attention=kernel, attention_chunk=4)
            got = call(own.self_attn, stream.x, stream.rotary, stream.mask.astype(np.int32))
            expected, _ = theirs.self_attn(
                torch.from_numpy(stream.x), attention_mask=stream.torch_mask, position_embeddings=stream.torch_rotary
            )
            close(np.asarray(got)[stream.mask], expected.numpy()[stream.mask])


def test_router(pair):
    x = normal(70, pair.own.text_config.hidden_size)
    for _, theirs, own in _layers(pair):
        if not hasattr(theirs.mlp, "gate"):
            continue
        logits, weights, experts = theirs.mlp.gate(torch.from_numpy(x))
        got_probs, got_weights, got_experts = route(own.mlp.gate(jnp.asarray(x)), pair.own.text_config.num_experts_per_tok)
        np.testing.assert_array_equal(got_experts, experts.numpy())
        close(got_weights, weights)
        close(got_probs, logits.softmax(-1))


def _routings(tokens: int, experts: int, k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    spread = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    first = np.broadcast_to(np.arange(k), (tokens, k)).copy()
    return {"spread": spread, "all to the same": first, "the last ones only": experts - 1 - first}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 64])
def test_experts(pair, kernel, tokens):
    """Each kernel, with empty experts and with all tokens at one, against transformers' loop over experts."""
    text = pair.own.text_config
    x = normal(tokens, text.hidden_size)
    weights = np.abs(normal(tokens, text.num_experts_per_tok)) + 0.1
    _, theirs, own = next(_layers(pair))
    for routing in _routings(tokens, text.num_experts, text.num_experts_per_tok).values():
        expected = theirs.mlp.experts(torch.from_numpy(x), torch.from_numpy(routing), torch.from_numpy(weights))
        close(moe(x, routing, weights, own.mlp.experts, kernel=kernel), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm(dtype):
    """In bf16 the cast comes before the weight: the result is transformers' to the bit of the last rounding."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRMSNorm

    theirs = Qwen3VLMoeTextRMSNorm(48, eps=1e-6).to(getattr(torch, dtype)).requires_grad_(False)
    theirs.weight.copy_(torch.from_numpy(1 + 0.3 * normal(48)))
    own = RMSNorm(48, eps=1e-6, dtype=dtype)
    own.weight = nnx.Param(jnp.asarray(theirs.weight.float().numpy(), dtype))
    for scale in (1.0, 1e-3):  # at 1e-3 the mean square is as large as eps
        x = torch.from_numpy(scale * normal(64, 48)).to(getattr(torch, dtype))
        got = own(jnp.asarray(x.float().numpy(), dtype))
        if dtype == "float32":
            close(got, theirs(x))
        else:
            np.testing.assert_array_equal(np.asarray(got, np.float32), theirs(x).float().numpy())


def test_layer_norm():
    theirs = torch.nn.LayerNorm(48, eps=1e-6).requires_grad_(False)
    theirs.weight.copy_(torch.from_numpy(1 + 0.3 * normal(48)))
    theirs.bias.copy_(torch.from_numpy(0.2 * normal(48, seed=1)))
    own = LayerNorm(48, dtype=jnp.float32)
    own.weight, own.bias = nnx.Param(jnp.asarray(theirs.weight.numpy())), nnx.Param(jnp.asarray(theirs.bias.numpy()))
    # A variance of 1e-6 equals eps: with 1e-5 in its place the output would differ by half its size.
    for scale, shift in ((1.0, 0.0), (1.0, 30.0), (1e-3, 0.0), (0.0, 1.0)):
        x = scale * normal(64, 48) + np.float32(shift)
        close(own(jnp.asarray(x)), theirs(torch.from_numpy(x)))


@pytest.mark.parametrize("kind", [partial(RMSNorm, eps=1e-6), LayerNorm], ids=["rms", "layer"])
def test_a_norms_sums_stay_out_of_the_product_after_it(kind):
    """In it they would be taken again for every piece of the product (`layers._mean`)."""
    norm, x, w = kind(32, dtype=jnp.float32), jnp.ones((1, 4096, 32)), jnp.ones((32, 512))
    program = jax.jit(lambda norm, x, w: einsum("BTD,DF->BTF", norm(x), w)).lower(norm, x, w).compile()
    (product,) = (part for part in (program.as_text() or "").split("\n\n") if " dot(" in part)
    assert product.startswith("ENTRY") or " reduce(" not in product


def test_block_coordinates_are_merge_block_major(pair):
    from transformers import vision_utils

    merge = pair.own.vision_config.spatial_merge_size
    for h, w in ((1, 1), (2, 5), (3, 2)):
        expected = vision_utils.get_vision_position_ids(torch.tensor([[1, h * merge, w * merge]]), merge)
        np.testing.assert_array_equal(np.stack(block_coordinates(h * merge, w * merge, merge), -1), expected.numpy())


def test_a_tied_model_takes_a_head_and_gives_it_back(tmp_path: Path) -> None:
    model = Qwen3VLMoeForConditionalGeneration.from_config(tiny.variant(tiny.TINY, tie_word_embeddings=True), nnx.Rngs(0))
    text = model.config.text_config
    batch = Batch.from_hf(model.config, input_ids=np.arange(5)[None])
    tied = model(batch).logits
    head = Linear(
        "BTD,DV->BTV", (text.hidden_size, text.vocab_size), init=nnx.initializers.zeros, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is not None
    assert not jax.jit(lambda model, batch: model(batch).logits)(model, batch).any()
    model.save_pretrained(tmp_path / "untied")
    assert not Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "untied")(batch).logits.any()
    model.set_output_embeddings(None)
    assert np.array_equal(model(batch).logits, tied)
    model.save_pretrained(tmp_path / "tied")
    assert np.array_equal(Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "tied")(batch).logits, tied)
