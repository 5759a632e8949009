"""A judge that runs here: a model of its own in a rollout engine of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.errors import RecipeError, TrainingError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.rewards.question import FORCED, LETTERS, Question
from rlhf.rewards.verdicts import Verdict
from rlhf.roles import RolloutEngine
from rlhf.types import Prompt, Sampling


@dataclass(frozen=True)
class EngineJudge:
    """Reads the preference off the model's first token, for which only `A` and `B` are allowed.

    The verdict is p(A) / (p(A) + p(B)) (Lee et al. 2023, RLAIF): always readable, one token a question, and finer than
    the letter alone, so that even a weak model ranks responses.
    """

    engine: RolloutEngine
    tokenizer: ChatTokenizer
    criteria: str
    max_prompt_tokens: int

    @property
    def conditions(self) -> Mapping[str, Any]:
        """How the answer is drawn, and from which tokenizer's and template's ids."""
        return {"sampling": [0, 1], "letters": LETTERS, "words": self.tokenizer.fingerprint()}

    def text(self, question: Question) -> str:
        """Return a question in words."""
        return question.text(self.criteria, FORCED)

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return a verdict on each question, 0 to 1; TrainingError when one is longer than `max_prompt_tokens`."""
        if not questions:
            return []
        prompts = [self._prompt(question) for question in questions]
        letters = self._letters(self.text(questions[0]))
        sampling = Sampling(max_tokens=1, temperature=0, allowed=letters)
        rollouts = self.engine.generate(prompts, sampling, [[0]] * len(prompts)).result()
        first = (rollout.tokens[0] == letters[0] for rollout in rollouts)
        likely = (math.exp(rollout.logprobs[0]) for rollout in rollouts)
        return [share if is_first else 1 - share for is_first, share in zip(first, likely, strict=True)]

    def _prompt(self, question: Question) -> Prompt:
        text = self.text(question)
        tokens = self.tokenizer.prompt_ids([{"role": "user", "content": text}])
        if len(tokens) > self.max_prompt_tokens:
            raise TrainingError(
                f"the judge's question about prompt id {question.prompt_id} has {len(tokens)} tokens, its"
                f" max_prompt_tokens is {self.max_prompt_tokens}: raise that, or lower the stage's max_response_tokens"
            )
        return Prompt(question.prompt_id, tuple(tokens), text)

    def _letters(self, text: str) -> tuple[int, ...]:
        """Return the token of each letter where the model would say it."""
        message = {"role": "user", "content": text}
        answers = [self.tokenizer.completion_ids([message], letter)[1] for letter in LETTERS]
        ids = tuple(answer[0] for answer in answers)
        if len(set(ids)) < len(LETTERS) or any(len(answer) != 2 for answer in answers):
            raise RecipeError("the judge's tokenizer has no single token for A and B each: give its `url` instead")
        return ids
