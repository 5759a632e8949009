"""`ModelLearner` on two ranks answers as on one: shares of scores, whole weights, saved folders, frozen models."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_cases import CASES, largest_change, preference_batch
from learner_cases import BUCKET, LEARNER_CASES, TUNINGS, LearnerCase, Round, go_round
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from rlhf.engines.learner import ModelLearner
from rlhf.engines.scoring import response_logprobs
from rlhf.engines.shares import Part, assemble
from rlhf.errors import RecipeError
from rlhf.models.flat_attention import use_flat_attention
from rlhf.models.loading import load_causal
from rlhf.recipe.tuning_support import support
from rlhf.types import Metrics

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def job(two_ranks: Callable[[str, Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outcomes of both ranks: one pair of processes runs all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks("learner_worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[LearnerCase], Round]:
    """What one rank does with plain torch on the whole batch."""

    @cache
    def run(case: LearnerCase) -> Round:
        return go_round(case, tiny_folder, 1, tmp_path_factory.mktemp("saved"))

    return lambda case: run(replace(case, stage=2, park=False, whole=False))


def rounds(case: LearnerCase, job: Path) -> list[Round]:
    return [torch.load(job / f"{case}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", LEARNER_CASES, ids=str)
def test_two_ranks_answer_like_one(case: LearnerCase, job: Path, alone: Callable[[LearnerCase], Round]) -> None:
    ranks, expected = rounds(case, job), alone(case)
    assert ranks[0].trained == ranks[1].trained
    assert_metrics(ranks[0].trained, expected.trained)
    merged = Metrics(ranks[0].evaluated).merge(Metrics(ranks[1].evaluated))
    assert_metrics(merged.sums, expected.evaluated)
    for name, part in expected.parts.items():
        parts = [found.parts[name] for found in ranks]
        torch.testing.assert_close(assemble(parts), assemble([part]), rtol=TOLERANCE, atol=TOLERANCE)
        rows = len(part.rows)
        assert sorted(len(found.rows) for found in parts) == [rows // 2, rows - rows // 2]


@pytest.mark.parametrize("case", LEARNER_CASES, ids=str)
def test_weights_are_whole_on_every_rank_and_saved(
    case: LearnerCase, job: Path, alone: Callable[[LearnerCase], Round], tiny_folder: Path
) -> None:
    ranks, expected = rounds(case, job), alone(case)
    for name in ("weights", "adapter"):
        first, second = getattr(ranks[0], name), getattr(ranks[1], name)
        assert list(first) == list(second) == list(getattr(expected, name))
        if first:
            assert largest_change(first, second) == 0
            assert largest_change(first, getattr(expected, name)) < TOLERANCE
    assert same(ranks[0].saved, ranks[0].weights)
    assert same(expected.saved, expected.weights)
    if case.frozen and CASES[case.objective].kind == "causal":
        assert same(ranks[1].weights, load_file(tiny_folder / "model.safetensors"))


@pytest.mark.parametrize(
    "case",
    [case for case in LEARNER_CASES if case.stage == 3 and case.tuning in ("full", "lora") and not case.whole],
    ids=str,
)
def test_no_rank_ever_holds_a_full_copy(case: LearnerCase, job: Path) -> None:
    for found in rounds(case, job):
        assert 0 < found.most_whole <= BUCKET < sum(weight.nbytes for weight in found.weights.values()) / 3
        assert found.whole_after == 0


@pytest.mark.parametrize("case", [case for case in LEARNER_CASES if case.park], ids=str)
def test_a_stay_in_main_memory_changes_no_bit(case: LearnerCase, job: Path) -> None:
    for parked, stayed in zip(rounds(case, job), rounds(replace(case, park=False), job), strict=True):
        assert parked.trained == stayed.trained
        assert same(parked.weights, stayed.weights)


def test_standardised_scores_are_those_of_the_saved_folder(job: Path, alone: Callable[[LearnerCase], Round]) -> None:
    for case in (case for case in LEARNER_CASES if case.objective == "reward" and not case.frozen):
        plain, changed = (
            assemble([found.parts[name] for found in rounds(case, job)]) for name in ("scores", "standardised")
        )
        torch.testing.assert_close(changed, (plain - 0.5) / 2, rtol=0, atol=1e-6)
        if support(TUNINGS[case.tuning]).merges:
            config = json.loads((job / f"saved-{case}" / "config.json").read_text())
            assert config["rlhf_score_offset"] == 0.25


def test_adapter_is_a_peft_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    case = LearnerCase("sft", 2, "lora")
    learner = ModelLearner(case.spec(tiny_folder, 1))
    learner.train(CASES["sft"].batch(), CASES["sft"].objective, [[0, 1, 2]], 1.0)
    tensors = {name: tensor.clone() for name, tensor in learner.adapter_weights()}
    assert same(tensors, get_peft_model_state_dict(learner.model))
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(learner.adapter_config()))
    base = load_causal(tiny_folder, "float32")
    use_flat_attention(base)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = CASES["sft"].batch()
    with torch.no_grad():
        assert torch.equal(response_logprobs(reloaded, batch), response_logprobs(learner.model, batch))


def test_only_adapters_can_be_sent_as_adapters(tiny_folder: Path) -> None:
    learner = ModelLearner(LearnerCase("sft", 2).spec(tiny_folder, 1))
    with pytest.raises(RecipeError, match="policy trains weights of its own"):
        next(learner.adapter_weights())


def test_a_rank_without_rows_reports_nothing() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(assemble([Part([1, 0], whole), Part([], whole[:0])]), whole.flip(0))


@pytest.mark.parametrize("ranks", [2])
def test_ranks_that_have_not_joined_are_refused(tiny_folder: Path, ranks: int) -> None:
    with pytest.raises(RuntimeError, match="one of 2 ranks, but 1 have joined"):
        ModelLearner(LearnerCase("sft", 2).spec(tiny_folder, ranks))


def test_one_rank_with_offload_trains_as_without(tiny_folder: Path, tmp_path: Path) -> None:
    spec = LearnerCase("reward", 3).spec(tiny_folder, 1)
    batch = preference_batch()
    plain, offloaded = ModelLearner(spec), ModelLearner(replace(spec, offload="parameters"))
    for learner in (plain, offloaded):
        learner.train(batch, CASES["reward"].objective, [[0, 1], [2, 3, 4]], 1.0)
    assert largest_change(dict(plain.weights()), {n: w.clone() for n, w in offloaded.weights()}) < TOLERANCE
    offloaded.close()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_metrics(found: dict[str, tuple[float, float]], wanted: dict[str, tuple[float, float]]) -> None:
    assert found.keys() == wanted.keys()
    for name, pair in wanted.items():
        assert found[name] == pytest.approx(pair, rel=TOLERANCE, abs=1e-6)
