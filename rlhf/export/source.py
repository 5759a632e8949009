"""Models by what people call them: a finished stage of a run, `RUN/STAGE`, or a model from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.done_file import Damaged, damage, damaged, read_done
from rlhf.errors import RecipeError
from rlhf.manifest import SEALED, shown
from rlhf.models.folder import check_folder
from rlhf.models.loading import resolve_model
from rlhf.recipe.schema import ModelSource
from rlhf.report.runs import read_environment, read_recipe, versions
from rlhf.stage_places import DONE, STAGES, kept_folders, stage_folder, stage_folders, stage_of


@dataclass(frozen=True)
class FinishedStage:
    """A stage that is done; `name` is that of its folder, and `done` is what its `done.json` says."""

    run: Path
    name: str
    done: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The stage's own folder in the run."""
        return stage_folder(self.run, self.name)

    @property
    def stage(self) -> str:
        """The stage's name in the recipe, also of one that was replaced since and is kept."""
        return stage_of(self.folder)

    @property
    def title(self) -> str:
        """A name for what is taken out of the run, of letters, digits and `._-`: `quickstart-ppo`."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.run.absolute().name}-{self.name}").strip("-.") or "model"

    @property
    def content(self) -> dict[str, Any]:
        """All that the result depends on (`rlhf.fingerprint.stage_content`)."""
        content: dict[str, Any] = self.done["content"]
        return content

    @property
    def settings(self) -> dict[str, Any]:
        """The stage as the recipe had it, every default written out; files by their names alone."""
        settings: dict[str, Any] = self.content["stage"]
        return settings

    @property
    def base(self) -> dict[str, Any]:
        """The recipe's `model` section as it was when the stage was made."""
        base: dict[str, Any] = self._made_from("model") or read_recipe(self.run)["model"]
        return base

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the stage was made with, by name; empty where they are not known."""
        made = self._made_from("environment")
        if made is not None:
            return versions(made)
        return read_environment(self.run) if (self.run / "environment.json").is_file() else {}

    @property
    def kind(self) -> str:
        """The stage's kind."""
        return str(self.settings["kind"])

    @property
    def tuning(self) -> dict[str, Any]:
        """Which weights were trained, and how."""
        return self.settings.get("tuning") or self.content.get("tuning") or {}

    @property
    def parent(self) -> str | None:
        """The name of what the training began with: `base`, a stage, or one of the recipe's checkpoints."""
        return self.settings.get("init") or self.settings.get("policy")

    @property
    def model(self) -> Path | None:
        """The merged model, None where the stage left none."""
        return self._left("model", "config.json")

    @property
    def adapter(self) -> Path | None:
        """The adapter beside it, None where the stage left none."""
        return self._left("adapter", "adapter_config.json")

    @property
    def leaves_model(self) -> bool:
        """Whether there is anything to take away."""
        return bool(self.model or self.adapter)

    def seals(self, folder: Path) -> dict[str, Any] | None:
        """Return the hashes that the files of `model` or `adapter` had when the stage was done, where it kept them."""
        return self.done.get(SEALED[folder.name]) or None

    def check_whole(self) -> None:
        """Raise DataError where anything that the stage left is not as it was when the stage was done."""
        if wrong := damage(self.folder, self.done):
            raise damaged(self.folder, wrong[0], self.done["key"])

    def merged(self) -> Path:
        """Return the merged model; RecipeError where the tuning cannot be merged."""
        if self.model is None:
            raise RecipeError(
                f"stage {self.name} has an adapter alone: {self.tuning.get('kind', 'its tuning')} cannot be merged into"
                " the base; take it with `rlhf export --as adapter`"
            )
        return self.model

    def start(self) -> Path:
        """Return the folder of the model that the training began with; RecipeError where it is gone."""
        parent = self.parent
        if parent is None:
            raise RecipeError(f"stage {self.name} ({self.kind}) trains no model")
        if stage_folder(self.run, parent).is_dir():
            made_from = self.upstream(parent)
            return find_stage(self.run / (made_from.name if made_from else parent)).merged()
        source = ModelSource.model_validate(self.base | {"chat_template": _path(self.base)})
        if parent != "base":
            checkpoints = self._made_from("checkpoints") or read_recipe(self.run).get("checkpoints", {})
            source = source.model_copy(update={"path": checkpoints.get(parent), "revision": None})
        return resolve_model(source)

    def upstream(self, name: str) -> FinishedStage | None:
        """Return the stage that this one was made from, its files unchecked; None where that is not finished.

        It may have been replaced since, and be kept; where it is not, this is the stage that has its name now.
        """
        folder, wanted = stage_folder(self.run, name), self.content["upstream"].get(name)
        found = {place: done for place in (folder, *kept_folders(folder)) if (done := _read(place)) is not None}
        match = [place for place, done in found.items() if done["key"] == wanted]
        if not match and folder not in found:
            return None
        place = match[0] if match else folder
        return FinishedStage(self.run, place.name, found[place])

    def _made_from(self, what: str) -> dict[str, Any] | None:
        """Return what was sealed with the stage; None for a stage of a version that did not seal it."""
        found: dict[str, Any] | None = self.done.get("made_from", {}).get(what)
        return found

    def _left(self, name: str, proof: str) -> Path | None:
        folder = self.folder / name
        return folder if (folder / proof).is_file() else None


