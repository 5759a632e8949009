"""Under which circumstances a comparison was made: what its report says, and what other runs must share with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.rows import PromptRow
from rlhf.fingerprint import file_digest
from rlhf.recipe.base import FileData, FunctionJudge, Judge, ModelJudge, PathData
from rlhf.recipe.stage_schema import CompareStage
from rlhf.report.results import Cost
from rlhf.stages.context import StageContext


def circumstances(rows: Sequence[PromptRow], stage: CompareStage, context: StageContext) -> dict[str, Any]:
    """Return what an `Evaluation` says beside samples and scores, by field."""
    return {
        "baseline": stage.baseline,
        "baseline_key": _weights_digest(context.checkpoint(stage.baseline)),
        "reward_key": _reward_key(stage, context),
        "conditions": _conditions(rows, stage),
        "budget": context.recipe.budget,
        "reward_accuracy": _reward_accuracy(stage, context),
        "facts": _facts(rows, stage, context),
        "seed": context.seed("bootstrap"),
        "bootstrap_samples": stage.bootstrap_samples,
    }


def cost(name: str, context: StageContext) -> Cost | None:
    """Return what making a candidate took; None for a model that no stage made."""
    done = _done(name, context)
    return Cost(**done["cost"]) if done else None


def _done(name: str, context: StageContext) -> dict[str, dict[str, float]]:
    """Return what a finished stage left in `done.json`; empty for a model that no stage made."""
    path = context.outputs[name] / "done.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


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
        "Model": f"{recipe.model.path} ({recipe.model.precision})",
        **({"Retention": _source(stage.retention)} if stage.retention else {}),
    }


def _source(data: FileData) -> str:
    return f"chats of {data.path.name if isinstance(data, PathData) else data.hub}, not aimed at by training"
