"""A model large enough for a GPU to notice, and batches for it. Run with `make gpu` on a machine with a CUDA device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 220M parameters in bfloat16 with the byte tokenizer."""
    from rlhf.models.tiny import build_tiny

    folder = tmp_path_factory.mktemp("gpu") / "llama"
    return build_tiny(
        folder, hidden=1024, intermediate=4096, layers=14, heads=16, kv_heads=4, tied=False, dtype=torch.bfloat16
    )
