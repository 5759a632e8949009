"""Models, states and data that try to run code or to lead out of their folder; each says what it got past."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from rlhf import checkpoint
from rlhf.data.reading import read_prompts
from rlhf.engines.shared_memory import folder_weights
from rlhf.engines.state_files import StateFiles
from rlhf.manifest import broken, write_manifest
from rlhf.models.loading import load_causal, resolve_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.base import PathData
from rlhf.recipe.model_shape import read_shape
from rlhf.recipe.schema import ModelSource


@dataclass(frozen=True)
class Place:
    """A folder for one attempt, and the file whose presence says that something ran."""

    folder: Path
    marker: Path
    tiny: Path
    rng: random.Random

    @property
    def code(self) -> str:
        """Return Python source that leaves the marker."""
        return f"open({str(self.marker)!r}, 'w').close()\n"

    def model(self) -> Path:
        """Return a copy of the tiny model, to be spoilt."""
        return shutil.copytree(self.tiny, self.folder / "model")


Attempt = Callable[[Place], list[str]]
"""Returns in words what escaped; an RlhfError says that the product refused."""


class Bomb:
    """Leaves the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


def bomb(place: Place) -> bytes:
    """Return a pickle, plain or as torch or numpy wrap it."""
    kind = place.rng.choice(("pickle", "torch", "old torch"))
    if kind == "pickle":
        return pickle.dumps(Bomb(place.marker))
    buffer = io.BytesIO()
    torch.save({"x": Bomb(place.marker)}, buffer, _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


def use(folder: Path) -> None:
    """Do with a base model what a run does."""
    found = resolve_model(ModelSource(path=str(folder), dtype="float32"), cache=folder.parent / "cache")
    load_tokenizer(found)
    read_shape(found)
    load_causal(found, "float32")
    list(folder_weights(found))


def pickled_weights(place: Place) -> list[str]:
    """Weights are a pickle, under the names that pickles have and under that of safetensors."""
    folder = place.model()
    names = ("pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth", "model.safetensors", "model.ckpt")
    (folder / "model.safetensors").unlink()
    (folder / place.rng.choice(names)).write_bytes(bomb(place))
    use(folder)
    return ["pickled weights were taken"]


def pickles_beside(place: Place) -> list[str]:
    """Pickles lie beside good weights."""
    folder = place.model()
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "tokenizer.pkl",
        "scheduler.pt",
        "vocab.pkl",
    ):
        (folder / name).write_bytes(bomb(place))
    use(folder)
    return []


def index_elsewhere(place: Place) -> list[str]:
    """The index of the weights names a pickle, or a file outside."""
    folder = place.model()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(place.folder / "outside.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    (folder / "evil.bin").write_bytes(bomb(place))
    target = place.rng.choice(
        ("evil.bin", "../outside.safetensors", str(place.folder / "outside.safetensors"), "..", "")
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    use(folder)
    return ["an index led elsewhere"]


def adapter(place: Place) -> list[str]:
    """The folder holds an adapter whose weights are a pickle."""
    folder = place.model()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(place.tiny)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(bomb(place))
    if place.rng.random() < 0.5:
        (folder / "config.json").unlink()
    use(folder)
    return ["an adapter was taken for a model"]


def remote_code(place: Place) -> list[str]:
    """The config wants Python files of the model's own."""
    folder = place.model()
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(place.code + "class Evil: pass\n")
    name, key, kind = place.rng.choice(
        (
            ("config.json", "AutoModelForCausalLM", "modeling_evil.Evil"),
            ("config.json", "AutoConfig", "configuration_evil.Evil"),
            ("tokenizer_config.json", "AutoTokenizer", ["tokenization_evil.Evil", "tokenization_evil.Evil"]),
        )
    )
    config = json.loads((folder / name).read_text())
    if name == "config.json" and place.rng.random() < 0.5:
        config["model_type"] = "evil"
    (folder / name).write_text(json.dumps(config | {"auto_map": {key: kind}}))
    use(folder)
    return ["a model that wants its own code was taken"]


def code_by_other_ways(place: Place) -> list[str]:
    """Python files where libraries look for them: generation, kernels, tokenizer classes, the folder as a package."""
    folder = place.model()
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "__init__.py", "evil.py", "handler.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(place.code + "def generate(*_, **__): pass\n")
    change = place.rng.choice(
        (
            ("config.json", {"attn_implementation": "evil/kernel", "_attn_implementation": f"{folder}/evil"}),
            ("config.json", {"model_type": "../evil"}),
            ("config.json", {"dtype": "load", "torch_dtype": "hub"}),
            ("config.json", {"quantization_config": {"quant_method": "../evil"}}),
            ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}),
            ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd", "vocab_file": "../evil.py"}),
            ("generation_config.json", {"custom_generate": str(folder), "eos_token_id": 2}),
        )
    )
    file = folder / change[0]
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | change[1]))
    use(folder)
    return []


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'].__init__ }}",
    "{{ messages.append('x') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages|attr('__class__') }}",
    "{% set f = joiner.__init__.__globals__.__builtins__.__import__ %}{{ f('os').system('touch MARKER') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% extends '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ range(10 ** 9) }}",
    "{{ missing.attribute }}",
    "{{ messages[99]['x'] }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% unclosed",
)


