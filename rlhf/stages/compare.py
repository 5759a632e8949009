"""The honest comparison: same prompts, same decoding, same seeds, one estimator for all candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.data.reading import read_prompts
from rlhf.data.rows import PromptRow
from rlhf.data.synthesized import read_synthesized
from rlhf.errors import DataError
from rlhf.fingerprint import file_digest
from rlhf.recipe.base import FileData, FunctionJudge, Judge, LlmJudge, ModelJudge, PathData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.stage_schema import CompareStage, SynthesizeStage
from rlhf.report.curves import Curve, read_curves
from rlhf.report.evaluation import Evaluation, write_evaluation
from rlhf.report.frontier import frontier_point
from rlhf.report.html import write_html
from rlhf.report.json import write_json
from rlhf.report.results import Comparison, Cost, FrontierPoint
from rlhf.report.runs import read_environment
from rlhf.report.samples import CandidateSamples, ChatScore, Sample
from rlhf.report.wins import write_leaderboard
from rlhf.stages.context import StageContext
from rlhf.stages.evaluate import Drawn, draw, heldout_pairs, implicit_accuracy, judged, sequence_kl
from rlhf.stages.instructions import normalised
from rlhf.stages.retention import Retained, read_retention
from rlhf.stages.samples import write_samples
from rlhf.stages.sft import Summary


def run(stage: CompareStage, context: StageContext) -> Summary:
    """Sample every candidate (and the checkpoints it saved), score all samples alike, and write the report.

    The KL of a sample is sum_t log pi(token) - log ref(token), both by the trainer's model, the reference being the
    baseline; its mean over samples estimates the sequence-level KL(pi || ref) without bias at the stage's temperature.
    """
    rows = read_prompts(stage.prompts)
    _check_synthesized(rows, stage, context)
    retained = read_retention(stage, context)
    drawn = _draw_all(rows, retained, stage, context)
    reference = context.launcher.policy(context.frozen("policy", "causal", stage.baseline, stage.temperature))
    tokenizer = context.tokenizer(stage.baseline)
    kl = sequence_kl(drawn, rows, reference, tokenizer, stage.baseline)
    pad_id = tokenizer.pad_id
    golds = judged(drawn, context.judge(stage.gold, pad_id), stage.samples_per_prompt)
    rewards: Mapping[str, Sequence[float | None]] = dict.fromkeys(drawn, [None] * len(golds[stage.baseline]))
    if stage.reward:
        rewards = judged(drawn, context.judge(stage.reward, pad_id), stage.samples_per_prompt)
    samples = {name: _samples(item, golds[name], rewards[name], kl[name].tolist()) for name, item in drawn.items()}
    for name in stage.candidates:
        write_samples(context.folder / "samples" / name, 0, drawn[name].rollouts, golds[name])
    accuracy = implicit_accuracy(drawn, stage.baseline)
    retention = {name: item.retention for name, item in drawn.items()}
    evaluation = _evaluation(samples, accuracy, retention, rows, stage, context)
    evaluation = replace(evaluation, retention_key=retained.key if retained else "")
    comparison = evaluation.compare()
    _write(evaluation, comparison, context)
    return {result.name: result.gold for result in comparison.candidates}


def _samples(
    item: Drawn, golds: Sequence[float], rewards: Sequence[float | None], kls: Sequence[float]
) -> tuple[Sample, ...]:
    columns = zip(item.rollouts, golds, rewards, kls, item.entropy.tolist(), strict=True)
    return tuple(
        Sample(r.prompt.id, r.prompt.text, r.text, gold, reward, kl, len(r.tokens), r.finish_reason, entropy)
        for r, gold, reward, kl, entropy in columns
    )


def _check_synthesized(rows: Sequence[PromptRow], stage: CompareStage, context: StageContext) -> None:
    """Raise DataError when chats that a model wrote for training ask what the comparison asks."""
    asked = {normalised(row.text): row.text for row in rows}
    for other in context.recipe.stages:
        if isinstance(other, SynthesizeStage) and other.name in context.outputs:
            chats, _ = read_synthesized(context.outputs[other.name])
            if shared := asked.keys() & {normalised(chat.instruction) for chat in chats}:
                raise DataError(
                    f"{len(shared)} of {len(rows)} prompts of stages.{stage.name} are also in what stages.{other.name}"
                    f" wrote, for example {asked[min(shared)]!r}; run it again with --restart {other.name}"
                )


def _draw_all(
    rows: Sequence[PromptRow], retained: Retained | None, stage: CompareStage, context: StageContext
) -> dict[str, Drawn]:
    names = list(stage.candidates)
    if stage.frontier and not isinstance(stage.gold, LlmJudge):  # who judges by comparing sees the candidates only
        names += [saved for name in stage.candidates for saved in context.saved(name)]
    pairs = heldout_pairs(stage, context)
    tokenizers = {name: context.tokenizer(name) for name in stage.candidates}
    own = tokenizers[stage.baseline].fingerprint()
    foreign = [name for name, tokenizer in tokenizers.items() if tokenizer.fingerprint() != own]
    if foreign and any(isinstance(judge, ModelJudge) for judge in (stage.gold, stage.reward)):
        raise DataError(
            f"{foreign[0]} has another tokenizer than {stage.baseline}, and a reward model reads token ids: leave"
            " `reward` out, or judge by a function, a service or a language model"
        )
    context.tracker.begin("sampling", len(names))
    drawn: dict[str, Drawn] = {}
    for index, name in enumerate(names):
        candidate = name.partition("/")[0]
        finished = name in stage.candidates
        asked = pairs if finished and name not in foreign else []
        chats = retained if finished else None
        drawn[name] = draw(name, tokenizers[candidate], candidate in foreign, rows, asked, stage, context, chats)
        lengths = [len(rollout.tokens) for rollout in drawn[name].rollouts]
        context.tracker.advance(index + 1, {"length": sum(lengths) / len(lengths)})
    return drawn


def _evaluation(
    samples: Mapping[str, tuple[Sample, ...]],
    accuracy: Mapping[str, float | None],
    retention: Mapping[str, tuple[ChatScore, ...]],
    rows: Sequence[PromptRow],
    stage: CompareStage,
    context: StageContext,
) -> Evaluation:
    kinds = {other.name: other.kind for other in context.recipe.stages}
    candidates = tuple(
        CandidateSamples(
            name, kinds.get(name, "base"), samples[name], _cost(name, context), accuracy[name], retention[name]
        )
        for name in stage.candidates
    )
    return Evaluation(
        baseline=stage.baseline,
        baseline_key=_weights_digest(context.checkpoint(stage.baseline)),
        reward_key=_reward_key(stage, context),
        conditions=_conditions(rows, stage),
        candidates=candidates,
        frontier=tuple(_point(name, samples[name]) for name in samples if name not in stage.candidates),
        budget=context.recipe.budget,
        reward_accuracy=_reward_accuracy(stage, context),
        facts=_facts(rows, stage, context),
        seed=context.seed("bootstrap"),
        bootstrap_samples=stage.bootstrap_samples,
    )


def _point(name: str, samples: Sequence[Sample]) -> FrontierPoint:
    run, _, step = name.partition("/step-")
    return frontier_point(run, samples, int(step))


def _done(name: str, context: StageContext) -> dict[str, dict[str, float]]:
    """Return what a finished stage left in `done.json`; empty for a model that no stage made."""
    path = context.outputs[name] / "done.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _cost(name: str, context: StageContext) -> Cost | None:
    done = _done(name, context)
    return Cost(**done["cost"]) if done else None


def _reward_accuracy(stage: CompareStage, context: StageContext) -> float | None:
    if not isinstance(stage.reward, ModelJudge):
        return None
    summary = _done(stage.reward.stage, context)["summary"]
    return summary.get("judge_accuracy", summary.get("heldout_accuracy"))


def _weights_digest(model: Path) -> str:
    digests = (file_digest(file) for file in sorted(model.glob("*.safetensors")))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _reward_key(stage: CompareStage, context: StageContext) -> str:
    if isinstance(stage.reward, ModelJudge):
        return _weights_digest(context.checkpoint(stage.reward.stage))
    return _named(stage.reward) if stage.reward else ""


def _conditions(rows: Sequence[PromptRow], stage: CompareStage) -> dict[str, str]:
    """Return what must be equal for the samples of two runs to be comparable."""
    prompts = hashlib.sha256(json.dumps([[row.id, row.text] for row in rows]).encode()).hexdigest()
    return {
        "the set of prompts": prompts[:12],
        "samples_per_prompt": str(stage.samples_per_prompt),
        "temperature": str(stage.temperature),
        "max_response_tokens": str(stage.max_response_tokens),
        "gold": _named(stage.gold),
    }


def _named(judge: Judge) -> str:
    """Return what tells one gold judge from another: a function by its name and its file's content."""
    if isinstance(judge, FunctionJudge):
        file, _, function = judge.path.rpartition(":")
        return f"{Path(file).name}:{function} ({file_digest(Path(file))[:12]})"
    return json.dumps(judge.model_dump(mode="json"), sort_keys=True)


