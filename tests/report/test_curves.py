"""Metric files as they are found on disk, torn ones among them."""

import pytest

from rlhf.report.curves import read_curves, series
from rlhf.report.status import last_metrics


def write(folder, stage, text):
    path = folder / "stages" / stage / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    return path


def test_stages_come_in_the_order_in_which_they_began(tmp_path):
    write(tmp_path, "zero", b'{"step": 1, "time": 10.0, "loss": 2.0}\n{"step": 2, "time": 11.0, "loss": 1.5}\n')
    write(tmp_path, "alpha", b'{"step": 1, "time": 20.0, "kl": 0.5, "note": "text", "loss": null}\n')
    write(tmp_path, "empty", b"")
    (tmp_path / "stages" / "pairs").mkdir()
    curves = read_curves(tmp_path)
    assert list(curves) == ["zero", "alpha"]
    assert curves["zero"] == [{"step": 1, "time": 10.0, "loss": 2.0}, {"step": 2, "time": 11.0, "loss": 1.5}]
    assert curves["alpha"] == [{"step": 1, "time": 20.0, "kl": 0.5}]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2, "lo\n', b"{", b'{"a\xc3'])
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    write(tmp_path, "sft", b'{"step": 1, "loss": 2.0}\n\n' + tail)
    assert read_curves(tmp_path) == {"sft": [{"step": 1, "loss": 2.0}]}


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 1, "lo',
        b"[1, 2]",
        b"7",
        b"null",
        b'{"loss": 1}',
        b'{"step": "one"}',
        b'{"step": NaN}',
        b'{"step": 1e999}',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b"\0" * 4096,
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_named_and_the_rest_used(tmp_path, caplog, line):
    path = write(tmp_path, "sft", b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    assert read_curves(tmp_path) == {"sft": [{"step": 0}, {"step": 2}]}
    assert [record.getMessage() for record in caplog.records] == [f"{path}:2: damaged line, left out"]
    assert last_metrics(path) == {"step": 2}


def test_a_step_redone_after_a_resume_counts_once_and_later_columns_join(tmp_path):
    write(
        tmp_path, "ppo", b'{"step": 2, "kl": 5}\n{"step": 1, "kl": 1}\n{"step": 2, "kl": 4}\n{"step": 2, "gold": 1}\n'
    )
    assert read_curves(tmp_path)["ppo"] == [{"step": 1, "kl": 1}, {"step": 2, "kl": 4, "gold": 1}]


def test_series_leaves_out_what_is_no_number():
    curve = [{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": float("nan")}, {"step": 4, "kl": float("inf")}]
    assert series(curve, "kl") == [(1, 0.5)]
