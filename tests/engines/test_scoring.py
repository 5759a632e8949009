"""Log-probabilities, values and scores stand where the alignment rule says, whatever the padding and the cutting."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import build_model, random_tokens, token_batch
from torch import Tensor, nn

from rlhf.engines.microbatch import rank_passes
from rlhf.engines.scoring import response_logprobs, response_values, score_share, sequence_scores, token_scores
from rlhf.engines.shares import assemble
from rlhf.types import TokenBatch


@pytest.fixture(scope="module")
def causal(tiny_folder: Path) -> nn.Module:
    return build_model(tiny_folder, "causal", lora=False).eval()


@pytest.fixture(scope="module")
def scalar(tiny_folder: Path) -> nn.Module:
    return build_model(tiny_folder, "scalar", lora=False).eval()


def plain_logits(model: nn.Module, batch: TokenBatch, row: int) -> Tensor:
    """Logits of one row alone, without padding."""
    return model(input_ids=batch.tokens[row : row + 1, : batch.lengths()[row]]).logits[0].double()


def widened(batch: TokenBatch, columns: int) -> TokenBatch:
    """The batch with more padding, all of it full of noise."""
    wide = TokenBatch(*(nn.functional.pad(value, (0, columns)) for value in vars(batch).values()))
    noise = torch.randint(6, 262, wide.tokens.shape, generator=torch.Generator().manual_seed(9))
    return replace(wide, tokens=torch.where(wide.attention_mask, wide.tokens, noise))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_are_log_softmax_of_the_logits_one_position_earlier(causal: nn.Module, temperature: float) -> None:
    batch = token_batch()
    with torch.no_grad():
        found = response_logprobs(causal, batch, temperature)
        for row, length in enumerate(batch.lengths().tolist()):
            expected = (plain_logits(causal, batch, row) / temperature).log_softmax(dim=-1)
            for t in range(batch.width):
                wanted = expected[t - 1, batch.tokens[row, t]] if batch.response_mask[row, t] else 0.0
                assert float(found[row, t]) == pytest.approx(float(wanted), abs=2e-6), (row, t, length)
    assert found.dtype == torch.float32


def test_mask_with_gaps_scores_only_what_it_marks(causal: nn.Module) -> None:
    batch = token_batch()
    gaps = batch.response_mask & (torch.arange(batch.width) % 2 == 0)
    with torch.no_grad():
        every = response_logprobs(causal, batch)
        some = response_logprobs(causal, replace(batch, response_mask=gaps))
    torch.testing.assert_close(some, every.masked_fill(~gaps, 0), rtol=0, atol=2e-6)
    assert some[gaps].abs().min() > 1


def test_entropy_is_that_of_the_softmax(causal: nn.Module) -> None:
    batch = token_batch()
    with torch.no_grad():
        found = token_scores(causal, batch, 0.8)[:, 1]
        distribution = torch.distributions.Categorical(logits=plain_logits(causal, batch, 1) / 0.8)
    expected = torch.zeros(batch.width, dtype=torch.double)
    expected[6:14] = distribution.entropy()[5:13]
    torch.testing.assert_close(found[1].double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("columns", [1, 9])
def test_padding_changes_nothing(causal: nn.Module, scalar: nn.Module, columns: int) -> None:
    batch = token_batch()
    wide = widened(batch, columns)
    with torch.no_grad():
        for score, model in ((response_logprobs, causal), (response_values, scalar)):
            narrow_result, wide_result = score(model, batch), score(model, wide)
            torch.testing.assert_close(wide_result[:, : batch.width], narrow_result, rtol=0, atol=2e-6)
            assert not wide_result[:, batch.width :].any()
        torch.testing.assert_close(sequence_scores(scalar, wide), sequence_scores(scalar, batch), rtol=0, atol=2e-6)


def test_batch_without_responses_scores_zero_with_a_zero_gradient(causal: nn.Module) -> None:
    batch = random_tokens(1, [5, 3], [5, 3])
    found = response_logprobs(causal, batch)
    assert found.shape == (2, 5)
    assert not found.any()
    gradients = torch.autograd.grad(found.sum(), list(causal.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


class RunningSum(nn.Module):
    """A scalar model whose value at a position is twice the sum of the tokens read so far, less 1."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(rlhf_score_offset=1.0)
        self.score = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.score.weight, 2.0)

    def base_model(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids.cumsum(dim=1).float()[..., None])


def by_hand() -> TokenBatch:
    """Rows [1, 2, 3, 4] with 2 prompt tokens and [5, 6, 7] with 1; the padding is 100."""
    tokens = torch.tensor([[1, 2, 3, 4, 100], [5, 6, 7, 100, 100]])
    columns = torch.arange(5)
    real = columns < torch.tensor([[4], [3]])
    return TokenBatch(tokens, real, real & (columns >= torch.tensor([[2], [1]])), torch.zeros(2, 5))


def test_value_before_a_token_has_read_all_tokens_before_it() -> None:
    expected = [[0, 0, 2 * (1 + 2) - 1, 2 * (1 + 2 + 3) - 1, 0], [0, 2 * 5 - 1, 2 * (5 + 6) - 1, 0, 0]]
    assert response_values(RunningSum(), by_hand()).tolist() == expected


def test_score_has_read_the_whole_sequence_and_no_padding() -> None:
    assert sequence_scores(RunningSum(), by_hand()).tolist() == [2 * 10 - 1, 2 * 18 - 1]


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("max_tokens", [1, 24, 30])
def test_cutting_keeps_rows_in_their_order(causal: nn.Module, scalar: nn.Module, max_tokens: int, ranks: int) -> None:
    batch = widened(token_batch(), 3)
    for score, model in (
        (partial(token_scores, temperature=1.0), causal),
        (sequence_scores, scalar),
        (response_values, scalar),
    ):
        shares = rank_passes(batch, max_tokens, False, ranks)
        parts = [score_share(partial(score, model), batch, passes) for passes in shares]
        with torch.no_grad():
            torch.testing.assert_close(assemble(parts), score(model, batch), rtol=0, atol=1e-5)


def test_values_of_a_real_model_follow_its_own_head(scalar: Any) -> None:
    batch = token_batch()
    with torch.no_grad():
        hidden = scalar.model(input_ids=batch.tokens[3:4, :11]).last_hidden_state
        expected = (hidden @ scalar.score.weight.T)[0, :, 0]
        values = response_values(scalar, batch)[3]
        score = sequence_scores(scalar, batch)[3]
    assert math.isclose(float(score), float(expected[-1]), abs_tol=2e-6)
    torch.testing.assert_close(values[2:11], expected[1:10], rtol=0, atol=2e-6)
    assert not values[:2].any()
    assert not values[11:].any()