def _facts(rows: Sequence[PromptRow], stage: CompareStage, context: StageContext) -> dict[str, str]:
    recipe = context.recipe
    return {
        "Prompts": f"{len(rows)} held out, disjoint from all training prompts",
        "Samples per prompt": str(stage.samples_per_prompt),
        "Decoding": f"temperature {stage.temperature}, at most {stage.max_response_tokens} tokens, same for all",
        "KL": f"mean over samples of log pi - log ref, reference {stage.baseline}, in nats a response",
        "Seeds": ", ".join(map(str, recipe.seeds)) if recipe.seeds else f"one, {recipe.seed}",
        "Model": f"{recipe.model.path} ({recipe.model.dtype})",
        **({"Retention": _source(stage.retention)} if stage.retention else {}),
    }


def _source(data: FileData) -> str:
    return f"chats of {data.path.name if isinstance(data, PathData) else data.hub}, not aimed at by training"


def _curves(run: Path, evaluation: Evaluation, context: StageContext) -> dict[str, Curve]:
    """Return the learning curves of the candidates and of what they come from, not those of other policies."""
    candidates = {item.name for item in evaluation.candidates}
    others = {
        other.name
        for other in context.recipe.stages
        if isinstance(other, OnlineStage | PreferenceStage) and other.name not in candidates
    }
    return {name: curve for name, curve in read_curves(run).items() if name not in others}


def _write(evaluation: Evaluation, comparison: Comparison, context: StageContext) -> None:
    run = context.folder.parent.parent
    write_evaluation(context.folder, evaluation)
    write_json(context.folder / "report.json", comparison)
    write_leaderboard(context.folder / "leaderboard.csv", comparison)
    write_html(
        context.folder / "report.html",
        comparison,
        _curves(run, evaluation, context),
        evaluation.candidates,
        evaluation.facts,
        environment=read_environment(run),
    )
