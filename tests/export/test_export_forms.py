"""`rlhf export`: what lies in the folder, what is verified, and what is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli import main
from rlhf.done_file import read_done, write_done
from rlhf.export.agreement import Disagreement
from rlhf.export.write import export

TOKENS = torch.tensor([[3, 40, 50, 60, 70]])


def invoke(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def take(run, stage, output, form="merged", kind="bf16"):
    return export(run / stage, form, kind, output, verify=True)


def test_merged_is_the_stage_bit_for_bit(run, tmp_path):
    made = take(run, "dpo", tmp_path / "out")
    assert "bit for bit" in made.verified
    ours = AutoModelForCausalLM.from_pretrained(made.folder)
    theirs = AutoModelForCausalLM.from_pretrained(run / "stages" / "dpo" / "model")
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(made.folder).chat_template
    assert not list(tmp_path.glob(".*")), "nothing half made stays"


def test_a_reward_model_is_taken_merged_too(run, tmp_path):
    made = take(run, "rm", tmp_path / "out")
    assert AutoModelForSequenceClassification.from_pretrained(made.folder).config.num_labels == 1
    assert "AutoModelForSequenceClassification" in (made.folder / "README.md").read_text()


def test_the_adapter_on_its_base_is_the_merged_model(run, tmp_path):
    made = take(run, "dpo", tmp_path / "out", "adapter")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "taken-sft"
    base = AutoModelForCausalLM.from_pretrained(take(run, "sft", tmp_path / "taken-sft").folder)
    before = base(TOKENS).logits
    adapted = PeftModel.from_pretrained(base, made.folder)(TOKENS).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "stages" / "dpo" / "model")(TOKENS).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(before, merged, atol=1e-2), "training did nothing, so this test would show nothing"


def test_gguf_has_a_modelfile_and_reads_back(run, tmp_path):
    made = take(run, "sft", tmp_path / "out", "gguf", "f32")
    assert sorted(path.name for path in made.folder.iterdir()) == ["Modelfile", "README.md", "taken-sft.f32.gguf"]
    assert "bit for bit" in made.verified
    model = AutoModelForCausalLM.from_pretrained(made.folder, gguf_file="taken-sft.f32.gguf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(run / "stages" / "sft" / "model", dtype=torch.float32)
    assert torch.equal(model(TOKENS).logits, theirs(TOKENS).logits)


def test_the_command_says_what_it_verified(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(run / "stages" / "sft")
    assert done.exit_code == 0, done.output
    assert "verified: loaded with plain transformers, logits equal bit for bit\nexported: taken-sft" in done.output
    assert (tmp_path / "taken-sft" / "model.safetensors").is_file()
    again = invoke(run / "sft")
    assert again.exit_code == 2
    assert "error: taken-sft is there already; choose another folder with -o" in again.output
    quick = invoke(run / "sft", "-o", "quick", "--no-verify")
    assert "not verified" in quick.output


@pytest.mark.parametrize(
    ("stage", "options", "code", "said"),
    [
        ("nope", (), 2, "has no stage nope; finished are: dpo, duel"),
        ("duel", (), 2, "stage duel of {run} is of kind compare and leaves no model"),
        ("full", ("--as", "adapter"), 2, "stage full left no adapter (tuning: full); take the whole model"),
        ("rm", ("--as", "gguf"), 2, "stage rm (reward) scores or classifies texts: GGUF holds language models"),
        (".", (), 2, "is a whole run: name one of its stages, finished are: dpo"),
        ("../elsewhere/ppo", (), 2, "there is no run folder"),
    ],
)
def test_what_cannot_be_taken_is_said_in_a_line(run, tmp_path, stage, options, code, said):
    done = invoke(run if stage == "." else run / stage, "-o", tmp_path / "out", *options)
    assert done.exit_code == code
    assert said.format(run=run) in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(run, folder)
    return folder


def test_an_unfinished_stage_is_not_taken(copy, tmp_path):
    (copy / "stages" / "dpo" / "done.json").unlink()
    done = invoke(copy / "dpo", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "stage dpo of" in done.output
    assert "is not finished" in done.output


def test_damage_is_found_before_anything_is_written(copy, tmp_path):
    weights = copy / "stages" / "dpo" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = invoke(copy / "dpo", "-o", tmp_path / "out")
    assert done.exit_code == 3
    assert "is damaged (model/model.safetensors: changed)" in done.output
    (copy / "stages" / "sft" / "done.json").write_text("{}")
    assert invoke(copy / "sft", "-o", tmp_path / "out").exit_code == 3
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_the_sealed_files_is_not_taken(copy, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    model = copy / "stages" / "sft" / "model"
    (model / "NOTES.txt").write_text("a note")
    (model / "link.txt").symlink_to(secret)
    (model / "broken").symlink_to(tmp_path / "nowhere")
    made = take(copy, "sft", tmp_path / "out")
    names = {file.name for file in made.folder.rglob("*")}
    assert not names & {"NOTES.txt", "link.txt", "broken"}
    assert "model.safetensors" in names
    assert (made.folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_an_adapter_that_is_not_its_models_is_not_kept(copy, tmp_path):
    adapter = copy / "stages" / "dpo" / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * 3 for name, weight in load_file(adapter).items()}, adapter, metadata={"format": "pt"})
    file = copy / "stages" / "dpo" / "done.json"
    write_done(file, read_done(file) | {"adapter": None})  # as if it had not been sealed
    with pytest.raises(Disagreement, match="the adapter on its base does not agree with its stage"):
        take(copy, "dpo", tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_moved_is_taken_all_the_same(copy, tmp_path):
    made = take(copy, "dpo", tmp_path / "out", "adapter")
    assert "against the merged model" in made.verified
