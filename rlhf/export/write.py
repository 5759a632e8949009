"""`rlhf export`: a finished stage in one of three forms, verified, with its model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.errors import RecipeError
from rlhf.export.agreement import Agreement
from rlhf.export.card import Facts, code, write_card
from rlhf.export.folders import made_whole
from rlhf.export.gguf import GgufType, write_gguf
from rlhf.export.lineage import base_of, parent_name
from rlhf.export.merged import export_adapter, export_merged
from rlhf.export.modelfile import modelfile
from rlhf.export.readback import check_gguf
from rlhf.export.source import FinishedStage, find_stage, is_language_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.untrusted import visible

Form = Literal["merged", "adapter", "gguf"]
ENDINGS: dict[Form, str] = {"merged": "", "adapter": "-adapter", "gguf": "-gguf"}
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class Exported:
    """Where it is, and what was verified, in words."""

    folder: Path
    verified: str


def export(given: Path, form: Form, kind: GgufType, output: Path | None, verify: bool) -> Exported:
    """Export a finished stage to a folder that is not there yet, `<run>-<stage>` here where none is named.

    What does not agree with the stage is not kept: the folder is there only when all is well.
    """
    stage = find_stage(given)
    folder = output or Path(f"{stage.title}{ENDINGS[form]}")
    with made_whole(folder) as partial:
        facts = _FORMS[form](stage, partial, kind, verify)
        write_card(partial, stage, facts)
    return Exported(folder, facts.verified)


def _merged(stage: FinishedStage, folder: Path, kind: GgufType, verify: bool) -> Facts:
    agreement = export_merged(stage, folder, verify)
    writes = is_language_model(folder)
    auto = "AutoModelForCausalLM" if writes else "AutoModelForSequenceClassification"
    how = (
        "```python\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{stage.title}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{stage.title}")\n'
        "```"
    )
    form = "A merged model in safetensors" if writes else f"A model that scores or classifies texts ({stage.kind})"
    task = "text-generation" if writes else "text-classification"
    return Facts(form, "transformers", how, _said(agreement, "loaded with plain transformers"), ("merged",), task)


def _adapter(stage: FinishedStage, folder: Path, kind: GgufType, verify: bool) -> Facts:
    base = parent_name(stage)
    made_from = stage.upstream(stage.parent or "base")
    agreement = export_adapter(stage, folder, base, verify)
    writes = stage.model is None or is_language_model(stage.model)
    auto = "AutoModelForCausalLM" if writes else "AutoModelForSequenceClassification"
    how = (
        f"The adapter belongs on the model it was trained from, {code(base)}"
        + (f" (export that stage too: `rlhf export RUN/{made_from.name}`)" if made_from else "")
        + ".\n\n```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained({json.dumps(visible(base))}, dtype="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{stage.title}-adapter")\n'
        "```"
    )
    said = _said(agreement, "on its base in float32, against the merged model")
    if verify and agreement is None:
        said = "it loads on its base; its kind cannot be merged, so there is nothing to compare it with"
    form = f"An adapter ({stage.tuning.get('kind', 'lora')})"
    return Facts(form, "peft", how, said, ("adapter",), "text-generation" if writes else "text-classification")


def _gguf(stage: FinishedStage, folder: Path, kind: GgufType, verify: bool) -> Facts:
    source = stage.merged()
    if not is_language_model(source):
        raise RecipeError(f"stage {stage.name} ({stage.kind}) scores or classifies texts: GGUF holds language models")
    file = folder / f"{stage.title}.{kind}.gguf"
    write_gguf(source, file, kind, stage.title, base_of(stage).licence)
    (folder / MODELFILE).write_text(modelfile(file.name, load_tokenizer(source)), encoding="utf-8")
    agreement = check_gguf(file, source, kind) if verify else None
    how = (
        f"```\nollama create {stage.title.lower()} -f {MODELFILE}\n"
        f"llama-cli -m {file.name} --jinja\n```\n\nWith transformers: "
        f'`AutoModelForCausalLM.from_pretrained(".", gguf_file="{file.name}")`.'
    )
    said = _said(agreement, "read back by transformers in float32; tokens of sample texts and chat template equal")
    return Facts(f"A GGUF file ({kind}) with a Modelfile for Ollama", "gguf", how, said, ("gguf", "ollama"))


_FORMS = {"merged": _merged, "adapter": _adapter, "gguf": _gguf}


def _said(agreement: Agreement | None, how: str) -> str:
    return f"{how}, {agreement}" if agreement else "not asked for (--no-verify)"
