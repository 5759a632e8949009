"""`rlhf eval`: stages on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path

import click

from rlhf.command import quiet_libraries, reports_errors
from rlhf.untrusted import echo
from rlhf.waiting import waiting


@click.command("eval")
@click.argument("models", metavar="RUN/STAGE...", nargs=-1, required=True)
@click.option("--tasks", required=True, metavar="NAME,...", help="Tasks of the harness, or of --task-folder.")
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with tasks of your own (YAML); files they name are relative to it.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first so many questions of each task.")
@click.option("--fewshot", type=click.IntRange(0), help="Examples before each question; what the task says otherwise.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option("--chat-template", is_flag=True, help="Ask in the model's chat format.")
@click.option("--json", "output", type=click.Path(path_type=Path, dir_okay=False), help="Write the scores there too.")
@reports_errors
def evaluate(
    models: tuple[str, ...],
    tasks: str,
    task_folder: Path | None,
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    chat_template: bool,
    output: Path | None,
) -> None:
    """Evaluate stages (or model folders) on the tasks of lm-evaluation-harness, in one table."""
    quiet_libraries()
    with waiting("loading lm-evaluation-harness"):
        from rlhf.export.source import find_models
        from rlhf.serving import harness
        from rlhf.terminal import Terminal

    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    wanted = harness.Wanted(names, task_folder, limit, fewshot, batch_size, chat_template)
    with waiting(f"asking {', '.join(names)}"):
        scores = harness.evaluate(find_models(models), wanted)
    Terminal().print(harness.table(scores))
    if output is not None:
        harness.write_scores(output, scores, wanted)
        echo(f"scores: {output}")
