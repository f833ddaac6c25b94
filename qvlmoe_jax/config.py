"""The model's configuration, spelled as in Hugging Face's `config.json`.

`Qwen3VLMoeConfig.from_hf(dict)` reads every spelling in circulation (hub files, transformers 4.57, transformers 5.x) and
refuses, by key, what the network would not compute as written. `to_hf()` writes the hub's spelling. Keys that the network
does not use travel verbatim in `extra`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvlmoe_jax.config_reader import MAX_LAYERS, SectionReader, read_rope_theta, rope_section
from qvlmoe_jax.errors import CheckpointError, ConfigError
from qvlmoe_jax.fp8_config import parse_quantization
from qvlmoe_jax.local_files import read_json

LayerKind = Literal["moe", "dense"]


@dataclass(frozen=True)
class Qwen3VLMoeTextConfig:
    """The text decoder. Fields carry HF's names; `mlp_only_layers` are 0-based."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, ...] = (24, 20, 20)
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """`"moe"` or `"dense"` per layer (MOE 303: not in mlp_only_layers, experts exist, every `decoder_sparse_step`-th)."""
        return tuple(
            "moe"
            if i not in self.mlp_only_layers and self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0
            else "dense"
            for i in range(self.num_hidden_layers)
        )

    @classmethod
    def from_hf(cls, section: Mapping[str, Any], *, version: str = "", moe: bool = True) -> Qwen3VLMoeTextConfig:
        """Reads `config.json`'s `text_config`.

        Args:
          section: the JSON object.
          version: the file's top-level `transformers_version`; decides what a missing `rope_theta` means, 5e6 in 4.x and
            5e5 otherwise (the class defaults of those releases).
          moe: False for the dense `qwen3_vl`, whose config has no experts.
        Raises:
          ConfigError: names the key, its value and what was expected.
        """
        read = SectionReader(section, "text_config")
        read.only("model_type", *(("qwen3_vl_moe_text", "qwen3_vl_moe") if moe else ("qwen3_vl_text", "qwen3_vl")))
        read.only("hidden_act", "silu")
        read.only("attention_bias", False)
        read.only("attention_dropout", 0.0, 0)
        read.agree("num_experts", "num_local_experts")
        read.raw("norm_topk_prob")  # ignored by HF, as here: top-k weights are always renormalised
        read.raw("tie_word_embeddings")  # only the top level counts

        rope = rope_section(read)
        rope_type = rope.get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(f"config.json: text_config rope_type = {rope_type!r} is not supported, expected 'default'")
        if rope.get("mrope_interleaved") is False:
            raise ConfigError("config.json: text_config mrope_interleaved = false is not supported, expected true")
        section_values = rope.get("mrope_section")
        mrope_section = read.integers("mrope_section", value=section_values) if section_values is not None else (24, 20, 20)
        if len(mrope_section) != 3:
            raise ConfigError(
                f"config.json: text_config mrope_section is {list(mrope_section)}, expected three numbers (T, H, W)"
            )

        hidden = read.number("hidden_size", int)
        heads = read.number("num_attention_heads", int)
        # null means "as many as queries"; a missing key would mean 16 or 32 by HF's class defaults: ask for it instead.
        kv_heads = read.number("num_key_value_heads", int, heads if "num_key_value_heads" in section else None)
        if heads % kv_heads:
            raise ConfigError(
                f"config.json: text_config.num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            )
        head_dim = read.number("head_dim", int, hidden // heads if moe else 128)  # HF's own defaults differ so
        if head_dim % 2:
            raise ConfigError(f"config.json: text_config.head_dim is {head_dim}, expected an even number (rotary pairs)")
        experts_key = "num_experts" if read.has("num_experts") else "num_local_experts"
        experts, per_token, width = 0, 0, 0
        if moe:
            experts = read.number(experts_key, int, minimum=0)
        if experts:
            per_token = read.number("num_experts_per_tok", int)
            width = read.number("moe_intermediate_size", int)
            if per_token > experts:
                raise ConfigError(
                    f"config.json: text_config.num_experts_per_tok = {per_token} is more than num_experts = {experts}"
                )
        read.used.update({"num_experts", "num_local_experts"} if moe else ())
        return cls(
            vocab_size=read.number("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=read.number("intermediate_size", int),
            num_hidden_layers=read.number("num_hidden_layers", int, maximum=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_experts=experts,
            num_experts_per_tok=per_token,
            moe_intermediate_size=width,
            mlp_only_layers=tuple(sorted(set(read.integers("mlp_only_layers")))) if moe else (),
            decoder_sparse_step=read.number("decoder_sparse_step", int, 1) if moe else 1,
            rms_norm_eps=read.number("rms_norm_eps", float, 1e-6, minimum=0),
            rope_theta=read_rope_theta(read, rope, 5e6 if version.startswith("4.") else 5e5),
            mrope_section=mrope_section,
            max_position_embeddings=read.number("max_position_embeddings", int, 128000),
            initializer_range=read.number("initializer_range", float, 0.02, minimum=0),
            output_router_logits=read.flag("output_router_logits", False),
            router_aux_loss_coef=read.number("router_aux_loss_coef", float, 0.001, minimum=0),
            extra=read.extra(),
        )

    def to_hf(self, *, moe: bool | None = None) -> dict[str, Any]:
        """The hub's `text_config` object (`num_experts`, flat `rope_theta`, `rope_scaling`); of a MoE model if it has experts, or
        `moe` says so."""
        moe = self.num_experts > 0 if moe is None else moe
        out = dict(self.extra)
        out.update({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"})
        out.update(
            model_type="qwen3_vl_moe_text" if moe else "qwen3_vl_text",
            hidden_act="silu",
            attention_bias=False,
            attention_dropout=0.0,
            rope_scaling={
                "mrope_interleaved": True,
                "mrope_section": list(out.pop("mrope_section")),
                "rope_type": "default",
            },
            mlp_only_layers=list(self.mlp_only_layers),
        )
        if moe:
            out["norm_topk_prob"] = True
        else:
            for key in (
                "num_experts",
                "num_experts_per_tok",
                "moe_intermediate_size",
                "mlp_only_layers",
                "decoder_sparse_step",
                "output_router_logits",
                "router_aux_loss_coef",
            ):
                out.pop(key)
        return dict(sorted(out.items()))


@dataclass(frozen=True)
class Qwen3VLMoeVisionConfig:
    """The vision tower. `num_position_embeddings` is the side^2 of the learned position table."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 1e4
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        """Numbers in one flattened patch row (C * T * p * p)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one visual token (spatial_merge_size^2)."""
        return self.spatial_merge_size**2

    @property
    def num_grid_per_side(self) -> int:
        return math.isqrt(self.num_position_embeddings)

    @classmethod
    def from_hf(cls, section: Mapping[str, Any]) -> Qwen3VLMoeVisionConfig:
        """Reads `config.json`'s `vision_config`.

        Raises:
          ConfigError: names the key, its value and what was expected.
        """
        read = SectionReader(section, "vision_config")
        read.only("model_type", "qwen3_vl_moe_vision", "qwen3_vl_moe", "qwen3_vl_vision", "qwen3_vl")
        read.only("hidden_act", "gelu_pytorch_tanh")
        rope = rope_section(read)
        rope_type = rope.get("rope_type", "axial")
        if rope_type not in ("axial", "default"):
            raise ConfigError(f"config.json: vision_config rope_type = {rope_type!r} is not supported, expected 'axial'")
        hidden, heads = read.number("hidden_size", int, 1152), read.number("num_heads", int, 16)
        if hidden % heads or (hidden // heads) % 4:
            raise ConfigError(
                f"config.json: vision_config.hidden_size = {hidden} over num_heads = {heads} is not a head width divisible by 4 "
                "(two rotary axes)"
            )
        depth = read.number("depth", int, 27, maximum=MAX_LAYERS)
        taps = read.integers("deepstack_visual_indexes", (8, 16, 24))
        if len(set(taps)) != len(taps) or any(t >= depth for t in taps):
            raise ConfigError(
                f"config.json: vision_config.deepstack_visual_indexes = {list(taps)}, expected distinct block numbers below "
                f"depth = {depth}"
            )
        return cls(
            depth=depth,
            hidden_size=hidden,
            intermediate_size=read.number("intermediate_size", int, 4304),
            num_heads=heads,
            out_hidden_size=read.number("out_hidden_size", int, 3584),
            patch_size=read.number("patch_size", int, 16),
            temporal_patch_size=read.number("temporal_patch_size", int, 2),
            spatial_merge_size=read.number("spatial_merge_size", int, 2),
            in_channels=read.number("in_channels", int, 3),
            num_position_embeddings=read.number("num_position_embeddings", int, 2304),
            deepstack_visual_indexes=taps,
            rope_theta=read_rope_theta(read, rope, 1e4),
            initializer_range=read.number("initializer_range", float, 0.02, minimum=0),
            extra=read.extra(),
        )

    def to_hf(self, *, moe: bool = True) -> dict[str, Any]:
        """The hub's `vision_config` object. A theta other than 1e4 is written as 5.24 does, in `rope_parameters`."""
        out = dict(self.extra)
        out.update({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"})
        theta = out.pop("rope_theta")
        if theta != 1e4:
            out["rope_parameters"] = {"rope_theta": theta, "rope_type": "axial"}
        out.update(
            model_type="qwen3_vl_moe" if moe else "qwen3_vl",
            hidden_act="gelu_pytorch_tanh",
            deepstack_visual_indexes=list(self.deepstack_visual_indexes),
        )
        return dict(sorted(out.items()))


@dataclass(frozen=True)
class Qwen3VLMoeConfig:
    """The whole model: MoE (`qwen3_vl_moe`) or dense (`qwen3_vl`). Hashable, so it can be a static jit argument."""

    text_config: Qwen3VLMoeTextConfig
    vision_config: Qwen3VLMoeVisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    model_type: str = "qwen3_vl_moe"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)
    fp8_block: tuple[int, int] | None = field(default=None, compare=False, hash=False, repr=False)
    """Block size of a float8 checkpoint's scales. It describes files: parameters are never float8, so `to_hf` leaves it out."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3VLMoeConfig:
        """Reads a whole `config.json` object.

        Only the top-level `tie_word_embeddings` counts (5.x writes a misleading one into text_config).

        Raises:
          ConfigError: names the key, its value and what was expected.
        """
        read = SectionReader(config, "")
        model_type = read.raw("model_type")
        if model_type not in ("qwen3_vl_moe", "qwen3_vl"):
            raise ConfigError(f"config.json: model_type is {model_type!r}, expected 'qwen3_vl_moe' or 'qwen3_vl'")
        quantization = read.raw("quantization_config")
        fp8_block = None if quantization is None else parse_quantization(quantization)
        moe = model_type == "qwen3_vl_moe"
        for key in ("text_config", "vision_config"):
            if not read.has(key):
                raise ConfigError(f"config.json: {key} is missing, expected an object")
        text = Qwen3VLMoeTextConfig.from_hf(
            read.raw("text_config"), version=str(config.get("transformers_version") or ""), moe=moe
        )
        vision = Qwen3VLMoeVisionConfig.from_hf(read.raw("vision_config"))
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError(
                f"config.json: vision_config.out_hidden_size = {vision.out_hidden_size} contradicts text_config.hidden_size = "
                f"{text.hidden_size}; visual tokens enter the text decoder, so the two must be equal"
            )
        ids = {
            key: read.number(key, int, cls.__dataclass_fields__[key].default, minimum=0)
            for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        for key, value in ids.items():
            if value >= text.vocab_size:
                raise ConfigError(f"config.json: {key} = {value} is outside the vocabulary, expected < {text.vocab_size}")
        if ids["image_token_id"] == ids["video_token_id"]:
            raise ConfigError(
                f"config.json: image_token_id and video_token_id are both {ids['image_token_id']}, expected two ids"
            )
        return cls(
            text_config=text,
            vision_config=vision,
            **ids,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            model_type=model_type,
            extra=read.extra(),
            fp8_block=fp8_block,
        )

    @classmethod
    def from_json(cls, path: str | Path) -> Qwen3VLMoeConfig:
        """Reads `config.json`, or the one inside a directory.

        Raises:
          ConfigError: the file is missing, is not JSON, or `from_hf` refuses it.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise ConfigError(f"{file}: not found; expected a Hugging Face checkpoint directory with a config.json")
        try:
            config = read_json(file)
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        try:
            return cls.from_hf(config)
        except ConfigError as error:  # of two directories, as `verify` reads, which one's
            raise ConfigError(f"{file}: {str(error).removeprefix('config.json: ')}") from None

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` object in the hub's spelling; `from_hf(to_hf())` is the identity."""
        moe = self.model_type == "qwen3_vl_moe"
        architecture = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
        out = dict(self.extra)
        out.update(
            architectures=[architecture],
            model_type=self.model_type,
            text_config=self.text_config.to_hf(moe=moe),
            vision_config=self.vision_config.to_hf(moe=moe),
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            vision_start_token_id=self.vision_start_token_id,
            vision_end_token_id=self.vision_end_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        return dict(sorted(out.items()))
