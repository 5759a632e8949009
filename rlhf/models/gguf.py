"""GGUF files: found inside installed packages, and turned into Hugging Face folders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import RecipeError
from rlhf.installing import MODEL_MODULE, model_command
from rlhf.models.folder import loading
from rlhf.models.gguf_header import check_gguf
from rlhf.models.outline import outline
from rlhf.models.saving import save_folder


def locate_gguf(uri: str) -> Path:
    """Return the file behind `gguf://package/file.gguf` or `gguf:///absolute/path.gguf`.

    The package is looked up, not imported: its own dependencies need not be installed. Raises RecipeError
    when the package or the file is missing.
    """
    location = uri.removeprefix("gguf://")
    if location.startswith("/"):
        file = Path(location)
    else:
        package, _, inner = location.partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            how = model_command() if package == MODEL_MODULE else "install it with pip"
            raise RecipeError(f"model.path: {uri}: no Python package {package!r} is installed: {how}")
        file = Path(spec.submodule_search_locations[0]) / inner
    if not file.is_file():
        raise RecipeError(f"model.path: {uri}: there is no file {file}")
    return file


def import_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`, dequantised to bfloat16, with its tokenizer and template.

    RecipeError where the file claims what it does not hold, exceeds our limits, or cannot be read.
    """
    weights = check_gguf(file)
    if not weights:
        raise RecipeError(f"{file}: it holds no weights")
    with loading(file):
        model, tokenizer = _read(file, weights)
    save_folder(model, tokenizer, folder, "bfloat16")


def _read(file: Path, weights: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    outline(file.parent, gguf=file.name, room=2 * weights)  # some files share one tensor where models have two
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        trust_remote_code=False,
        local_files_only=True,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )
    return model, tokenizer
