"""What is measured of a candidate: KL, implicit accuracy and judgements, against numbers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.data.collate import collate_rollouts
from rlhf.engines.base import RolloutSpec
from rlhf.engines.hf_generate import TransformersEngine
from rlhf.engines.scoring import response_logprobs
from rlhf.models.loading import load_causal
from rlhf.models.tiny import TURN_END, build_tiny
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.role_schema import RolloutRole
from rlhf.roles import Ready
from rlhf.stages.drawn import Drawn
from rlhf.stages.evaluate import add_kl, implicit_accuracy, judged
from rlhf.stages.parts import Parts
from rlhf.types import Prompt, Rollout, Sampling, TokenScores


def rollout(prompt: str, text: str) -> Rollout:
    return Rollout(Prompt(prompt, (9, 9), prompt), (7, TURN_END), (-1.0, -1.0), text, "stop", 0, 0)


def drawn(folder, logprobs, name="ppo") -> Drawn:
    rollouts = [rollout("p0", "x"), rollout("p1", "y")]
    item = Drawn(name, [one.prompt for one in rollouts], False, 1, Parts(folder, print))
    for one, logprob in zip(rollouts, logprobs, strict=True):
        item.add([one], torch.tensor([logprob]), torch.ones(1), torch.zeros(1))
    return item


class Constant:
    """A reference that gives every response token the same log-probability."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob

    def logprobs(self, batch):
        filled = torch.full(batch.tokens.shape, self.logprob).masked_fill(~batch.response_mask, 0)
        return Ready(TokenScores(filled, torch.zeros(batch.tokens.shape)))


@pytest.mark.parametrize("size", [1, 2])
def test_the_log_ratio_of_a_sample_is_its_own_logprob_less_the_references(tiny_tokenizer, tmp_path, size):
    item, made = drawn(tmp_path, (-1.0, -3.0)), []
    add_kl(item, size, [None, None], lambda: Constant(-2.0), tiny_tokenizer, made.append)
    assert item.parts.column("ppo/kl", "kl").tolist() == [3.0, 1.0]
    assert len(made) == 2 // size


def test_implicit_accuracy_counts_what_the_policy_gained_on_the_reference():
    margins = {"sft": (1.0, -1.0, 0.0, 2.0), "dpo": (2.0, -0.5, -1.0, 2.0), "foreign": ()}
    columns = {name: np.array(column, dtype=np.float32) for name, column in margins.items()}
    assert implicit_accuracy(columns, "sft") == {"sft": None, "dpo": 2.5 / 4, "foreign": None}


def test_answers_to_one_prompt_reach_the_judge_side_by_side():
    models = {name: [rollout("p0", f"{name}0"), rollout("p1", f"{name}1")] for name in "ab"}
    seen = []

    class Judge:
        def score(self, rollouts):
            seen.append([item.text for item in rollouts])
            return Ready(torch.arange(float(len(rollouts))))

    assert judged(models, Judge(), 1) == {"a": [0.0, 2.0], "b": [1.0, 3.0]}
    assert seen == [["a0", "b0", "a1", "b1"]]


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("other") / "llama", seed=1)


def sharper(folder, factor=8.0):
    """A random model's logits are almost flat; larger ones make policies that differ."""
    model = load_causal(folder, "float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    return model.eval()


def next_logprobs(model, tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits[:, -1].double().log_softmax(-1)


def exact_kl(policy, reference, prompt: list[int]) -> float:
    """KL of the distributions over responses of at most two tokens, summed over all of them."""
    first, ref_first = next_logprobs(policy, [prompt])[0], next_logprobs(reference, [prompt])[0]
    words = range(len(first))
    second = next_logprobs(policy, [[*prompt, word] for word in words])
    ref_second = next_logprobs(reference, [[*prompt, word] for word in words])
    inner = (second.exp() * (second - ref_second)).sum(-1)
    inner[TURN_END] = 0  # the response is over
    return float((first.exp() * (first - ref_first + inner)).sum())


def test_the_mean_log_ratio_estimates_the_exact_kl_without_bias(tiny_folder, other_folder):
    policy, reference = sharper(tiny_folder), sharper(other_folder)
    tokenizer = load_tokenizer(tiny_folder)
    prompt = Prompt("p", tuple(tokenizer.prompt_ids([{"role": "user", "content": "hi"}])), "hi")
    role = RolloutRole(engine="transformers", max_sequences=1000)
    engine = TransformersEngine(RolloutSpec(tiny_folder, "float32", role, max_length=64, threads=1, seed=0))
    engine.model = policy
    rollouts = engine.generate([prompt], Sampling(2), [list(range(4000))])
    batch = collate_rollouts(rollouts, tokenizer.pad_id)
    with torch.no_grad():
        own, ref = (
            sequence_logprobs(response_logprobs(model, batch), batch.response_mask) for model in (policy, reference)
        )
    ratios = (own - ref).double()
    error = float(ratios.std()) / math.sqrt(len(ratios))
    exact = exact_kl(policy, reference, list(prompt.tokens))
    assert exact > 10 * error
    assert abs(float(ratios.mean()) - exact) < 3.5 * error
