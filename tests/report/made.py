"""Comparisons with known numbers, for the tests of what is said about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlhf.recipe.seeds import method
from rlhf.report.results import Comparison, Cost
from rlhf.report.samples import CandidateSamples, Sample, Samples
from rlhf.report.statistics import compare

KINDS = ("sft", "ppo", "dpo")


def samples(name, *, gold=0.0, reward=0.0, kl=0.0, tokens=20, finish="stop", text=None, prompts=24, seed=0, noise=0.1):
    """Return one sample per prompt around the given means; difficulty is shared by all candidates.

    `reward` None leaves the proxy out.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    difficulty = np.random.default_rng(99).normal(0, 0.5, prompts)
    gaps = rng.normal(0, noise, (3, prompts))
    gaps -= gaps.mean(axis=1, keepdims=True) if prompts > 1 else 0
    rows = [
        Sample(
            prompt_id=f"p{place}",
            prompt=f"question {place}",
            response=f"answer {place} of {name}" if text is None else text,
            gold=float(gold + difficulty[place] + gaps[0, place]),
            reward=None if reward is None else float(reward + difficulty[place] + gaps[1, place]),
            kl=float(kl + gaps[2, place]),
            tokens=tokens,
            finish_reason=finish,
            entropy=1.5,
        )
        for place in range(prompts)
    ]
    return CandidateSamples(name, method(name) if method(name) in KINDS else "base", Samples.of(rows))


def spent(item, gradient, generated=0.0, seconds=10.0, accuracy=None):
    """Return a candidate with a cost, and with an accuracy on held-out pairs."""
    return replace(item, cost=Cost(gradient, generated, seconds, 2 * seconds), preference_accuracy=accuracy)


def comparison(*candidates: CandidateSamples, **rest) -> Comparison:
    """Compare against the first candidate."""
    return compare(candidates, candidates[0].name, seed=5, resamples=300, **rest)
