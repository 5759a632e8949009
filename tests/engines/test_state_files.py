"""Files of a training state: every rank writes and seals its own, and the seals are those of reading back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.checkpoint import newest, write
from rlhf.engines import state_files
from rlhf.engines.state_files import StateFiles, write_state
from rlhf.errors import ResourceError
from rlhf.manifest import Seal, seal
from rlhf.pulse import PULSE

TENSORS = [(f"layer-{index}", torch.arange(64, dtype=torch.float32) + index) for index in range(7)]


def test_the_seals_of_all_ranks_are_those_of_reading_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "SHARD", 600)
    seals: dict[str, Seal] = {}
    for rank in range(2):
        seals |= write_state(iter(TENSORS), tmp_path, "policy", rank, 2)
    assert len(seals) == 4
    assert seals == seal(tmp_path)
    found = StateFiles(tmp_path, "policy")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS)


def test_a_state_saved_with_its_ranks_seals_is_whole(tmp_path: Path) -> None:
    saved = write(tmp_path, 3, "k", lambda folder: write_state(TENSORS, folder, "policy", 0, 1), {})
    assert newest(tmp_path, "k") == saved


def test_a_disk_that_fails_at_the_flush_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Seal:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(state_files, "seal_file", refuse)
    with pytest.raises(ResourceError, match=r"policy-0-0\.safetensors: cannot be written"):
        write_state(TENSORS, tmp_path, "policy", 0, 1)


def test_each_tensor_that_is_written_or_read_counts_as_progress(tmp_path: Path) -> None:
    before = PULSE.beats
    write_state(TENSORS, tmp_path, "policy", 0, 1)
    written = PULSE.beats
    assert written >= before + len(TENSORS)
    found = StateFiles(tmp_path, "policy")
    assert len([found[name] for name in found]) == len(TENSORS)
    assert PULSE.beats >= written + len(TENSORS)
