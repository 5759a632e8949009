"""A critic's head fitted in closed form: against numpy, however the batch is cut, and with a state of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import OPTIMIZER, random_tokens
from learner_cases import TUNINGS
from torch import Tensor

from rlhf.algorithms.ridge import STRENGTHS
from rlhf.engines.base import LearnerSpec
from rlhf.engines.head_fit import FOLDS, fold_numbers
from rlhf.engines.learner import ModelLearner
from rlhf.engines.policy_objectives import ClippedValue
from rlhf.engines.scoring import value_states
from rlhf.engines.shares import Part, assemble
from rlhf.models.tuning import unwrapped
from rlhf.recipe.tuning_schema import Full, Tuning
from rlhf.types import TokenBatch, ValueBatch

LENGTHS = [9, 14, 6, 11, 8, 12, 10, 7, 13, 9, 11, 8]
FULL = Full()
PROMPTS = [4, 6, 3, 2, 6, 5, 4, 3, 6, 2, 5, 4]


def spec_of(folder: Path, tuning: Tuning = FULL, dtype: str = "float32", max_tokens: int = 10**6) -> LearnerSpec:
    return LearnerSpec(
        role="critic",
        kind="scalar",
        checkpoint=folder,
        dtype=dtype,  # type: ignore[arg-type]
        tuning=tuning,
        optimizer=OPTIMIZER,
        head_learning_rate=None,
        max_tokens_per_microbatch=max_tokens,
        temperature=1.0,
        threads=1,
        seed=1,
    )


def returns_of(batch: TokenBatch) -> ValueBatch:
    """Returns that the tokens tell, of which there are four: 2 after an even one, else -1, off by a few tenths."""
    batch = replace(batch, tokens=(10 + batch.tokens % 4).masked_fill(~batch.attention_mask, 0))
    noise = 0.3 * torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(4))
    before = torch.nn.functional.pad(batch.tokens[:, :-1], (1, 0))
    returns = (torch.where(before % 2 == 0, 2.0, -1.0) + noise).masked_fill(~batch.response_mask, 0)
    return ValueBatch(batch, torch.zeros_like(returns), returns)


@pytest.fixture(scope="module")
def batch() -> ValueBatch:
    return returns_of(random_tokens(7, LENGTHS, PROMPTS))


def fitted(learner: ModelLearner, batch: ValueBatch) -> tuple[Tensor, Tensor]:
    """What the fit says of the batch with each prompt left out, and then the head that stays."""
    return assemble([learner.fit_values(batch)]), assemble([learner.values(batch.batch)])


@pytest.mark.parametrize("name", TUNINGS)
def test_every_way_of_tuning_gets_the_head_that_numpy_finds(name: str, batch: ValueBatch, tiny_folder: Path) -> None:
    """With rows of its own for the penalty; and the values are the head's output everywhere."""
    learner = ModelLearner(spec_of(tiny_folder, TUNINGS[name]))
    left_out, values = fitted(learner, batch)
    mask = batch.batch.response_mask
    with torch.no_grad():
        states = value_states(learner.model, batch.batch).double().numpy()
    returns, folds = batch.returns[mask].double().numpy(), fold_numbers(batch)[:, None].expand(mask.shape)[mask].numpy()
    found = np.empty((len(STRENGTHS) - 1, len(returns)))
    for place, strength in enumerate(STRENGTHS[:-1]):
        for fold in range(FOLDS):
            weights, bias = solved(states[folds != fold], returns[folds != fold], strength)
            found[place, folds == fold] = states[folds == fold] @ weights + bias
    errors = ((found - returns) ** 2).sum(axis=1)
    chosen = int(np.abs(found - left_out[mask].numpy()).max(axis=1).argmin())
    assert errors[chosen] < 1.2 * errors.min() < 0.5 * ((returns - returns.mean()) ** 2).sum()
    weights, bias = solved(states, returns, STRENGTHS[chosen])
    found = found[chosen]
    np.testing.assert_allclose(left_out[mask].numpy(), found, atol=1e-4)
    np.testing.assert_allclose(values[mask].numpy(), states @ weights + bias, atol=1e-4)
    assert not left_out[~mask].any()


