"""DeepSpeed on two ranks makes the same steps as plain torch on one: every objective, every ZeRO stage."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from engine_cases import HEAD_RATE, OPTIMIZER, build_model, largest_change, random_tokens
from rank_cases import RANK_CASES, Outcome, RankCase, drive
from torch import Tensor

from rlhf.engines.deepspeed_engine import DeepSpeedEngine
from rlhf.engines.microbatch import rank_passes
from rlhf.engines.torch_engine import TorchEngine
from rlhf.errors import RecipeError

Sums = dict[str, tuple[float, float]]


@pytest.fixture(scope="module")
def job(two_ranks: Callable[[str, Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outcomes of both ranks: one pair of processes runs all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks("rank_worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(tiny_folder: Path) -> Callable[..., Outcome]:
    """What TorchEngine does on the whole batch in one pass."""

    @cache
    def run(objective: str, lora: bool, dtype: Literal["float32", "bfloat16"]) -> Outcome:
        case = RankCase(objective, 0, lora, dtype)
        module = build_model(tiny_folder, case.kind, lora, dtype, flat=True)
        engine = TorchEngine(module, OPTIMIZER, HEAD_RATE, max_tokens=10**6)
        return drive(engine, module, case, 10**6)

    return run


@pytest.mark.parametrize("case", RANK_CASES, ids=str)
def test_two_ranks_step_like_one(case: RankCase, job: Path, one_rank: Callable[..., Outcome]) -> None:
    ranks: list[Outcome] = [torch.load(job / f"{case}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    expected: Outcome = one_rank(case.objective, case.lora, case.dtype)
    assert largest_change(ranks[0].parameters, ranks[1].parameters) == 0
    assert torch.equal(ranks[0].scores, ranks[1].scores)
    exact = case.dtype == "float32"
    if exact:
        assert largest_change(ranks[0].parameters, expected.parameters) < 1e-5
        assert largest_change(expected.parameters, expected.start) > 1e-3
    else:
        off = distance(ranks[0].parameters, expected.parameters)
        assert off < 0.05 * distance(expected.parameters, expected.start)
    torch.testing.assert_close(ranks[0].scores, expected.scores, rtol=1e-5, atol=1e-5 if exact else 2e-2)
    for here, there, wanted in zip(ranks[0].steps, ranks[1].steps, expected.steps, strict=True):
        assert_same_metrics(here, there, rel=0)
        assert_same_metrics(here, wanted, rel=1e-5 if exact else 2e-2)
    assert [step["skipped_steps"][0] for step in ranks[0].steps] == (
        [0, 0, 1, 0] if case.objective.startswith(("policy", "value")) else [0, 0]
    )


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((a[name].float() - b[name].float()).square().sum()) for name in a))


def assert_same_metrics(found: Sums, wanted: Sums, rel: float) -> None:
    assert found.keys() == wanted.keys()
    for name, (total, count) in wanted.items():
        assert found[name][1] == count
        assert found[name][0] == pytest.approx(total, rel=rel, abs=rel, nan_ok=True), name


def test_bfloat16_at_stage_0_is_refused(tiny_folder: Path) -> None:
    module = build_model(tiny_folder, "causal", False, "bfloat16")
    with pytest.raises(RecipeError, match="stage 0 cannot train bfloat16"):
        DeepSpeedEngine(module, OPTIMIZER, None, 24, 0, "bfloat16")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 16, 40, 1000])
def test_shares_cover_every_row_once_in_equally_many_passes(ranks: int, max_tokens: int) -> None:
    batch = random_tokens(1, [9, 14, 5, 11, 7, 14, 3], [4] * 6 + [2])
    shares = rank_passes(batch, max_tokens, False, ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(7))
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        assert len(rows) * max(batch.lengths()[rows]) <= max_tokens


def test_shares_are_dealt_longest_first() -> None:
    assert rank_passes(random_tokens(1, [2, 9, 5, 7, 1], [0] * 5), 20, False, 2) == [[[1, 2], [4]], [[3, 0], []]]
