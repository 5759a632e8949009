"""`rlhf eval`: models on the tasks of lm-evaluation-harness, in one table."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import DataError, RecipeError, ResourceError
from rlhf.export.source import NamedModel
from rlhf.installing import extra_command
from rlhf.untrusted import printable

if TYPE_CHECKING:
    from rich.table import Table

LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub")
STDERR = "_stderr"


@dataclass(frozen=True)
class Wanted:
    """What is asked: `tasks` by name; `folder` has tasks of one's own; `fewshot` None is what each task says."""

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    chat: bool = False


@dataclass(frozen=True)
class Score:
    """A metric of a model on a task, over `n` questions; `error` is its standard error where there is one."""

    model: str
    task: str
    metric: str
    value: float
    error: float | None
    n: int


def evaluate(models: Sequence[NamedModel], wanted: Wanted) -> list[Score]:
    """Return the scores of every model on every task.

    Raises:
        RecipeError: the harness is not installed, or there is no such task.
        DataError: a task of one's own cannot be read.
        ResourceError: a task's data has to come from the hub, and cannot.
    """
    with _quiet():
        _check_installed()
        manager = _manager(wanted)
        tasks = _load(manager, wanted)
        return [score for model in models for score in _scores(model, manager, tasks, wanted)]


def table(scores: Sequence[Score]) -> Table:
    """Return one row per task and metric, one column per model, each number with its standard error."""
    from rich.text import Text

    from rlhf.tables import WholeTable

    models = list(dict.fromkeys(score.model for score in scores))
    found = {(score.task, score.metric, score.model): score for score in scores}
    shown = WholeTable("task", "metric", "n", title="lm-evaluation-harness, value ± standard error")
    for model in models:
        shown.add_column(Text(printable(model)), justify="right")
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        row = [found.get((task, metric, model)) for model in models]
        n = next(score.n for score in row if score)
        shown.add_row(Text(printable(task)), Text(printable(metric)), str(n), *map(_cell, row))
    return shown


def write_scores(file: Path, scores: Sequence[Score], wanted: Wanted) -> None:
    """Write the scores, and what was asked, as JSON."""
    asked = asdict(wanted) | {"folder": wanted.folder.name if wanted.folder else None}
    content = {"asked": asked, "scores": [asdict(score) for score in scores]}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_installed() -> None:
    try:
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise RecipeError(f"rlhf eval needs lm-evaluation-harness: {extra_command('eval')} ({error})") from error


def _manager(wanted: Wanted) -> Any:
    """Return what knows all tasks that are asked for: those of one's own, and the harness's where need be."""
    from lm_eval.tasks import TaskManager

    own = str(wanted.folder.absolute()) if wanted.folder else None
    if wanted.folder is not None and not any(wanted.folder.glob("**/*.yaml")):
        raise RecipeError(f"--task-folder {wanted.folder}: no task (*.yaml) in it")
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(wanted.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)  # reads the thousands of files that the harness comes with
    for name in wanted.tasks:
        if name not in manager.all_tasks:
            raise RecipeError(f"--tasks {name}: the harness has no such task{_near(name, manager.all_tasks)}")
    return manager


def _load(manager: Any, wanted: Wanted) -> dict[str, Any]:
    """Return the harness's tasks by name; files that a task of one's own names are relative to its folder."""
    with contextlib.chdir(wanted.folder or Path.cwd()):
        tasks: dict[str, Any] = {}
        for name in wanted.tasks:
            tasks |= _load_one(manager, name)
    return tasks


def _load_one(manager: Any, name: str) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # every task has a loader of its own
        said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
        if _is_network(error):
            raise ResourceError(
                f"--tasks {name}: its data is on the Hugging Face hub, which cannot be reached ({said}); "
                "take tasks of your own with --task-folder, or run once where there is a network"
            ) from error
        raise DataError(f"--tasks {name}: cannot be loaded: {said}") from error
    return loaded


def _is_network(error: BaseException) -> bool:
    """Return whether an error, or one behind it, says that the hub was not reached or may not be asked."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    away = (ConnectionError, TimeoutError, httpx.TransportError, HfHubHTTPError, LocalEntryNotFoundError)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (*away, OfflineModeIsEnabled)) or type(seen).__name__ == "DatasetNotFoundError":
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _scores(model: NamedModel, manager: Any, tasks: Mapping[str, Any], wanted: Wanted) -> list[Score]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from rlhf.serving.talk import LocalTalker

    talker = LocalTalker(model.name, model.folder)
    harness = HFLM(pretrained=talker.model, tokenizer=talker.tokenizer.hf, batch_size=wanted.batch_size)
    results = simple_evaluate(
        model=harness,
        tasks=list(tasks.values()),
        task_manager=manager,
        num_fewshot=wanted.fewshot,
        limit=wanted.limit,
        batch_size=wanted.batch_size,
        apply_chat_template=wanted.chat,
        log_samples=False,
        bootstrap_iters=1000,
    )
    counts = {task: int(n["effective"]) for task, n in results["n-samples"].items()}
    return [
        score
        for task, found in results["results"].items()
        for score in _read_task(model.name, task, found, counts.get(task, 0))
    ]


def _read_task(model: str, task: str, found: Mapping[str, Any], n: int) -> Iterator[Score]:
    """Yield the metrics of a task: the harness calls them `acc,none` and their errors `acc_stderr,none`."""
    for key, value in found.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith(STDERR) or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}{STDERR},{way}")
        name = metric if way == "none" else f"{metric} ({way})"
        yield Score(model, task, name, float(value), float(error) if isinstance(error, int | float) else None, n)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.3f}" + ("" if score.error is None else f" ± {score.error:.3f}")


def _near(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness and what it loads from telling of their progress."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
