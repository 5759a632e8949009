"""Every tuning method in a learner: cutting a batch changes nothing, and training goes on where it was saved."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tuning_cases import ADAPTED, METHODS, build_qwen

from rlhf.data.collate import collate
from rlhf.data.sequences import TokenSequence
from rlhf.engines.base import LearnerSpec
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import Sft
from rlhf.errors import RecipeError
from rlhf.models.flat_attention import runs_flat
from rlhf.recipe.base import Optimizer
from rlhf.recipe.tuning_schema import Layers, Lora, Tuning
from rlhf.recipe.tuning_support import support
from rlhf.types import TokenBatch

RATES = {"full": 5e-3, "layers": 5e-3, "bitfit": 3e-2, "ia3": 3e-2, "llama_adapter": 3e-2}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen(tiny_folder, tmp_path_factory.mktemp("qwen"))


def made(
    folder: Path, tiny_folder: Path, name: str, tuning: Tuning | None = None, max_tokens: int = 4096
) -> ModelLearner:
    return ModelLearner(
        LearnerSpec(
            role="policy",
            kind="causal",
            checkpoint=tiny_folder if name == "llama_adapter" else folder,
            dtype="float32",
            tuning=tuning or METHODS[name],
            optimizer=Optimizer(learning_rate=RATES.get(name, 2e-2), max_grad_norm=10.0),
            head_learning_rate=None,
            max_tokens_per_microbatch=max_tokens,
            temperature=1.0,
            threads=1,
            seed=3,
        )
    )


def words(seed: int = 0) -> TokenBatch:
    """Rows of a, b and c, of different lengths; the response is the same letter again and again."""
    rng = random.Random(seed)
    rows = []
    for _ in range(8):
        letter, prompt = rng.choice((103, 104, 105)), rng.randrange(2, 6)
        text = [rng.choice((103, 104, 105)) for _ in range(prompt)] + [letter] * 4
        rows.append(TokenSequence(tuple(text), (False,) * prompt + (True,) * 4))
    return collate(rows, pad_id=0)


def trained(learner: ModelLearner, steps: int, first: int = 0) -> list[float]:
    everything = [list(range(8))]
    return [learner.train(words(first + step), Sft(), everything, 1.0)["loss"] for step in range(steps)]


def weights(learner: ModelLearner) -> dict[str, Tensor]:
    parameters = learner.model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in parameters if parameter.requires_grad}


@pytest.mark.parametrize("name", list(METHODS))
def test_training_learns_and_goes_on_bit_for_bit(folder: Path, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    learner = made(folder, tiny_folder, name)
    before = weights(learner)
    losses = trained(learner, 10)
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(before[part], after) for part, after in weights(learner).items())
    frozen = made(folder, tiny_folder, name)
    moved = {part for part, _ in learner.model.named_parameters()} - set(before)
    ours, theirs = dict(learner.model.named_parameters()), dict(frozen.model.named_parameters())
    assert all(torch.equal(ours[part], theirs[part]) for part in moved)
    learner.save_state(tmp_path)
    frozen.load_state(tmp_path)
    assert trained(frozen, 2, first=10) == trained(learner, 2, first=10)
    found = weights(frozen)
    assert all(torch.equal(found[part], after) for part, after in weights(learner).items())


@pytest.mark.parametrize("name", list(METHODS))
def test_cutting_the_batch_changes_nothing(folder: Path, tiny_folder: Path, name: str) -> None:
    whole, cut = made(folder, tiny_folder, name), made(folder, tiny_folder, name, max_tokens=12)
    assert whole._passes(words()) != cut._passes(words())
    assert trained(whole, 1) == pytest.approx(trained(cut, 1), rel=1e-5)
    for part, after in weights(whole).items():
        torch.testing.assert_close(weights(cut)[part], after, rtol=1e-3, atol=1e-4)
    assert runs_flat(whole.model) == support(METHODS[name]).flat


@pytest.mark.parametrize("name", ADAPTED)
def test_the_adapter_of_a_learner_is_saved(folder: Path, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    learner = made(folder, tiny_folder, name)
    learner.save_adapter(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_learner_without_adapters_says_so(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    learner = made(folder, tiny_folder, "layers", Layers(last=1))
    with pytest.raises(RecipeError, match="policy trains weights of its own, so it has no adapters"):
        learner.save_adapter(tmp_path)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "llama_adapter", "prompt_tuning", "p_tuning", "layers"])
def test_activations_may_be_computed_again(folder: Path, tiny_folder: Path, name: str) -> None:
    kept = made(folder, tiny_folder, name)
    again = ModelLearner(replace(kept.spec, gradient_checkpointing=True))
    assert trained(again, 1) == trained(kept, 1)
    for part, after in weights(kept).items():
        torch.testing.assert_close(weights(again)[part], after, rtol=1e-5, atol=1e-6)


def test_pissa_is_drawn_by_the_seed(folder: Path, tiny_folder: Path) -> None:
    """The randomised decomposition is the same again, so the frozen rest of the base is too."""
    one, two = (made(folder, tiny_folder, "lora", Lora(r=4, init="pissa")) for _ in range(2))
    ours, theirs = one.model.state_dict(), two.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
