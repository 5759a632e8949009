"""The batches that learners are measured on: random tokens, prompts twice the responses, lengths skewed as in data."""

from __future__ import annotations

import random

import torch

from rlhf.data.collate import collate
from rlhf.data.sequences import answered
from rlhf.types import Experience, PreferenceBatch, TokenBatch

PROMPT, RESPONSE, SPREAD = 128, 64, 0.6
"""Mean tokens, and the standard deviation of their logarithm."""

Sequence = tuple[list[int], list[int]]
"""A prompt and a response."""


class Drawer:
    """Draws prompts and responses by one seed; a sequence has at most `longest` tokens."""

    def __init__(self, vocabulary: int, longest: int, seed: int = 0) -> None:
        self.vocabulary = vocabulary
        self.longest = longest
        self.random = random.Random(seed)

    def tokens(self, mean: int) -> list[int]:
        """Return some tokens; their number is log-normal, and at most half of `longest`."""
        drawn = mean * self.random.lognormvariate(-(SPREAD**2) / 2, SPREAD)
        count = max(1, min(self.longest // 2, round(drawn)))
        return [self.random.randrange(self.vocabulary) for _ in range(count)]

    def sequences(self, count: int) -> TokenBatch:
        """Return single sequences, no two with the same prompt."""
        return collated([(self.tokens(PROMPT), self.tokens(RESPONSE)) for _ in range(count)])

    def pairs(self, count: int) -> PreferenceBatch:
        """Return pairs: two responses to each prompt; the reference's logprobs are those of random guesses."""
        prompts = [self.tokens(PROMPT) for _ in range(count)]
        chosen, rejected = (collated([(prompt, self.tokens(RESPONSE)) for prompt in prompts]) for _ in range(2))
        guess = -float(torch.tensor(float(self.vocabulary)).log())
        sums = [guess * side.response_mask.sum(dim=1).float() for side in (chosen, rejected)]
        return PreferenceBatch(chosen, rejected, torch.zeros(count), *sums)

    def experience(self, count: int) -> Experience:
        """Return what a policy learns from, with advantages of mean 0."""
        batch = self.sequences(count)
        generator = torch.Generator().manual_seed(0)
        advantages = torch.randn(batch.tokens.shape, generator=generator) * batch.response_mask
        guesses = -torch.tensor(float(self.vocabulary)).log() * batch.response_mask
        return Experience(
            batch=TokenBatch(batch.tokens, batch.attention_mask, batch.response_mask, guesses),
            scores=torch.zeros(count),
            kl=torch.zeros_like(guesses),
            old_logprobs=guesses,
            ref_logprobs=guesses,
            advantages=advantages,
        )


def collated(rows: list[Sequence]) -> TokenBatch:
    """Return sequences as a padded batch."""
    return collate([answered(tuple(prompt), tuple(response)) for prompt, response in rows], pad_id=0)
