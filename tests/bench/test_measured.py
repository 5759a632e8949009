"""What runs on this machine: ceilings, learners and the engine's figures, all on the tiny model."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from rlhf.bench import ceilings
from rlhf.bench.batches import Drawer
from rlhf.bench.ceilings import Place, measure_copy, measure_gemm, places
from rlhf.bench.child import Child
from rlhf.bench.figures import KINDS, Figure, names_of
from rlhf.bench.learners import measure_learner, task, useful
from rlhf.bench.measure import Options, measure
from rlhf.bench.rollouts import measure_rollouts, published, rollout_spec
from rlhf.bench.setting import BATCH, LEARNERS, Setting
from rlhf.errors import LostProcess, ResourceError
from rlhf.local import LocalRollout
from rlhf.recipe.tuning_schema import Full, Lora
from rlhf.roles import WeightReceipt

LAYERS = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "SHAPES", dict.fromkeys(("cpu", "cuda"), ((64, 64, 64), (128, 64, 128))))
    monkeypatch.setattr(ceilings, "COPIED", dict.fromkeys(("cpu", "cuda"), 2**20))


@pytest.fixture
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("small", "one_thread")
def test_ceilings_are_positive_and_finite(tiny_setting):
    setting = replace(tiny_setting, cores=4)
    assert [str(place) for place in places(setting)][:2] == ["2 threads", "4 threads"]
    found = measure_gemm(setting, []) + measure_copy(setting, [])
    where = len(places(setting))
    assert sorted(figure.name for figure in found) == sorted(where * [*names_of("gemm"), "copy"])
    assert all(figure.value > 0 and math.isfinite(figure.value) for figure in found)
    assert all(0 < figure.fraction <= 1 for figure in found if figure.name == "gemm head")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("tuning", [Full(), Lora(r=4)])
def test_learners_learn_and_have_a_limit(tiny_recipe, kind, tuning):
    full = isinstance(tuning, Full)
    setting = replace(Setting.of(tiny_recipe(tuning=tuning), seconds=0.01), cores=1)
    on = str(Place("cpu", setting.threads(kind)))
    (figure,) = measure_learner(kind, setting, [Figure("gemm float32", 1.0, on)])
    assert (figure.name, figure.on) == (kind, on)
    assert figure.value > 0
    batch, _ = task(kind, setting, Drawer(262, 512), Place("cpu", 1))
    work = useful(kind, batch)
    head = 64 if kind == "reward" else 64 * 262
    products = LAYERS * work.tokens * (3 if full else 2)
    products += head * work.scored * (3 if full or kind == "reward" else 2)
    products += 3 * 2 * 128 * work.pairs
    products += 0 if full else 3 * 8192 * work.tokens
    assert figure.limit == pytest.approx(batch.token_count() * 1e12 / (2 * products))


@pytest.mark.usefixtures("one_thread")
def test_a_learner_without_a_ceiling_has_no_limit(tiny_setting):
    (figure,) = measure_learner("sft", tiny_setting, [Figure("gemm float32", None, reason="no")])
    assert figure.value > 0
    assert figure.limit is None


def test_the_reward_reads_its_head_once_a_sequence(tiny_setting):
    batch = Drawer(262, 512).pairs(4)
    assert useful("reward", batch).scored == 8
    assert useful("dpo", batch).scored == int(batch.chosen.response_mask.sum() + batch.rejected.response_mask.sum())
    shared = int(batch.chosen.prompt_lengths().sum())
    assert useful("dpo", batch).tokens == batch.token_count() - shared


@pytest.mark.usefixtures("one_thread")
def test_an_engine_is_held_against_its_limit(tiny_setting):
    engine = LocalRollout(rollout_spec(tiny_setting))
    on = str(Place("cpu", tiny_setting.threads("annotate")))
    (figure,) = measure_rollouts(engine, tiny_setting, [Figure("gemm float32", 1e6, on), Figure("copy", 1.0, on)])
    assert figure.value > 0
    weights, cached = 4 * (LAYERS + 262 * 64), 4 * 2 * 2 * 32  # bytes: of all, and of a token in the cache
    assert figure.limit < BATCH * 1e9 / (weights + BATCH * 65 * cached)
    assert figure.limit > BATCH * 1e9 / (weights + BATCH * 127 * cached) / 2  # some of its rows end early


def test_publishing_leaves_the_first_out(tiny_setting):
    receipts = [WeightReceipt(n, "", 10**9, seconds) for n, seconds in enumerate((9.0, 2.0, 4.0, 3.0))]
    on = str(Place("cpu", tiny_setting.threads("sft")))
    seconds, rate = published(receipts, tiny_setting, [Figure("copy", 4.0, on)])
    assert seconds.value == 3.0
    assert rate.value == pytest.approx(1 / 3)
    assert rate.limit == pytest.approx(2.0)


def test_threads_are_those_of_a_run(tiny_recipe):
    setting = Setting(Setting.of(tiny_recipe()).recipe, Setting.of(tiny_recipe()).folder, cores=8)
    assert [setting.threads(kind) for kind in LEARNERS] == [8, 8, 8, 4]  # policy and critic train side by side
    assert setting.thread_counts() == [4, 8]


def test_the_recipes_own_stages_count(tiny_recipe):
    stage = {"name": "mine", "kind": "sft", "data": {"path": "x.jsonl"}, "max_tokens_per_microbatch": 77}
    setting = Setting.of(tiny_recipe(stages=[stage]))
    assert setting.stage("sft").max_tokens_per_microbatch == 77
    assert setting.served().roles.rollout.replicas == 1


def test_a_child_that_died_is_replaced():
    with Child({"MALLOC_TOP_PAD_": "4096"}) as child:
        with pytest.raises(LostProcess, match="ended"):
            child.call(os._exit, 9)
        assert child.call(os.getpid) != os.getpid()
        assert child.call(os.getenv, "MALLOC_TOP_PAD_") == "4096"
    assert "MALLOC_TOP_PAD_" not in os.environ


@contextmanager
def no_ray(_: Setting) -> Iterator[Mapping[str, object]]:
    raise ResourceError("Ray did not start")
    yield {}


@contextmanager
def half_a_ray(_: Setting) -> Iterator[Mapping[str, object]]:
    def fails(known):
        raise ModuleNotFoundError("No module named 'vllm'\nmore")

    yield {"rollouts": fails, "transfer": fails, "ray": lambda known: [Figure(name, 1.0) for name in names_of("ray")]}


def test_what_fails_is_reported_and_the_rest_goes_on(tiny_recipe):
    said: list[str] = []
    recipe = tiny_recipe(tuning=Lora(target_modules=["nothing"]))
    result = measure(Options(recipe, ["learners", "ray"], seconds=0.01), no_ray, said.append)
    by_name = {figure.name: figure for figure in result.figures}
    assert set(by_name) == set(KINDS) - {"rollouts", "publish", "publish rate"}
    assert all(by_name[name].value > 0 for name in (*names_of("gemm"), "copy"))
    for kind in LEARNERS:
        assert "target_modules" in by_name[kind].reason
    assert by_name["call"].reason == "Ray did not start"
    assert "starting Ray" in said


def test_one_part_of_a_cluster_may_fail(tiny_recipe):
    result = measure(Options(tiny_recipe(), ["transfer", "ray"], seconds=0.01), half_a_ray, lambda _: None)
    by_name = {figure.name: figure for figure in result.figures}
    assert by_name["publish"].reason == "No module named 'vllm'"
    assert by_name["call"].value == 1.0
    assert result.measured
    assert result.machine["cores"] > 0
    assert result.versions["torch"] == torch.__version__