def template(place: Place) -> list[str]:
    """The chat template tries to leave its sandbox, or to fail in an unusual way."""
    folder = place.model()
    file = folder / "chat_template.jinja"
    attack = place.rng.choice(ESCAPES).replace("MARKER", str(place.marker))
    file.write_text(attack + file.read_text())
    tokenizer = load_tokenizer(resolve_model(ModelSource(path=str(folder)), cache=place.folder / "cache"))
    said = tokenizer._render([{"role": "user", "content": "Hi"}])
    return ["a template looked outside"] if "root:" in said or "<class" in said or "built-in" in said else []


def state(place: Place) -> list[str]:
    """A whole and sealed state holds pickles where tensors belong, or beside them."""

    def fill(folder: Path) -> None:
        save_file({"x": torch.ones(2)}, folder / "policy-0-0.safetensors")
        for name in ("policy-0-0.pt", "optimizer.bin", "random.pkl", "mp_rank_00_model_states.pt", "state.json"):
            (folder / name).write_bytes(bomb(place))
        if place.rng.random() < 0.5:
            (folder / "policy-0-0.safetensors").write_bytes(bomb(place))

    checkpoint.write(place.folder / "state", 3, "key", fill, {})
    saved = checkpoint.newest(place.folder / "state", "key")
    assert saved is not None
    dict(StateFiles(saved.folder, "policy"))
    return []


def manifest(place: Place) -> list[str]:
    """A forged manifest, right in itself, seals files outside of its folder or behind a link."""
    folder, outside = place.folder / "state" / "step-00000003", place.folder / "outside"
    folder.mkdir(parents=True)
    outside.write_text("private")
    (folder / "x").write_text("x")
    sealed = checkpoint.seal(folder)
    truth = {"size": 7, "sha256": "f7f9a6d1a2a1d9f9f37eb8a2d7a4cd2b6a4f1e3f4b6c3d54a38b2f9dc1a5e5d7"}
    link = place.rng.random() < 0.5
    if link:
        (folder / "private").symlink_to(outside)
    name = "private" if link else place.rng.choice(("../../outside", str(outside), "a/../../../outside", "..", "/"))
    write_manifest(folder, {"step": 3, "key": "key", "info": {}, "files": {**sealed, name: truth}})
    found = ["a manifest led outside"] if not broken(folder, {**sealed, name: truth}) else []
    if checkpoint.newest(place.folder / "state", "key") is not None:
        found.append("a forged state was used")
    checkpoint.prune(place.folder / "state", 1, None)
    return found + ([] if outside.read_text() == "private" else ["a file outside was changed"])


def linked_state(place: Place) -> list[str]:
    """The name of a state is a link to a folder elsewhere."""
    outside = place.folder / "outside"
    checkpoint.write(outside, 3, "key", lambda folder: (folder / "x").write_text("x") and None, {})
    root = place.folder / "state"
    root.mkdir()
    (root / "step-00000003").symlink_to(outside / "step-00000003")
    found = ["a linked state was used"] if checkpoint.newest(root, "key") else []
    checkpoint.prune(root, 1, None)
    return found + ([] if (outside / "step-00000003" / "x").is_file() else ["a file outside was removed"])


def data(place: Place) -> list[str]:
    """A data file is a pickle, an archive, or an Arrow extension type that older readers unpickled."""
    path = (
        place.folder / f"rows{place.rng.choice(('.jsonl', '.json', '.csv', '.parquet', '.pkl', '.npz', '.jsonl.gz'))}"
    )
    path.write_bytes(bomb(place))
    if path.suffix == ".parquet" and place.rng.random() < 0.5:
        marks = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb(place)}
        field = pyarrow.field("prompt", pyarrow.string(), metadata=marks)
        pyarrow.parquet.write_table(pyarrow.table([["Hi"]], schema=pyarrow.schema([field])), path)
        return [] if read_prompts(PathData(path=path)) else ["no rows"]
    if path.suffix == ".csv":
        path.write_bytes(b"prompt\n=cmd|' /C touch " + os.fsencode(place.marker) + b"'!A0\n")
        return [] if read_prompts(PathData(path=path)) else ["no rows"]
    read_prompts(PathData(path=path))
    return ["rows came from a pickle"]


ATTEMPTS: tuple[Attempt, ...] = (
    pickled_weights, pickles_beside, index_elsewhere, adapter, remote_code, code_by_other_ways, template, template,
    state, manifest, linked_state, data,
)  # fmt: skip
