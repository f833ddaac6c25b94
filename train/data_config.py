"""Placeholder until branch data is merged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they become batches."""

    seed: int = 0