@dataclass(frozen=True)
class NamedModel:
    """A model to talk to; `stage` is None for one that comes from elsewhere."""

    name: str
    folder: Path
    stage: FinishedStage | None = None


def find_stage(given: Path) -> FinishedStage:
    """Return the finished stage that `given` names, as `RUN/STAGE` or `RUN/stages/STAGE`, its files checked.

    Raises RecipeError when there is none, it is not finished or it left no model, and DataError when it is damaged.
    """
    run, name = (given.parent.parent, given.name) if given.parent.name == STAGES else (given.parent, given.name)
    if not (run / STAGES).is_dir():
        if (given / STAGES).is_dir():
            raise RecipeError(f"{given} is a whole run: name one of its stages, {_offer(given)}")
        raise RecipeError(f"{given}: there is no run folder {run}; give RUN/STAGE, such as runs/quickstart/ppo")
    if not (run / STAGES / name).is_dir():
        raise RecipeError(f"{run} has no stage {name}; {_offer(run)}")
    file = run / STAGES / name / DONE
    if not file.is_file():
        raise RecipeError(f"stage {name} of {run} is not finished; `rlhf run` with its recipe goes on where it was")
    stage = FinishedStage(run, name, read_done(file))
    if not stage.leaves_model:
        raise RecipeError(f"stage {name} of {run} is of kind {stage.kind} and leaves no model; {_offer(run)}")
    stage.check_whole()
    return stage


def find_models(given: Sequence[str]) -> list[NamedModel]:
    """Return language models by name: stages (`RUN/STAGE`), folders, hub ids or `gguf://...`.

    A stage is called as in its recipe, or `RUN/STAGE` where two would have one name. Raises as `find_stage` does, and
    RecipeError for what is no language model.
    """
    found = [_find_model(one) for one in given]
    names = [model.name for model in found]
    named = [
        NamedModel(f"{model.stage.run.absolute().name}/{model.name}", model.folder, model.stage)
        if model.stage and names.count(model.name) > 1
        else model
        for model in found
    ]
    if len({model.name for model in named}) < len(named):
        raise RecipeError(f"{', '.join(model.name for model in named)}: two models of one name; leave one out")
    return named


def is_language_model(folder: Path) -> bool:
    """Return whether a model folder is one that writes text, not one that scores or classifies it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or [])


def _read(folder: Path) -> dict[str, Any] | None:
    """Return what a finished stage says; None where it is not finished, or does not say it any more."""
    try:
        return read_done(folder / DONE) if (folder / DONE).is_file() else None
    except Damaged:
        return None


def _find_model(given: str) -> NamedModel:
    path = Path(given).expanduser()
    run = path.parent.parent if path.parent.name == STAGES else path.parent
    if "://" not in given and (path / "config.json").is_file():
        check_folder(path, given)
        model = NamedModel(path.absolute().name, path)
    elif "://" not in given and (path.exists() or (run / STAGES).is_dir()):
        stage = find_stage(path)
        model = NamedModel(stage.name, stage.merged(), stage)
    else:
        try:
            model = NamedModel(Path(given).stem, resolve_model(ModelSource(path=given)))
        except RecipeError as error:
            raise RecipeError(str(error).replace("model.path: ", "", 1)) from error
    if not is_language_model(model.folder):
        raise RecipeError(f"{given} scores or classifies texts and writes none; choose a language model")
    return model


def _offer(run: Path) -> str:
    names = [folder.name for folder in stage_folders(run) if (folder / DONE).is_file()]
    return f"finished are: {', '.join(map(shown, names))}" if names else "none of its stages is finished"


def _path(model: Mapping[str, Any]) -> Path | None:
    template = model.get("chat_template")
    return None if template is None else Path(template)
