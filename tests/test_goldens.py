"""Parity without torch: logits that transformers gave, stored by tests/make_goldens.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import cases, ours, tiny
from tests.hf_checkpoints import random_hf_tensors
from tests.tolerances import LOGITS

GOLDENS = np.load(Path(__file__).parent / "data" / "goldens.npz")
NAMES = [name for name in GOLDENS.files if "/" in name]


@pytest.mark.parametrize("name", NAMES)
def test_stored_logits(name: str, record) -> None:
    config_name, case = name.split("/")
    config = {"tiny": tiny.TINY, "dense": tiny.DENSE}[config_name]
    inputs = cases.CASES[case](config)
    found = ours.logits(ours.build_model(config, random_hf_tensors(config)), config, inputs)
    error = np.abs(found - GOLDENS[name])[cases.valid(inputs)].max()
    record("max |logit error| against stored goldens", error)
    assert error <= LOGITS
