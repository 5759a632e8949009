"""The honest comparison: same prompts, same decoding, same seeds, one estimator for all candidates.

What is sampled and scored lies on disk, part by part (`rlhf.stages.parts`): an interrupted comparison resumes after its
last part, and memory holds one part and a few numbers a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from rlhf.data.pairs import Pair
from rlhf.data.reading import read_prompts
from rlhf.data.rows import PromptRow
from rlhf.data.synthesized import read_synthesized
from rlhf.errors import DataError
from rlhf.recipe.base import LlmJudge, ModelJudge
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.stage_schema import CompareStage, SynthesizeStage
from rlhf.report.curves import Curve, read_curves
from rlhf.report.evaluation import Evaluation, sample_file, write_evaluation
from rlhf.report.frontier import frontier_point
from rlhf.report.html import write_html
from rlhf.report.json import write_json
from rlhf.report.results import Comparison, FrontierPoint
from rlhf.report.runs import read_environment
from rlhf.report.sample_file import write_samples
from rlhf.report.samples import CandidateSamples, ChatScores, Columns, Sample
from rlhf.report.wins import write_leaderboard
from rlhf.roles import Reference
from rlhf.stages.compared import circumstances, cost
from rlhf.stages.context import StageContext
from rlhf.stages.drawn import Drawn, stored_prompts
from rlhf.stages.evaluate import (
    Commit,
    add_chats,
    add_kl,
    add_margins,
    add_scores,
    chat_scores,
    draw,
    heldout_pairs,
    implicit_accuracy,
    prompts_in_part,
)
from rlhf.stages.instructions import normalised
from rlhf.stages.parts import Parts
from rlhf.stages.recovery import Going
from rlhf.stages.retention import Retained, read_retention
from rlhf.stages.sft import Summary


@dataclass(frozen=True)
class Asked:
    """What is asked of the models: prompts, held-out pairs and retention chats, and how many prompts make a part."""

    rows: Sequence[PromptRow]
    pairs: Sequence[Pair]
    retained: Retained | None
    size: int


def run(stage: CompareStage, context: StageContext) -> Summary:
    """Sample every candidate (and the checkpoints it saved), score all samples alike, and write the report.

    The KL of a sample is sum_t log pi(token) - log ref(token), both by the trainer's model, the reference being the
    baseline; its mean over samples estimates the sequence-level KL(pi || ref) without bias at the stage's temperature.
    """
    rows = read_prompts(stage.prompts)
    _check_synthesized(rows, stage, context)
    size = prompts_in_part(stage, context.recipe.roles.rollout)
    asked = Asked(rows, heldout_pairs(stage, context), read_retention(stage, context), size)
    parts = Parts(context.recovery.root / "parts", context.tracker.say)
    drawn = _models(rows, parts, stage, context)
    context.tracker.begin("sampling and scoring", _count(drawn, asked, stage))
    with context.recovery.going_on([parts]) as going:
        _make(drawn, asked, going, stage, context)
    evaluation = _evaluation(drawn, asked, stage, context)
    comparison = evaluation.compare()
    _write(evaluation, comparison, context)
    return {result.name: result.gold for result in comparison.candidates}


def _models(rows: Sequence[PromptRow], parts: Parts, stage: CompareStage, context: StageContext) -> dict[str, Drawn]:
    """Return all models to sample, the candidates first; models with one tokenizer share their prompts' tokens."""
    names = list(stage.candidates)
    if stage.frontier and not isinstance(stage.gold, LlmJudge):  # who judges by comparing sees the candidates only
        names += [saved for name in stage.candidates for saved in context.saved(name)]
    own = context.tokenizer(stage.baseline).fingerprint()
    tokenizers = {name: context.tokenizer(name) for name in stage.candidates}
    foreign = [name for name, tokenizer in tokenizers.items() if tokenizer.fingerprint() != own]
    if foreign and any(isinstance(judge, ModelJudge) for judge in (stage.gold, stage.reward)):
        raise DataError(
            f"{foreign[0]} has another tokenizer than {stage.baseline}, and a reward model reads token ids: leave"
            " `reward` out, or judge by a function, a service or a language model"
        )
    prompts = {
        tokenizer.fingerprint(): stored_prompts(rows, tokenizer, stage.max_prompt_tokens)
        for tokenizer in {tokenizer.fingerprint(): tokenizer for tokenizer in tokenizers.values()}.values()
    }
    runs = {name: name.partition("/")[0] for name in names}
    return {
        name: Drawn(name, prompts[tokenizers[run].fingerprint()], run in foreign, stage.samples_per_prompt, parts)
        for name, run in runs.items()
    }


