"""What a finished model answers in: whole where it is float32, else as this machine is fast."""

from __future__ import annotations

import json

import pytest

from rlhf.recipe.dtype import Here
from rlhf.recipe.products import Products
from rlhf.recipe.resources import Resources
from rlhf.serving.dtype import served_dtype
from rlhf.serving.plan import Serving
from rlhf.serving.server import Endpoint, Limits, arguments

FAST, SLOW = Products(2e11, 1e11, True), Products(2e9, 1e11, False)


@pytest.mark.parametrize(
    ("stored", "products", "gpus", "dtype"),
    [
        ("float32", FAST, [], "float32"),
        ("bfloat16", FAST, [], "bfloat16"),
        ("bfloat16", SLOW, [], "float32"),
        (None, SLOW, [], "float32"),
        ("bfloat16", SLOW, [("H100", True)], "bfloat16"),
        ("bfloat16", FAST, [("T4", False)], "float32"),
        ("float32", FAST, [("H100", True)], "float32"),
    ],
)
def test_the_device_decides_where_nothing_is_lost(tmp_path, monkeypatch, stored, products, gpus, dtype):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    config = {"model_type": "llama", "dtype": stored, "max_position_embeddings": 64, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("rlhf.recipe.dtype.cpu_products", lambda: products)
    monkeypatch.setattr("rlhf.recipe.dtype.bfloat16_gpus", lambda: gpus)
    monkeypatch.setattr("rlhf.serving.dtype.local_resources", lambda: Resources(2, len(gpus), 2**30))
    assert served_dtype(tmp_path) == dtype
    given = arguments(Serving(tmp_path, "m"), Endpoint("127.0.0.1", 8123, "key"), Limits(2, 64))
    assert given[given.index("--dtype") + 1] == dtype


def test_what_is_here_is_asked_when_it_matters(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setattr(Here, "cpu", property(lambda _: pytest.fail("the CPU was asked")))
    assert served_dtype(tmp_path) == "float32"
