"""The honest comparison: same prompts, same decoding, same seeds, one estimator for all candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.masked import masked_mean
from rlhf.data.collate import collate_rollouts
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import GuardError
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Agreement, CompareStage
from rlhf.report.curves import read_curves
from rlhf.report.html import write_html
from rlhf.report.json import write_json
from rlhf.report.results import CandidateSamples, Comparison, Sample
from rlhf.report.statistics import compare
from rlhf.roles import RewardSource
from rlhf.stages.context import StageContext
from rlhf.stages.samples import write_samples
from rlhf.stages.sft import Summary
from rlhf.types import Prompt, Rollout, Sampling, TokenBatch

Drawn = dict[str, tuple[list[Rollout], Tensor]]
"""Each candidate's rollouts and their sequence logprobs `[B]` under the candidate itself."""


def run(stage: CompareStage, context: StageContext) -> Summary:
    """Sample every candidate, score all samples alike, and write the report.

    The KL of a sample is sum_t log pi(token) - log ref(token), both by the trainer's model, the reference being the
    baseline; its mean over samples estimates the sequence-level KL(pi || ref) without bias at the stage's temperature.
    """
    tokenizer = context.tokenizer(stage.baseline)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    context.tracker.begin("sampling", len(stage.candidates))
    drawn: Drawn = {}
    for index, name in enumerate(stage.candidates):
        drawn[name] = _draw(name, prompts, stage, context, tokenizer.pad_id)
        context.tracker.advance(index + 1, {"length": _mean_length(drawn[name][0])})
    kl = _sequence_kl(drawn, stage, context, tokenizer.pad_id)
    golds = _judged(drawn, context.judge(stage.gold, tokenizer.pad_id))
    rewards = _judged(drawn, context.judge(stage.reward, tokenizer.pad_id))
    candidates = []
    for name, (rollouts, _) in drawn.items():
        write_samples(context.folder / "samples" / name, 0, rollouts, golds[name])
        candidates.append(_candidate(name, context.recipe, rollouts, golds[name], rewards[name], kl[name].tolist()))
    comparison = compare(candidates, stage.baseline, context.seed("bootstrap"), stage.bootstrap_samples)
    _report(comparison, candidates, stage, context)
    return {result.name: result.gold for result in comparison.candidates}


def _draw(
    name: str, prompts: Sequence[Prompt], stage: CompareStage, context: StageContext, pad_id: int
) -> tuple[list[Rollout], Tensor]:
    """Return a candidate's rollouts and their sequence logprobs `[B]` under the candidate itself."""
    engine = context.launcher.rollout(context.rollout(name))
    policy = context.launcher.policy(context.frozen("policy", "causal", name, stage.temperature))
    seeds = [[context.seed(prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in prompts]
    rollouts = engine.generate(prompts, Sampling(stage.max_response_tokens, stage.temperature), seeds).result()
    batch = collate_rollouts(rollouts, pad_id)
    logprobs = policy.logprobs(batch).result().logprobs
    _check_served(name, logprobs, batch)
    return rollouts, sequence_logprobs(logprobs, batch.response_mask)


def _check_served(name: str, logprobs: Tensor, batch: TokenBatch) -> None:
    gap = float(masked_mean((logprobs - batch.rollout_logprobs).abs(), batch.response_mask))
    if not gap <= Agreement().tolerance:
        raise GuardError(f"the engine's logprobs differ from those of {name} by {gap:.3f} nats in the mean")


def _sequence_kl(drawn: Drawn, stage: CompareStage, context: StageContext, pad_id: int) -> dict[str, Tensor]:
    """Return log pi - log ref of every sample, `[B]` per candidate; exactly 0 for the baseline."""
    reference = context.launcher.policy(context.frozen("policy", "causal", stage.baseline, stage.temperature))
    result = {}
    for name, (rollouts, own) in drawn.items():
        batch = collate_rollouts(rollouts, pad_id)
        result[name] = own - sequence_logprobs(reference.logprobs(batch).result().logprobs, batch.response_mask)
    return result | {stage.baseline: torch.zeros_like(result[stage.baseline])}


def _judged(drawn: Drawn, judge: RewardSource) -> dict[str, list[float]]:
    """Return the judge's score of every sample, per candidate."""
    return {name: judge.score(rollouts).result().tolist() for name, (rollouts, _) in drawn.items()}


def _candidate(
    name: str,
    recipe: Recipe,
    rollouts: Sequence[Rollout],
    golds: Sequence[float],
    rewards: Sequence[float],
    kls: Sequence[float],
) -> CandidateSamples:
    kind = next((stage.kind for stage in recipe.stages if stage.name == name), "base")
    samples = (
        Sample(r.prompt.id, r.prompt.text, r.text, gold, reward, kl, len(r.tokens), r.finish_reason)
        for r, gold, reward, kl in zip(rollouts, golds, rewards, kls, strict=True)
    )
    return CandidateSamples(name, kind, tuple(samples))


def _mean_length(rollouts: Sequence[Rollout]) -> float:
    return sum(len(rollout.tokens) for rollout in rollouts) / len(rollouts)


def _report(
    comparison: Comparison, candidates: Sequence[CandidateSamples], stage: CompareStage, context: StageContext
) -> None:
    curves = read_curves(context.folder.parent.parent)
    facts = {
        "Prompts": f"{len({s.prompt_id for s in candidates[0].samples})} held out, disjoint from all training prompts",
        "Samples per prompt": str(stage.samples_per_prompt),
        "Decoding": f"temperature {stage.temperature}, at most {stage.max_response_tokens} tokens, same for all",
        "KL": f"mean over samples of log pi - log ref, reference {stage.baseline}, in nats a response",
        "Run seed": str(context.recipe.seed),
        "Model": f"{context.recipe.model.path} ({context.recipe.model.dtype})",
    }
    write_json(context.folder / "report.json", comparison)
    write_html(context.folder / "report.html", comparison, curves, candidates, facts)