def _make(drawn: Mapping[str, Drawn], asked: Asked, going: Going, stage: CompareStage, context: StageContext) -> None:
    """Make all parts that are missing: each model's samples first, then what the reference and the judges say."""
    parts, step = next(iter(drawn.values())).parts, going.step
    context.tracker.expect(_count(drawn, asked, stage) + step - len(parts.made))

    def commit(metrics: Mapping[str, float]) -> None:
        nonlocal step
        step += 1
        context.tracker.advance(step, metrics)
        going.done(step, commit=True)

    for item in drawn.values():
        _ask(item, asked, commit, stage, context)
    tokenizer = context.tokenizer(stage.baseline)
    reference = _policy(stage.baseline, stage.temperature, context)
    for item in drawn.values():
        if item.name != stage.baseline:
            add_kl(item, asked.size, asked.rows, reference, tokenizer, commit)
    together = _judged_together(drawn, asked)
    for series, judge in {"gold": stage.gold, "reward": stage.reward}.items():
        if judge:
            source = cache(partial(context.judge, judge, tokenizer.pad_id))
            add_scores(drawn, series, together, source, parts, commit)


def _ask(item: Drawn, asked: Asked, commit: Commit, stage: CompareStage, context: StageContext) -> None:
    """Sample one model; a candidate is asked for the held-out pairs and the retention chats too."""
    tokenizer = context.tokenizer(item.name.partition("/")[0])
    policy = _policy(item.name, stage.temperature, context)
    draw(item, asked.size, tokenizer, policy, stage, context, commit)
    if item.name not in stage.candidates:
        return
    if not item.foreign:
        add_margins(item, asked.pairs, tokenizer.pad_id, policy, commit)
    if asked.retained:
        plain = policy if stage.temperature == 1 else _policy(item.name, 1.0, context)
        add_chats(item, asked.retained, tokenizer, plain, context, commit)


def _policy(name: str, temperature: float, context: StageContext) -> Callable[[], Reference]:
    """Return what builds a model when it is asked for first, and gives the same one from then on."""

    @cache
    def built() -> Reference:
        return context.launcher.policy(context.frozen("policy", "causal", name, temperature))

    return built


def _judged_together(drawn: Mapping[str, Drawn], asked: Asked) -> int:
    """Return how many prompts are judged at a time: the answers of all models are then as many as a part's samples."""
    return max(1, asked.size // len(drawn))


def _count(drawn: Mapping[str, Drawn], asked: Asked, stage: CompareStage) -> int:
    """Return how many parts there are, about: pairs and chats of a model are taken for one each."""
    each = -(-len(asked.rows) // asked.size)
    judges = 2 if stage.reward else 1
    beside = len(stage.candidates) * (bool(asked.pairs) + bool(asked.retained))
    return each * (2 * len(drawn) - 1) + beside + judges * -(-len(asked.rows) // _judged_together(drawn, asked))


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


def _evaluation(drawn: Mapping[str, Drawn], asked: Asked, stage: CompareStage, context: StageContext) -> Evaluation:
    """Put together what the parts say; the responses of the candidates are written where people read them."""
    kinds = {other.name: other.kind for other in context.recipe.stages}
    parts = next(iter(drawn.values())).parts
    margins = {name: parts.column(f"{name}/pairs", "margins") for name in stage.candidates}
    accuracy = implicit_accuracy(margins, stage.baseline)
    candidates, retained = [], asked.retained
    for name in stage.candidates:
        samples = write_samples(sample_file(context.folder, name), _samples(drawn[name], stage))
        chats = chat_scores(drawn[name], retained) if retained else ChatScores.of()
        kind = kinds.get(name, "base")
        candidates.append(CandidateSamples(name, kind, samples, cost(name, context), accuracy[name], chats))
    return Evaluation(
        **circumstances(asked.rows, stage, context),
        candidates=tuple(candidates),
        frontier=tuple(_point(item, stage) for item in drawn.values() if item.name not in stage.candidates),
        retention_key=retained.key if retained else "",
    )


def _samples(item: Drawn, stage: CompareStage) -> Iterator[Sample]:
    """Yield a model's responses with all their scores."""
    parts = item.parts
    golds, entropies = parts.column("gold", item.name).tolist(), parts.column(item.name, "entropy").tolist()
    rewards = parts.column("reward", item.name).tolist() if stage.reward else [None] * len(golds)
    kls = parts.column(f"{item.name}/kl", "kl").tolist() if item.name != stage.baseline else [0.0] * len(golds)
    for answer, gold, reward, kl, entropy in zip(item.answers(), golds, rewards, kls, entropies, strict=True):
        yield Sample(**answer._asdict(), gold=gold, reward=reward, kl=kl, entropy=entropy)


def _point(item: Drawn, stage: CompareStage) -> FrontierPoint:
    """Return where a checkpoint stands; its texts are not kept."""
    columns = Columns()
    for sample in _samples(item, stage):
        columns.add(sample)
    run, _, step = item.name.partition("/step-")
    return frontier_point(run, columns.samples(lambda row: ("", "")), int(step))


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
