"""Instruction data from a few seed tasks: a model writes new instructions and answers them (self-instruct).

Wang et al. 2022, for models that chat: the model is asked for a list of tasks, and finds some of those that are there
at the beginning of its own answer, so it goes on with new ones; small models follow a list where they do not follow a
description. Each new instruction is then answered as any user's would be. What is not worth keeping is set aside with
the reason.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rlhf.data.reading import read_conversations, read_prompts
from rlhf.data.rows import Conversation
from rlhf.data.synthesized import Chat, Rejected, Turn
from rlhf.errors import DataError, TrainingError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.stage_schema import CompareStage, SynthesizeStage
from rlhf.rewards.skips import Skips
from rlhf.roles import RewardSource, RolloutEngine
from rlhf.stages.context import StageContext
from rlhf.stages.instructions import answer_fault, instruction_fault, normalised, parse_instructions
from rlhf.stages.pool import Candidates, Neighbour
from rlhf.stages.sft import Summary
from rlhf.stages.written import Written
from rlhf.types import Prompt, Rollout, Sampling

MOST_REQUESTS, FEWEST_REQUESTS = 64, 4
TASKS = 4
"""A list is given room for so many more of the longest seed."""

OWN_EXAMPLES = 2
REQUEST = "Write a list of different tasks that people may give to an assistant, one in each line."
ADVICE = {
    "no whole instruction": "raise max_response_tokens, or take a model that follows instructions",
    "debris": "lower temperature, or take a model that follows instructions",
    "too short": "lower min_words",
    "too long": "raise max_words",
    "not a text task": "look at the seeds: they may be about pictures or files",
    "repeat": "raise temperature, or give more seeds",
    "similar": "raise max_similarity or temperature, or give more seeds",
    "answer: cut off": "raise max_response_tokens",
    "answer: low score": "lower min_score",
}


@dataclass(frozen=True)
class Draft:
    """An instruction that passed, on its way to its answer; `number` counts all that the model wrote, from 1."""

    number: int
    instruction: str
    examples: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """What it is called in examples and data."""
        return f"new-{self.number}"


def run(stage: SynthesizeStage, context: StageContext) -> Summary:
    """Write `data.jsonl` with `count` new chats, and `rejected.jsonl` with what was not good enough."""
    writer = Writer(stage, context)
    made = Written(context.folder, stage.name, writer.seeds)
    context.tracker.begin("writing", 1)
    with context.recovery.going_on([made.files]) as going:
        made.begin(resumed=going.step > 0)
        turn, drawn, asked = going.step, going.carried.get("drawn", 0), going.carried.get("asked", 0)
        while len(made.own) < stage.count:
            if drawn >= writer.most:
                raise TrainingError(_exhausted(stage, made, drawn))
            clock, before = time.perf_counter(), context.tracker.generated_tokens
            requests = min(MOST_REQUESTS, max(FEWEST_REQUESTS, -(-2 * (stage.count - len(made.own)) // TASKS)))
            drawn += writer.write(range(asked, asked + requests), drawn, made)
            made.flush()
            turn, asked = turn + 1, asked + requests
            speed = (context.tracker.generated_tokens - before) / (time.perf_counter() - clock)
            left = stage.count - len(made.own)
            context.tracker.expect(turn + -(-left * turn // max(1, len(made.own))))
            figures = {"rows": len(made.own), "drawn": drawn, "rejected": made.reasons.total()}
            context.tracker.log(turn, {**figures, "tokens_per_second": speed})
            going.done(turn, partial(dict, drawn=drawn, asked=asked), commit=True)
    reasons = {f"rejected, {reason}": count for reason, count in made.reasons.most_common()}
    return {"rows": len(made.own), "drawn": drawn, "rejected": made.reasons.total(), **reasons}


class Writer:
    """Asks a model for instructions and answers, and judges what comes."""

    def __init__(self, stage: SynthesizeStage, context: StageContext) -> None:
        self.stage = stage
        self.context = context
        self.tokenizer: ChatTokenizer = context.tokenizer(stage.policy)
        self.seeds = [(f"seed-{n}", task(row)) for n, row in enumerate(read_conversations(stage.seeds), start=1)]
        self.most = stage.count * stage.max_attempts
        self.room = TASKS * max(len(self._begun(text)[1]) for _, text in self.seeds)
        self.compared = compared_prompts(context)
        self.engine: RolloutEngine = context.launcher.rollout(context.rollout(stage.policy))
        self.judge: RewardSource | None = context.judge(stage.judge, self.tokenizer.pad_id) if stage.judge else None

    def write(self, requests: Sequence[int], drawn: int, made: Written) -> int:
        """Ask for lists, answer what passes up to the stage's `count`, sort it all into `made`, and return how many.

        `requests` are their numbers, and `drawn` instructions were written before.
        """
        room = self.stage.count - len(made.own)
        shown = [self._shown(number, made.own) for number in requests]
        prompts = [self._request(number, tasks) for number, tasks in zip(requests, shown, strict=True)]
        pool = Candidates(made.pool)
        drafts: list[Draft] = []
        before = drawn
        for tasks, rollout in zip(shown, self._draw(prompts, "instruction", self.room), strict=True):
            examples = tuple(name for name, _ in tasks)
            for text in parse_instructions(rollout.text, rollout.finish_reason == "stop") or [""]:
                if len(drafts) == room or drawn == self.most:
                    break
                drawn += 1
                found = self._draft(drawn, text, examples, rollout, pool)
                if isinstance(found, Rejected):
                    made.reject(found)
                else:
                    drafts.append(found)
                    pool.add(found.name, found.instruction)
        self._answer(drafts, made)
        return drawn - before

    def _shown(self, number: int, own: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Choose the examples of one request: up to two of the model's own, the rest seeds, in any order."""
        rng = random.Random(self.context.seed("examples", number))
        mine = rng.sample(own, min(OWN_EXAMPLES, len(own), self.stage.examples - 1))
        tasks = mine + rng.sample(self.seeds, min(self.stage.examples - len(mine), len(self.seeds)))
        rng.shuffle(tasks)
        return tasks

    def _request(self, number: int, tasks: list[tuple[str, str]]) -> Prompt:
        """Return the request, and a list begun with as many of the examples as fit; the others are dropped."""
        while True:
            begun = "".join(f"{n}. {' '.join(task.split())}\n" for n, (_, task) in enumerate(tasks, start=1))
            begun += f"{len(tasks) + 1}."
            asked, answer = self._begun(begun)
            tokens = asked + answer
            if len(tokens) <= self.stage.max_prompt_tokens:
                return Prompt(f"request-{number}", tokens, begun)
            if len(tasks) == 1:
                raise DataError(
                    f"{tasks[0][0]} of the seeds alone makes a request of {len(tokens)} tokens, the limit is"
                    f" {self.stage.max_prompt_tokens} (max_prompt_tokens)"
                )
            del tasks[max(range(len(tasks)), key=lambda place: len(tasks[place][1]))]

    def _begun(self, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of the request and those of the beginning of an answer."""
        asked, begun = self.tokenizer.completion_ids([{"role": "user", "content": REQUEST}], answer)
        return tuple(asked), tuple(begun[:-1])

    def _draft(
        self, number: int, text: str, examples: tuple[str, ...], rollout: Rollout, pool: Candidates
    ) -> Draft | Rejected:
        reason = instruction_fault(text, self.stage.min_words, self.stage.max_words)
        if reason is None and normalised(text) in self.compared:
            reason = "asked in a comparison"
        if reason is None and text in pool:
            reason = "repeat"
        if reason is None and pool.similarity(text) > self.stage.max_similarity:
            reason = "similar"
        if reason is None:
            return Draft(number, text, examples, rollout.seed)
        return Rejected(reason, text or rollout.text, text, examples, rollout.seed)

    def _answer(self, drafts: Sequence[Draft], made: Written) -> None:
        """Have the instructions answered, and keep those whose answer is worth it."""
        prompts = [
            Prompt(draft.name, tuple(self.tokenizer.prompt_ids(_question(draft))), draft.instruction)
            for draft in drafts
        ]
        fits = [len(prompt.tokens) <= self.stage.max_prompt_tokens for prompt in prompts]
        fitting = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        rollouts = iter(self._draw(fitting, "answer", self.stage.max_response_tokens))
        answered: list[tuple[Draft, Rollout]] = []
        for draft, fit in zip(drafts, fits, strict=True):
            rollout = next(rollouts) if fit else None
            reason = "too long"
            if rollout:
                reason = answer_fault(rollout.text, draft.instruction, rollout.finish_reason == "stop") or ""
            if rollout and not reason:
                answered.append((draft, rollout))
            else:
                text = rollout.text if rollout else ""
                made.reject(Rejected(reason, text, draft.instruction, draft.examples, draft.seed))
        scores = self._scores([rollout for _, rollout in answered])
        for (draft, rollout), score in zip(answered, scores, strict=True):
            if score is None or score >= self.stage.min_score:
                made.keep(_chat(draft, rollout, made.pool.nearest(draft.instruction), score))
            else:
                low = Rejected("answer: low score", rollout.text, draft.instruction, draft.examples, draft.seed)
                made.reject(low)

    def _scores(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        if self.judge is None or not rollouts:
            return [None] * len(rollouts)
        values = self.judge.score(rollouts).result()
        Skips(self.judge).kept(values, rollouts)
        return [float(value) for value in values.tolist()]

    def _draw(self, prompts: Sequence[Prompt], purpose: str, tokens: int) -> list[Rollout]:
        if not prompts:
            return []
        seeds = [[self.context.seed(purpose, prompt.id)] for prompt in prompts]
        sampling = Sampling(min(tokens, self.stage.max_response_tokens), self.stage.temperature)
        rollouts = self.engine.generate(prompts, sampling, seeds).result()
        self.context.tracker.spend(generated_tokens=sum(len(rollout.tokens) for rollout in rollouts))
        return rollouts


def task(row: Conversation) -> str:
    """Return what a seed asks: its first message of the user."""
    found = next((message["content"] for message in row.messages if message["role"] == "user"), None)
    if found is None:
        raise DataError(f"{row.where}: a seed needs a message of the user, the task")
    return found.strip()


def compared_prompts(context: StageContext) -> set[str]:
    """Return what the recipe's comparisons ask, normalised: nothing of it may come into training data."""
    stages = (stage for stage in context.recipe.stages if isinstance(stage, CompareStage))
    return {normalised(row.text) for stage in stages for row in read_prompts(stage.prompts)}


def _question(draft: Draft) -> list[dict[str, str]]:
    return [{"role": "user", "content": draft.instruction}]


def _chat(draft: Draft, rollout: Rollout, near: Neighbour, score: float | None) -> Chat:
    return Chat(
        id=draft.name,
        messages=(Turn("user", draft.instruction), Turn("assistant", rollout.text.strip())),
        examples=draft.examples,
        nearest=near.name,
        similarity=near.similarity,
        instruction_seed=draft.seed,
        answer_seed=rollout.seed,
        score=score,
    )


def _exhausted(stage: SynthesizeStage, made: Written, drawn: int) -> str:
    reasons = made.reasons.most_common()
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
    remedy = next((ADVICE[reason] for reason, _ in reasons if reason in ADVICE), "look at rejected.jsonl")
    return (
        f"only {len(made.own)} of {stage.count} chats after {drawn} drawn instructions (max_attempts"
        f" {stage.max_attempts}): set aside {counts}; {remedy}, or lower count"
    )
