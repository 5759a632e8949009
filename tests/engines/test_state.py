"""Training goes on from a saved state: bit for bit on the same ranks, but for rounding on others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import HEAD_RATE, OPTIMIZER, build_model
from rank_cases import RankCase, parameters
from state_worker import MAX_TOKENS, STATE_CASES, learn

from rlhf.engines.state_files import StateFiles, write_state
from rlhf.engines.torch_engine import TorchEngine

Parameters = dict[str, torch.Tensor]


def alone(case: RankCase, folder: Path) -> tuple[TorchEngine, torch.nn.Module]:
    module = build_model(folder, case.kind, case.lora, case.dtype)
    return TorchEngine(module, OPTIMIZER, HEAD_RATE, MAX_TOKENS), module


@pytest.fixture(scope="module")
def job(two_ranks: Callable[[str, Path], None], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have done; they also find the states of one rank."""
    folder = tmp_path_factory.mktemp("states")
    for case in STATE_CASES:
        engine, _ = alone(case, tiny_folder)
        for step in range(2):
            learn(engine, case, step)
        (folder / f"alone-{case}").mkdir()
        write_state(engine.state(), folder / f"alone-{case}", "policy", 0, 1)
    two_ranks("state_worker.py", folder)
    return folder


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_two_ranks_go_on_bit_for_bit(case: RankCase, job: Path) -> None:
    for rank in range(2):
        through, resumed, _ = torch.load(job / f"{case}-{rank}.pt", weights_only=True)
        assert through.keys() == resumed.keys()
        assert all(torch.equal(through[name], resumed[name]) for name in through)


@pytest.mark.parametrize("case", STATE_CASES, ids=str)
def test_the_state_is_the_same_whatever_the_ranks(case: RankCase, job: Path, tiny_folder: Path) -> None:
    engine, module = alone(case, tiny_folder)
    start = parameters(engine, module)
    engine.restore(StateFiles(job / str(case), "policy"))
    learn(engine, case, 2)
    mine = parameters(engine, module)
    engine, module = alone(case, tiny_folder)
    for step in range(3):
        learn(engine, case, step)
    for one, two in ((mine, 0), (parameters(engine, module), 2)):
        theirs = torch.load(job / f"{case}-0.pt", weights_only=True)[two]
        tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-5
        for name in one:
            torch.testing.assert_close(one[name], theirs[name], rtol=0, atol=tolerance)
    assert any(not torch.equal(start[name], mine[name]) for name in start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank_goes_on_bit_for_bit(dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    case = RankCase("policy", 0, False, dtype)
    engine, module = alone(case, tiny_folder)
    for step in range(3):
        if step in (0, 2):
            (tmp_path / str(step)).mkdir()
            write_state(engine.state(), tmp_path / str(step), "policy", 0, 1)
        learn(engine, case, step)
    for begin in (0, 2):
        resumed, other = alone(case, tiny_folder)
        if begin == 0:
            learn(resumed, case, 7)  # whatever it has done before is forgotten
        resumed.restore(StateFiles(tmp_path / str(begin), "policy"))
        for step in range(begin, 3):
            learn(resumed, case, step)
        through, again = parameters(engine, module), parameters(resumed, other)
        assert all(torch.equal(through[name], again[name]) for name in through)
