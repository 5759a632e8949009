"""GGUF files: found inside installed packages, and turned into Hugging Face folders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from rlhf.errors import RecipeError
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
            raise RecipeError(f"model.path: {uri}: no Python package {package!r} is installed; install it with pip")
        file = Path(spec.submodule_search_locations[0]) / inner
    if not file.is_file():
        raise RecipeError(f"model.path: {uri}: there is no file {file}")
    return file


def import_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`, dequantised to bfloat16, with its tokenizer and template."""
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
    save_folder(model, tokenizer, folder, "bfloat16")
