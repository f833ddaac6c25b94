"""Whole-model fp32 logits equal transformers' at every valid position: every config, every input, every way to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp

from convert.__main__ import main as convert
from qvlmoe_jax import Qwen3VLMoeForConditionalGeneration
from tests import cases, ours, reference, tiny
from tests.hf_checkpoints import random_hf_tensors, write_hf_checkpoint
from tests.tolerances import LOGITS


@dataclass
class Subject:
    """One configuration with weights: transformers' model, its answers, and the directories the weights lie in."""

    name: str
    config: Mapping[str, Any]
    tensors: dict[str, np.ndarray]
    directory: Path
    answers: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reference: Any = reference.build_model(self.config, self.tensors)

    def inputs(self, case: str) -> cases.Inputs:
        return cases.CASES[case](dict(self.config))

    def expected(self, case: str) -> np.ndarray:
        if case not in self.answers:
            self.answers[case] = reference.logits(self.reference, self.inputs(case))
        return self.answers[case]

    def source(self, kind: str) -> Path:
        """A directory of this model: `hub` (three shards), `v5` (transformers' own save_pretrained), or either one converted."""
        path = self.directory / kind
        if path.exists():
            return path
        if kind.startswith("converted "):
            assert convert(["hf2jax", str(self.source(kind.removeprefix("converted "))), str(path)]) == 0
        elif kind == "hub":
            write_hf_checkpoint(path, self.config, self.tensors, shards=3)
        else:
            self.reference.save_pretrained(path)
        return path

    def check(self, model: Qwen3VLMoeForConditionalGeneration, case: str, record) -> None:
        inputs = self.inputs(case)
        error = np.abs(ours.logits(model, self.config, inputs) - self.expected(case))[cases.valid(inputs)].max()
        record(f"max |logit error| {self.name}", error)
        assert error <= LOGITS


@pytest.fixture(scope="module", params=tiny.ALL)
def subject(request, tmp_path_factory) -> Subject:
    config = tiny.ALL[request.param]
    return Subject(request.param, config, random_hf_tensors(config), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["hub", "v5", "converted hub", "converted v5"])
def loaded(request, subject) -> Qwen3VLMoeForConditionalGeneration:
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(subject.source(request.param))
    # Orbax commits arrays to a device, which would compile every config a second time.
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), model)


@pytest.mark.parametrize("case", cases.CASES)
def test_logits(subject, loaded, case, record):
    subject.check(loaded, case, record)


def test_every_source_holds_the_same_numbers(subject, loaded):
    """Bit for bit; the logits then agree by construction, whatever the tolerance."""
    expected = ours.build_model(subject.config, subject.tensors).params()
    equal = jax.tree.map(np.array_equal, loaded.params(), expected)
    assert not [jax.tree_util.keystr(path) for path, same in jax.tree.leaves_with_path(equal) if not same]


def test_the_v5_directory_has_the_v5_layout(subject):
    """Otherwise the tests of that layout would test the other one twice."""
    safetensors = pytest.importorskip("safetensors.numpy")
    written = safetensors.load_file(subject.source("v5") / "model.safetensors")
    experts = {key: value for key, value in subject.tensors.items() if ".experts." in key}
    assert bool(experts) == (subject.config["model_type"] == "qwen3_vl_moe")
    for key, value in experts.items():
        np.testing.assert_array_equal(written[key], value.swapaxes(1, 2))
    assert ("lm_head.weight" in written) != subject.config["tie_word_embeddings"]


def test_transformers_reads_the_hub_directory_alike(subject):
    """The oracle was given its weights by hand; here it reads the files itself. It reads square experts wrong (issue 47031)."""
    text = subject.config["text_config"]
    if text["hidden_size"] in (text.get("moe_intermediate_size"), 2 * text.get("moe_intermediate_size", 0)):
        pytest.skip("transformers mistakes the orientation of square expert tensors")
    model_class = reference.MODELS[subject.config["model_type"]][1]
    model = model_class.from_pretrained(subject.source("hub"), dtype="float32", attn_implementation="sdpa").eval()
    got = reference.logits(model.requires_grad_(False), subject.inputs("mixed"))
    np.testing.assert_allclose(got, subject.expected("mixed"), atol=LOGITS, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_layer", "real_block"])
def test_true_width(name, tmp_path, record):
    """One decoder layer, and one vision block with its mergers, at the width of 30B-A3B; bf16 on disk, fp32 in memory."""
    import ml_dtypes

    config = {"real_layer": tiny.REAL_LAYER, "real_block": tiny.REAL_BLOCK}[name]
    stored = random_hf_tensors(config, dtype=ml_dtypes.bfloat16)
    subject = Subject(name, config, {key: value.astype(np.float32) for key, value in stored.items()}, tmp_path)
    write_hf_checkpoint(tmp_path / "hub", config, stored, shards=3)
    inputs = {case: subject.expected(case) for case in ("text_left_padded", "mixed", "far_positions")}
    subject.reference, subject.tensors = None, {}  # 5 GB less while ours is read
    for kind in ("hub", "converted hub"):
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(subject.source(kind), dtype=np.float32)
        for case in inputs:
            subject.check(model, case, record)
