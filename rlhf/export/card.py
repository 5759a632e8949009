"""The model card of what is exported: what it is, where it comes from, how well it did, how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import rlhf
from rlhf.done_file import read_done
from rlhf.errors import DataError
from rlhf.export.folders import CARD
from rlhf.export.lineage import UNKNOWN, Base, base_of, lineage
from rlhf.export.source import FinishedStage
from rlhf.metrics_file import METRICS, MetricsFile
from rlhf.report.json import read_json
from rlhf.report.results import Comparison, show
from rlhf.report.table import percent, verdict
from rlhf.stage_places import DONE, stage_folders
from rlhf.untrusted import redacted, visible

LONGEST = 300
MACHINERY = re.compile(r"time$|seconds|tokens_per_second|learning_rate|grad_norm|skipped_steps|.*_grad_norm|.*_skipped")
"""Columns of metrics that say how training went about, not how well."""


@dataclass(frozen=True)
class Facts:
    """What a card says of the export itself: its form in words, how to load it (Markdown), and what was verified."""

    form: str
    library: str
    how: str
    verified: str
    tags: Sequence[str] = field(default_factory=tuple)
    task: str | None = "text-generation"


def write_card(folder: Path, stage: FinishedStage, facts: Facts) -> None:
    """Write `README.md` with its metadata; nothing in it names a place on this machine or repeats a secret."""
    base = base_of(stage)
    text = "\n".join([_header(stage, base, facts), *_body(stage, base, facts)])
    ModelCard(text).save(folder / CARD)


def code(text: object) -> str:
    """Return a text as inline code of Markdown in which nothing is markup, also inside of a table."""
    shown = visible(redacted(" ".join(str(text).split())), LONGEST).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", shown)), default=0) + 1)
    space = " " if shown[:1] in ("`", "") or shown[-1:] in ("`", "") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def plain(text: str) -> str:
    """Return a text as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", r"\\\1", visible(redacted(text), LONGEST * 10))


def _header(stage: FinishedStage, base: Base, facts: Facts) -> str:
    data = ModelCardData(
        base_model=base.name if base.hub else None,
        license=base.licence,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=["rlhf", stage.kind, *facts.tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _body(stage: FinishedStage, base: Base, facts: Facts) -> Iterator[str]:
    steps = lineage(stage)
    yield f"# {plain(stage.title)}\n"
    yield f"{facts.form}, made by stage {code(stage.name)} ({code(stage.kind)}) of a run of rlhf {rlhf.__version__}.\n"
    yield "## Base model\n"
    revision = f", revision {code(base.revision)}" if base.revision else ""
    yield f"{code(base.name)}{revision}. Licence: {code(base.licence or UNKNOWN)}."
    yield "" if base.licence else "The licence was not found beside the model: look it up before you share this.\n"
    yield "## Lineage\n"
    yield from _table(
        ("stage", "kind", "made from", "settings"),
        [
            (
                code(step.name) + (" (made again since)" if step.changed else ""),
                code(step.kind),
                ", ".join(map(code, step.made_from)),
                "; ".join(map(code, step.settings)),
            )
            for step in steps
        ],
    )
    data = [(code(step.name), code(name), code(digest)) for step in steps for name, digest in step.data.items()]
    if data:
        yield "## Data\n"
        yield from _table(("stage", "file", "sha256, or revision"), data)
    yield "## Result\n"
    yield from _table(("metric", "value"), [(code(name), code(value)) for name, value in _metrics(stage)])
    if (comparison := _comparison(stage)) is not None:
        yield from _compared(comparison)
    yield "## How to load it\n"
    yield f"{facts.how}\n"
    yield f"Verified: {facts.verified}.\n"
    yield "## Versions\n"
    installed = {name: version for name, version in stage.versions.items() if name != "platform"}
    rows = [(code(name), code(version)) for name, version in installed.items() if version != "not installed"]
    yield from _table(("package", "version"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _metrics(stage: FinishedStage) -> list[tuple[str, Any]]:
    """Return the stage's summary, and of the last row of its metrics what the summary does not say."""
    found = dict(stage.done.get("summary", {}))
    rows = MetricsFile(stage.folder / METRICS).read().rows
    last = rows[-1] if rows else {}
    found |= {name: value for name, value in last.items() if name not in found and not MACHINERY.match(name)}
    kept = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
    return [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in kept.items()]


def _comparison(stage: FinishedStage) -> Comparison | None:
    """Return the run's last finished comparison that this very stage was in, None where there is none."""
    files = [folder / DONE for folder in stage_folders(stage.run) if (folder / DONE).is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            content = read_done(file)["content"]
            if content["stage"]["kind"] != "compare":
                continue
            comparison = read_json(file.with_name("report.json"))
        except DataError:
            continue
        if content["upstream"].get(stage.stage) == stage.done["key"]:
            return comparison
    return None


def _compared(comparison: Comparison) -> Iterator[str]:
    yield "## Comparison\n"
    yield f"{comparison.prompts} held-out prompts, {comparison.level:.0%} intervals.\n"
    heads = ("candidate", "gold", "reward model", "KL", "tokens", f"win rate against {code(comparison.baseline)}")
    yield from _table(
        heads,
        [
            (
                code(item.name),
                f"{show(item.gold)} {item.gold_ci}",
                "-" if item.reward is None else f"{show(item.reward)} {item.reward_ci}",
                show(item.kl),
                show(item.length),
                "-" if item.name == comparison.baseline else percent(item.win_rate, item.win_rate_ci),
            )
            for item in comparison.ranked
        ],
    )
    yield f"{plain(verdict(comparison))}\n"
