"""Model cards: true, complete, and without a word of this machine."""

from __future__ import annotations

import hashlib
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from rlhf.done_file import read_done, write_done
from rlhf.export.card import code, plain
from rlhf.export.lineage import lineage
from rlhf.export.source import find_stage
from rlhf.export.write import export

SECRET = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def cards(run, tmp_path_factory):
    """The card of each form of the DPO stage, with a secret around."""
    root = tmp_path_factory.mktemp("cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_TOKEN", SECRET)
        for form in ("merged", "adapter", "gguf"):
            export(run / "dpo", form, "q8_0", root / form, verify=True)
    return root


@pytest.mark.parametrize(("form", "library"), [("merged", "transformers"), ("adapter", "peft"), ("gguf", "gguf")])
def test_metadata_are_those_of_a_model_card(cards, form, library):
    data = ModelCard.load(cards / form / "README.md").data
    assert data.library_name == library
    assert {"rlhf", "dpo", form} <= set(data.tags)
    assert data.pipeline_tag == "text-generation"
    assert data.license is None
    assert data.base_model is None


def test_lineage_settings_and_data_are_there(cards, run):
    text = (cards / "merged" / "README.md").read_text()
    assert "# taken\\-dpo" in text
    assert "Licence: `unknown`" in text
    assert "The licence was not found" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    lineage_rows = [row for row in rows if "learning rate" in row]
    assert [row.split(" | ")[0] for row in lineage_rows] == ["| `sft`", "| `dpo`"]
    assert "| `base` |" in lineage_rows[0]
    assert "| `sft` |" in lineage_rows[1]
    assert "`learning rate 0.005 (linear)`; `tuning lora r 4 alpha 8.0`" in lineage_rows[1]
    digest = hashlib.sha256((run.parent / "pairs.jsonl").read_bytes()).hexdigest()
    assert f"| `dpo` | `pairs.jsonl` | `{digest}` |" in text
    assert "| ``chats `a\\|b` <b>.jsonl`` |" in text


def test_comparison_and_versions_are_there(cards):
    text = (cards / "merged" / "README.md").read_text()
    assert "win rate against `sft`" in text
    assert re.search(r"\| `ipo` \| \S+ \[", text)
    assert "| `torch` | `2.13" in text
    assert 'AutoModelForCausalLM.from_pretrained("taken-dpo", dtype="auto")' in text


@pytest.mark.parametrize("form", ["merged", "adapter", "gguf"])
def test_nothing_of_this_machine_leaves_it(cards, run, form):
    for file in (cards / form).iterdir():
        data = file.read_bytes()
        for word in (str(run.parent), str(cards), SECRET, "/root", str(run)):
            assert word.encode() not in data, f"{word} in {file.name}"


def test_a_stage_made_again_since_is_marked(run, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    file = copied / "stages" / "sft" / "done.json"
    write_done(file, read_done(file) | {"key": "other"})
    steps = {step.name: step for step in lineage(find_stage(copied / "dpo"))}
    assert steps["sft"].changed
    assert not steps["dpo"].changed


def test_licence_and_name_of_the_base_are_those_it_has(run, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    base = tmp_path / "my `base`"
    shutil.copytree(run / "stages" / "sft" / "model", base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    file = copied / "stages" / "dpo" / "done.json"
    done = read_done(file)
    done["made_from"]["model"]["path"] = str(base)
    write_done(file, done)
    export(copied / "dpo", "merged", "bf16", tmp_path / "out", verify=False)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "`` my `base` ``. Licence: `apache-2.0`" in card.text
    assert str(tmp_path) not in card.text


def test_a_run_whose_recipe_has_changed_since_still_tells_what_a_stage_was_made_from(run, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    before = find_stage(run / "sft")
    assert before.base["path"] == "tiny://llama"
    assert before.versions["torch"].startswith("2.")
    recipe = copied / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("tiny://llama", "another/model"))
    (copied / "environment.json").write_text("{")
    after = find_stage(copied / "sft")
    assert (after.base, after.versions, after.start()) == (before.base, before.versions, before.start())
    file = copied / "stages" / "sft" / "done.json"  # as an older version left it
    write_done(file, {name: value for name, value in read_done(file).items() if name != "made_from"})
    assert find_stage(copied / "sft").base["path"] == "another/model"


def test_markup_in_names_is_shown_letter_by_letter(monkeypatch):
    assert code("a|b") == "`a\\|b`"
    assert code("`x`") == "`` `x` ``"
    assert code("two\nlines\x1b[31m") == "`two lines<U+001B>[31m`"
    assert plain("<b>*[x](y)*") == "\\<b\\>\\*\\[x\\]\\(y\\)\\*"
    monkeypatch.setenv("SOME_API_KEY", "longsecretvalue")
    assert code("longsecretvalue") == "`***`"
