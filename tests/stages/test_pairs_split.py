"""Pairs of a file: split by prompt, read from disk, and trained on in every format."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.data.reading import read_preferences
from rlhf.data.tokenize import preference_sequences
from rlhf.errors import DataError
from rlhf.recipe.base import PathData
from rlhf.recipe.preference_schema import DpoStage, KtoStage
from rlhf.recipe.schedule import schedule
from rlhf.stages.pairs import load_examples, load_pairs

EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
CONTEXT = SimpleNamespace(seed=lambda *_: 5, tracker=SimpleNamespace(say=print))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PathData(path=path)


def stage_of(data, kind=DpoStage, **settings):
    name = {DpoStage: "dpo", KtoStage: "kto"}[kind]
    return kind(kind=name, name=name, policy="base", data=data, **settings)


def rankings(path, prompts=20):
    rows = [{"prompt": f"Why {n}?", "responses": ["a", "b", "c", "d"], "ranking": [1, 0, 2, 3]} for n in range(prompts)]
    return write(path, rows)


def test_no_prompt_of_a_ranking_is_on_both_sides(tmp_path, tiny_tokenizer):
    stage = stage_of(rankings(tmp_path / "r.jsonl"), heldout_fraction=0.25)
    split = load_pairs(stage, CONTEXT, tiny_tokenizer)
    assert (len(split.train), len(split.heldout)) == (15 * 6, 5 * 6)

    def prompts(pairs):
        return {pair.chosen.tokens[: pair.chosen.response_mask.index(True)] for pair in pairs}

    assert (len(prompts(split.train)), len(prompts(split.heldout))) == (15, 5)
    assert not prompts(split.train) & prompts(split.heldout)


def test_pairs_with_one_prompt_in_many_rows_stay_together(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"Why {n % 4}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(20)]
    split = load_pairs(stage_of(write(tmp_path / "p.jsonl", rows), heldout_fraction=0.25), CONTEXT, tiny_tokenizer)
    assert (len(split.train), len(split.heldout)) == (15, 5)


def test_pairs_on_disk_are_those_in_memory(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"Why {n}?", "chosen": f"yes {n}", "rejected": "no", "margin": n / 2} for n in range(30)]
    stage = stage_of(write(tmp_path / "p.jsonl", rows), heldout_fraction=0.2)
    held = preference_sequences(read_preferences(stage.data), tiny_tokenizer, stage.max_length)
    split = load_pairs(stage, CONTEXT, tiny_tokenizer)
    margins = [int(2 * pair.margin) for pair in [*split.train, *split.heldout]]
    assert sorted(margins) == list(range(30))
    assert margins[:24] == sorted(margins[:24])
    assert [*split.train, *split.heldout] == [held[margin] for margin in margins]
    assert len(split.heldout) == 6


def test_all_prompts_cannot_be_held_out(tmp_path, tiny_tokenizer):
    stage = stage_of(rankings(tmp_path / "r.jsonl", 2), heldout_fraction=0.9)
    with pytest.raises(DataError, match=r"all 12 pairs are held out; lower stages\.dpo\.heldout_fraction"):
        load_pairs(stage, CONTEXT, tiny_tokenizer)


def test_transcripts_are_labelled_answers_too(tiny_tokenizer):
    stage = stage_of(PathData(path=EXAMPLES / "hh_rlhf.jsonl"), KtoStage, heldout_fraction=0.25)
    split = load_examples(stage, CONTEXT, tiny_tokenizer)
    assert (len(split.train), len(split.heldout), split.paired) == (6, 2, True)
    assert [row.desirable for row in split.train] == [True, False] * 3


def test_the_plan_counts_steps_only_where_a_row_is_a_pair(tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(20)])
    known = schedule(None, stage_of(pairs, heldout_fraction=0, batch_size=4))
    assert known["optimizer_steps"] == 5
    known = schedule(None, stage_of(rankings(tmp_path / "r.jsonl"), batch_size=4))
    assert known["rows"] == 20
    assert "optimizer_steps" not in known
    named = pairs.model_copy(update={"format": "ultrafeedback"})
    assert "optimizer_steps" not in schedule(None, stage_of(named))


RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: lora, r: 4}
stages:
  - {name: rm, kind: reward, data: {path: EXAMPLES/hh_rlhf.jsonl}, heldout_fraction: 0.25}
  - {name: dpo, kind: dpo, policy: base, data: {path: EXAMPLES/ranking.jsonl}, heldout_fraction: 0.25}
  - {name: orpo, kind: orpo, policy: base, data: {path: EXAMPLES/ultrafeedback.jsonl}, heldout_fraction: 0}
  - {name: kto, kind: kto, policy: base, data: {path: EXAMPLES/kto.jsonl}, heldout_fraction: 0}
"""


def test_every_format_of_pairs_trains(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("EXAMPLES", str(EXAMPLES)))
    command = ["run", str(tmp_path / "recipe.yaml"), "--local", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    summaries = {
        name: json.loads((tmp_path / "out" / "stages" / name / "done.json").read_text())["summary"]
        for name in ("rm", "dpo", "orpo", "kto")
    }
    assert (summaries["rm"]["pairs"], summaries["rm"]["heldout_pairs"]) == (3, 1)
    assert summaries["dpo"]["pairs"] + summaries["dpo"]["heldout_pairs"] == 13
    assert (summaries["orpo"]["pairs"], summaries["kto"]["rows"]) == (5, 5)


def test_pairs_about_what_a_comparison_asks_are_refused(tmp_path):
    (tmp_path / "gold.py").write_text("def gold(prompt, response, metadata):\n    return 0.0\n")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Is water wet?"}\n{"prompt": "Say hello in Swahili."}\n')
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("EXAMPLES", str(EXAMPLES))
        + "  - {name: duel, kind: compare, candidates: [base, dpo], baseline: base, prompts: {path: asked.jsonl},\n"
        '     gold: {kind: function, path: "gold.py:gold"}}\n'
    )
    result = CliRunner().invoke(main, ["data", "inspect", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 3
    assert "1 of 2 prompts of stages.duel are also in stages.dpo, for example 'Say hello in Swahili.'" in result.stderr


def test_a_stage_learns_the_same_from_parquet_as_from_jsonl(tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": str(n), "chosen": str(n), "rejected": "no"} for n in range(40)]
    write(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=16)
    found = {}
    for kind in ("jsonl", "parquet"):
        (tmp_path / f"{kind}.yaml").write_text(
            f'name: {kind}\nmodel: {{path: "tiny://llama", dtype: float32}}\nstages:\n'
            f"  - {{name: sft, kind: sft, data: {{path: rows.{kind}}}}}\n"
            f"  - {{name: dpo, kind: dpo, policy: sft, data: {{path: rows.{kind}, format: preference}}}}\n"
        )
        command = ["run", str(tmp_path / f"{kind}.yaml"), "--local", "--output", str(tmp_path / kind)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        found[kind] = [
            (tmp_path / kind / "stages" / stage / "model" / "model.safetensors").read_bytes()
            for stage in ("sft", "dpo")
        ]
    assert found["jsonl"] == found["parquet"]
