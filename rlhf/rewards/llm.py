"""A language model as judge (RLAIF): responses to one prompt are compared pair by pair."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, permutations
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.errors import TrainingError
from rlhf.rewards.question import Question
from rlhf.rewards.verdicts import Verdict, VerdictCache, verdict_key
from rlhf.roles import Ready
from rlhf.types import Rollout

log = logging.getLogger("rlhf")
QUESTIONS_PER_CALL = 128
"""Asked together and then kept, so that a run that breaks off has little to ask again."""


class Judge(Protocol):
    """A model that says which of two responses is better."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What beside the model and the question's text its verdicts depend on, in JSON."""
        ...

    def text(self, question: Question) -> str:
        """Return a question in this judge's words."""
        ...

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return the first response's share of the win in each question, or None where the answer made no sense."""
        ...


class LlmReward:
    """A `RewardSource` that scores groups: consecutive rollouts with one prompt id.

    P(i is better than j) is the mean of the verdicts on (i, j) and on (j, i), so that a judge that likes the first or
    the second place says nothing; the score of i is the mean of P(i is better than j) over the others of its group.
    A group of n costs n * (n - 1) questions; equal texts share the win without one.
    """

    def __init__(self, judge: Judge, identity: str, cache: VerdictCache) -> None:
        """`identity` stands for the model in the cache: equal ones answer alike."""
        self.judge = judge
        self.identity = identity
        self.cache = cache
        self.asked = self.unreadable = 0

    def score(self, rollouts: Sequence[Rollout]) -> Ready[Tensor]:
        """Return scores `[B]` float32, from 0 to 1; TrainingError when a prompt has only one response."""
        groups = [list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt.id)]
        for group in groups:
            if len(group) < 2:
                raise TrainingError(
                    f"prompt id {group[0].prompt.id} has one response, and a language model as judge compares"
                    " responses to one prompt: set samples_per_prompt to at least 2"
                )
        verdicts = self._verdicts({question for group in groups for question in _questions(group)})
        scores = [_score(index, group, verdicts) for group in groups for index in range(len(group))]
        return Ready(torch.tensor(scores, dtype=torch.float32))

    def _verdicts(self, questions: set[Question]) -> dict[Question, float]:
        """Return the verdict on each question, from the cache where it is there; unreadable ones are ties."""
        conditions = self.judge.conditions
        keys = {q: verdict_key(self.identity, conditions, self.judge.text(q)) for q in sorted(questions, key=_order)}
        known: dict[str, Verdict] = {**self.cache.find(list(keys.values()))}
        missing = [question for question, key in keys.items() if key not in known]
        for start in range(0, len(missing), QUESTIONS_PER_CALL):
            part = missing[start : start + QUESTIONS_PER_CALL]
            new = dict(zip((keys[question] for question in part), self.judge.verdicts(part), strict=True))
            self.cache.keep(new)
            known |= new
        self.asked += len(missing)
        self._warn([known[key] for key in keys.values()])
        return {question: 0.5 if (verdict := known[key]) is None else verdict for question, key in keys.items()}

    def _warn(self, verdicts: Sequence[Verdict]) -> None:
        unreadable = sum(verdict is None for verdict in verdicts)
        self.unreadable += unreadable
        if unreadable:
            log.warning(
                "the judge's answer was neither A, B nor tie, twice, to %d of %d questions; they count as ties",
                unreadable,
                len(verdicts),
            )


def _questions(group: Sequence[Rollout]) -> Iterator[Question]:
    """Yield every pair of different texts in both orders."""
    for one, other in permutations(group, 2):
        if one.text != other.text:
            yield _question(one, other)


def _question(first: Rollout, second: Rollout) -> Question:
    return Question(first.prompt.id, first.prompt.text, first.text, second.text)


def _order(question: Question) -> tuple[str, str, str]:
    return question.prompt_id, question.first, question.second


def _score(index: int, group: Sequence[Rollout], verdicts: dict[Question, float]) -> float:
    mine = group[index]
    others = [other for place, other in enumerate(group) if place != index]
    return sum(_wins(mine, other, verdicts) for other in others) / len(others)


def _wins(one: Rollout, other: Rollout, verdicts: dict[Question, float]) -> float:
    """Return P(one is better than other), both orders averaged."""
    if one.text == other.text:
        return 0.5
    return (verdicts[_question(one, other)] + 1 - verdicts[_question(other, one)]) / 2
