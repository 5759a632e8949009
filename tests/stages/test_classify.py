"""Classification fine-tuning: what a stage learns and leaves, that it resumes bit for bit, and what it refuses."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands import rlhf
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli import main
from rlhf.data.classes import split_classes
from rlhf.data.content import digest
from rlhf.data.splits import digest_array
from rlhf.interrupts import Interrupted
from rlhf.local import LocalLauncher
from rlhf.recipe.load import load_recipe
from rlhf.recipe_run import run_recipe
from rlhf.seeding import derive
from rlhf.tracking import Tracker

RECIPES = Path(__file__).parents[2] / "recipes"
SMOKE = RECIPES / "smoke" / "classify.yaml"
DATA = RECIPES / "data" / "smoke_classes.jsonl"
CLOCK = ("time", "tokens_per_second")
STEPS = 48


@pytest.fixture(autouse=True, scope="module")
def one_core():
    """Threads that wait for each other crawl on a busy machine, and as many always make the same bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield


def run(recipe, folder, *options):
    return CliRunner().invoke(main, ["run", str(recipe), "--output", str(folder), *map(str, options)])


def metrics(folder):
    lines = (folder / "stages" / "kinds" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def summary(folder):
    return json.loads((folder / "stages" / "kinds" / "done.json").read_text())["summary"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run(SMOKE, folder, "--local")
    assert result.exit_code == 0, result.output
    return folder


def test_it_learns_far_above_chance(finished):
    losses = [row["loss"] for row in metrics(finished) if "loss" in row]
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.3)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    found = summary(finished)
    assert found["heldout_accuracy"] > found["heldout_majority"] + 0.25
    assert found["heldout_f1"] > 0.6
    assert (found["labels"], found["rows"] + found["heldout_rows"]) == (3, 112)


def heldout():
    """The rows that are held out, found without the stage."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    labels = sorted({row["label"] for row in rows})
    numbers = np.array([labels.index(row["label"]) for row in rows])
    texts = digest_array(digest(row["text"]) for row in rows)
    _, chosen = split_classes(labels, numbers, texts, 0.2, derive(17, "kinds", "split"))
    return [rows[number] for number in chosen]


def test_the_evaluation_is_what_plain_transformers_says_of_the_held_out_texts(finished):
    folder = finished / "stages" / "kinds"
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    told = json.loads((folder / "evaluation.json").read_text())
    assert told["labels"] == [model.config.id2label[number] for number in range(3)]
    assert told["labels"] == ["order", "question", "statement"]
    counts = [[0] * 3 for _ in range(3)]
    for row in heldout():
        with torch.no_grad():
            taken = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].argmax().item()
        counts[model.config.label2id[row["label"]]][taken] += 1
    assert told["confusion"] == counts
    assert told["rows"] == sum(map(sum, counts)) == summary(finished)["heldout_rows"]
    assert (
        told["accuracy"] == summary(finished)["heldout_accuracy"] == sum(counts[i][i] for i in range(3)) / told["rows"]
    )
    assert told["macro"]["f1"] == summary(finished)["heldout_f1"]
    assert told["texts"] == [sum(row["label"] == name for row in heldout()) for name in told["labels"]]
    # told once more on the way: at the kept step the loop measured the same model on the same rows
    kept = next(row for row in metrics(finished) if row["step"] == summary(finished)["kept_step"])
    assert kept["heldout_accuracy"] == pytest.approx(told["accuracy"])


def test_the_adapter_lies_beside_the_merged_model(finished):
    from peft import PeftModel

    folder = finished / "stages" / "kinds"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(config["base_model_name_or_path"], num_labels=3)
    base.config.pad_token_id = 0
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    tokens = torch.randint(6, 262, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)


def test_passes_do_not_bear_on_the_result(finished, tmp_path):
    result = run(SMOKE, tmp_path, "--local", "--set", "stages.kinds.max_tokens_per_microbatch=64")
    assert result.exit_code == 0, result.output
    for one, other in zip(metrics(finished), metrics(tmp_path), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("stop", [1, 29])
def test_an_interrupted_stage_ends_with_the_same_bits(finished, tmp_path, monkeypatch, stop):
    record = Tracker.log

    def log(tracker, step, values):
        record(tracker, step, values)
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tracker, "log", log)
    with pytest.raises(Interrupted, match=f"after step {stop}, which is saved"):
        run_recipe(load_recipe(SMOKE), LocalLauncher, tmp_path, Console(quiet=True))
    monkeypatch.undo()
    result = run(SMOKE, tmp_path, "--local")
    assert result.exit_code == 0, result.output
    assert f"kinds goes on after step {stop}" in result.stdout
    assert metrics(tmp_path) == metrics(finished)
    assert summary(tmp_path) == summary(finished)
    one, other = (
        load_file(folder / "stages" / "kinds" / "model" / "model.safetensors") for folder in (tmp_path, finished)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
def test_through_ray_it_is_the_same(finished, tmp_path):
    rlhf("run", SMOKE, "--output", tmp_path)
    for one, other in zip(metrics(tmp_path), metrics(finished), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert summary(tmp_path) == pytest.approx(summary(finished), rel=1e-4)


RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: full}
stages:
  - {name: kinds, kind: classify, data: {path: texts.csv}, batch_size: 4}
"""


def refused(folder, text, *options):
    (folder / "texts.csv").write_text(text)
    (folder / "recipe.yaml").write_text(RECIPE)
    result = run(folder / "recipe.yaml", folder / "out", "--local", *options)
    assert result.exit_code == 3, result.output
    return result.stderr.strip()


def test_texts_that_no_classifier_learns_from_are_refused(tmp_path):
    assert refused(tmp_path, "text,label\na,x\nb,x\n").endswith(
        "texts.csv: all 2 rows have the label 'x'; a classifier needs two"
    )
    assert refused(tmp_path, "text,label\na,x\nb,x\nc,y\n").endswith(
        "texts.csv: label 'y' has 1 different texts, of which 1 would be held out, and none would be left to train on;"
        " add texts, leave the label out, or change stages.kinds.heldout_fraction"
    )
    assert refused(tmp_path, "text,label\na,x\nb,\n").endswith("texts.csv:3: column 'label' is empty")
    assert refused(tmp_path, "review,stars\na,1\n").endswith(
        "texts.csv:2: column 'text' missing; perhaps columns: {text: review, label: stars}"
    )
    assert "texts.csv:2: text has 5 tokens, the limit is 4 (max_length)" in refused(
        tmp_path, "text,label\nabcde,x\nb,y\n", "--set", "stages.kinds.max_length=4"
    )


def test_labels_may_be_numbers_and_nothing_held_out(tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"text {n},{n % 3 * 5}\n" for n in range(12)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = run(tmp_path / "recipe.yaml", tmp_path, "--local", "--set", "stages.kinds.heldout_fraction=0")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "stages" / "kinds" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "5", "2": "10"}
    assert not (tmp_path / "stages" / "kinds" / "evaluation.json").exists()
    assert "heldout_accuracy" not in summary(tmp_path)


def test_it_is_planned_and_inspected():
    plan = json.loads(CliRunner().invoke(main, ["plan", str(SMOKE), "--json"]).stdout)
    (stage,) = plan["stages"]
    assert (stage["kind"], [role["role"] for role in stage["roles"]]) == ("classify", ["policy"])
    assert stage["schedule"]["rows"] == 112
    assert stage["schedule"]["optimizer_steps"] == STEPS
    result = CliRunner().invoke(main, ["data", "inspect", str(SMOKE)])
    assert result.exit_code == 0, result.stderr
    assert "labels      3: statement 56, question 32, order 24" in result.stdout
    assert "The baker waits at noon. -> [[statement]]" in result.stdout