def solved(states: np.ndarray, returns: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    mean, centre = states.mean(axis=0), returns.mean()
    centred = states - mean
    penalty = np.sqrt(strength * (centred**2).mean() * len(states)) * np.eye(states.shape[1])
    rows, targets = np.vstack([centred, penalty]), np.concatenate([returns - centre, np.zeros(states.shape[1])])
    weights, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    return weights, float(centre - mean @ weights)


@pytest.mark.parametrize("tuning", ["full", "prefix_tuning"])
def test_passes_padding_and_what_stands_on_it_change_nothing(tuning: str, batch: ValueBatch, tiny_folder: Path) -> None:
    wide = replace(
        batch,
        batch=TokenBatch(*(torch.nn.functional.pad(item, (0, 5)) for item in vars(batch.batch).values())),
        values=torch.nn.functional.pad(batch.values, (0, 5)),
        returns=torch.nn.functional.pad(batch.returns, (0, 5), value=float("nan")),
    )
    plain = fitted(ModelLearner(spec_of(tiny_folder, TUNINGS[tuning])), batch)
    cut = fitted(ModelLearner(spec_of(tiny_folder, TUNINGS[tuning], max_tokens=24)), wide)
    for one, two in zip(plain, cut, strict=True):
        torch.testing.assert_close(one, two[:, : one.shape[1]], rtol=0, atol=2e-5)


def test_samples_of_a_prompt_are_left_out_together() -> None:
    one = random_tokens(7, [9] * 7, [4] * 7)
    tokens = one.tokens.clone()
    tokens[[1, 2, 6], :4] = tokens[0, :4]
    assert fold_numbers(returns_of(replace(one, tokens=tokens))).tolist() == [0, 0, 0, 1, 2, 3, 0]


def test_a_batch_of_one_prompt_gets_the_mean(tiny_folder: Path) -> None:
    batch = returns_of(random_tokens(7, [12], [3]))
    left_out, values = fitted(ModelLearner(spec_of(tiny_folder)), batch)
    mean = batch.returns[batch.batch.response_mask].mean()
    for found in (left_out, values):
        torch.testing.assert_close(found[batch.batch.response_mask], mean.expand(9))


def test_in_bfloat16_the_rounded_head_still_has_no_mean_error(batch: ValueBatch, tiny_folder: Path) -> None:
    learner = ModelLearner(spec_of(tiny_folder, TUNINGS["lora"], "bfloat16"))
    left_out, values = fitted(learner, batch)
    mask = batch.batch.response_mask
    assert float((values - batch.returns)[mask].mean()) == pytest.approx(0, abs=1e-3)
    assert float((left_out - batch.returns)[mask].var()) < float(batch.returns[mask].var())


def test_training_goes_on_from_the_fitted_head_and_a_state_keeps_it(
    batch: ValueBatch, tiny_folder: Path, tmp_path: Path
) -> None:
    """Its offset is no parameter, and the learner that loads the state has not been fitted."""
    learner = ModelLearner(spec_of(tiny_folder, TUNINGS["lora"]))
    left_out, before = fitted(learner, batch)
    taught = replace(batch, values=left_out)
    learner.save_state(tmp_path)
    after: list[Tensor] = []
    resumed = ModelLearner(spec_of(tiny_folder, TUNINGS["lora"]))
    resumed.load_state(tmp_path)
    for one in (learner, resumed):
        one.train(taught, ClippedValue(0.2), [list(range(12))], 1.0)
        after.append(assemble([one.values(batch.batch)]))
    assert torch.equal(*after)
    assert 0 < float((after[0] - before).abs().max()) < 0.5
    assert unwrapped(resumed.model).config.rlhf_score_offset == unwrapped(learner.model).config.rlhf_score_offset != 0


def test_a_state_without_an_offset_still_loads(batch: ValueBatch, tiny_folder: Path, tmp_path: Path) -> None:
    learner = ModelLearner(replace(spec_of(tiny_folder), kind="causal"))
    learner.save_state(tmp_path)
    assert isinstance(ModelLearner(spec_of(tiny_folder)).values(batch.batch), Part)
    learner.load_state(tmp_path)
