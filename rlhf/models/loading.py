"""From what the recipe names to a model in memory. Light to import: libraries load when a model does."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RecipeError
from rlhf.models.cache import build_once, default_cache, file_digest
from rlhf.models.folder import check_folder, loading
from rlhf.models.limits import check_file
from rlhf.recipe.schema import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_NOT_NEEDED = ["*/*", "consolidated*"]
CONVERSION = 1
"""Of how we convert a GGUF file; raise it when the folder that comes of one changes."""


def resolve_model(source: ModelSource, cache: Path | None = None) -> Path:
    """Return the Hugging Face folder of a model source, made or downloaded when it is not there yet.

    `path` is a folder, a hub id, `gguf://package/file.gguf`, `gguf:///absolute/path.gguf` or `tiny://llama`;
    the folder's tokenizer has `source.chat_template` where that is set. Converted models are kept below
    `cache`, by default `RLHF_CACHE` or `~/.cache/rlhf`. Raises RecipeError when there is no such model, or when it has
    anything but safetensors, or wants code of its own to be run.
    """
    cache = cache or default_cache()
    folder = _find(source, cache)
    check_folder(folder, f"model.path: {source.path}")
    return folder if source.chat_template is None else _with_template(folder, source.chat_template, cache)


def resolve_judge(path: str) -> Path:
    """Return the Hugging Face folder of a judge's model, named as `resolve_model` says; RecipeError names the judge."""
    try:
        return resolve_model(ModelSource(path=path))
    except RecipeError as error:
        raise RecipeError(str(error).replace("model.path:", "model of the judge:", 1)) from error


def _find(source: ModelSource, cache: Path) -> Path:
    path = source.path
    if path.startswith("gguf://"):
        from rlhf.models.gguf import import_gguf, locate_gguf

        file = locate_gguf(path)
        key = f"{file_digest(file)} {CONVERSION} gguf {version('gguf')}"
        return build_once(cache, file.stem, key, lambda folder: import_gguf(file, folder))
    if path == "tiny://llama":
        from rlhf.models import tiny

        key = f"{file_digest(Path(tiny.__file__))} torch {version('torch')}"
        return build_once(cache, "tiny-llama", key, tiny.build_tiny)
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise RecipeError(f"model.path: there is no folder {path}")
    return _download(path, source.revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT_NEEDED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"model.path: {repo} is no folder here and cannot be had from the Hugging Face hub "
            f"(revision {revision or 'main'}): {reason} "
            "Check the name, the network, HF_HUB_OFFLINE and, for gated models, HF_TOKEN."
        ) from error
    return Path(folder)


def _with_template(folder: Path, template: Path, cache: Path) -> Path:
    """Return a cached folder of links to all files of `folder`, with its own `chat_template.jinja`."""
    if not template.is_file():
        raise RecipeError(f"model.chat_template: there is no file {template}")
    check_file(template, "model.chat_template")
    try:
        text = template.read_text(encoding="utf-8")
    except ValueError as error:
        raise RecipeError(f"model.chat_template: {template} is not UTF-8 text: {error}") from error
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "chat_template.jinja")
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def link(target: Path) -> None:
        for file in files:
            (target / file.name).symlink_to(file.resolve())
        (target / "chat_template.jinja").write_text(text, encoding="utf-8")

    return build_once(cache, f"{folder.name}-{template.stem}", f"{folder}\n{stamps}\n{text}", link)


def load_causal(folder: Path, dtype: str, **how: Any) -> PreTrainedModel:
    """Load a causal language model from safetensors in `dtype`, in evaluation mode; `how` is for `from_pretrained`.

    Raises RecipeError when the folder lacks any of its weights.
    """
    from transformers import AutoModelForCausalLM

    model, missing = load_weights(AutoModelForCausalLM, folder, dtype, **how)
    if missing:
        raise RecipeError(f"{folder} lacks weights of its model: {', '.join(sorted(missing)[:5])}")
    return model


def load_weights(auto_class: Any, folder: Path, dtype: str, **config: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load with a transformers auto class; return the model and the names of weights the folder did not have.

    Raises RecipeError when its files are not what transformers can load.
    """
    import torch

    from rlhf.models.outline import outline

    outline(folder, auto_class)
    with loading(folder):
        model, report = auto_class.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **config,
        )
    return model, set(report["missing_keys"])
