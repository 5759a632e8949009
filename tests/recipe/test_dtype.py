"""`model.dtype: auto`: the devices of the roles decide, a run folder keeps what it began in, and costs are said."""

from __future__ import annotations

import json

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe import devices
from rlhf.recipe.devices import DEVICES, bfloat16_gpus
from rlhf.recipe.dtype import Here, Speed, decide
from rlhf.recipe.products import Products
from rlhf.recipe.schema import Recipe

FAST = Speed("this CPU", "bfloat16", 0.5)
SLOW = Speed("this CPU", "float32", 40.0)
NEW = Speed("the GPUs", "bfloat16")
OLD = Speed("Tesla T4", "float32")


class Made:
    """Devices that are made up; what is None must not be asked."""

    def __init__(self, cpu: Speed | None = None, gpu: Speed | None = None, visible: bool = False) -> None:
        self.found = {"cpu": cpu, "gpu": gpu}
        self.visible = visible

    @property
    def cpu(self) -> Speed:
        return self._asked("cpu")

    @property
    def gpu(self) -> Speed:
        return self._asked("gpu")

    def _asked(self, kind: str) -> Speed:
        speed = self.found[kind]
        assert speed is not None, f"{kind} was asked"
        return speed


def recipe(dtype: str = "auto", backend: str = "ray", **roles: object) -> Recipe:
    stages = [
        {"name": "ppo", "kind": "ppo", "policy": "base", "reward": {"kind": "function", "path": "r.py:score"},
         "prompts": {"path": "p.jsonl"}, "steps": 1}
    ]  # fmt: skip
    made = {"name": "t", "model": {"path": "m", "dtype": dtype}, "backend": backend, "roles": roles, "stages": stages}
    return Recipe.model_validate_json(json.dumps(made), strict=True)


ON_GPUS = {name: {"gpus": 1} for name in ("policy", "reference", "critic", "rollout")}


def test_auto_is_the_default():
    assert recipe().model.dtype == "auto"
    with pytest.raises(AssertionError, match="not decided"):
        _ = recipe().model.precision


@pytest.mark.parametrize(("cpu", "dtype"), [(FAST, "bfloat16"), (SLOW, "float32")])
def test_on_the_cpu_the_cpu_decides(cpu, dtype):
    made = decide(recipe(), Made(cpu=cpu))
    assert (made.recipe.model.precision, made.warnings) == (dtype, ())
    assert decide(made.recipe, Made(cpu=cpu)).recipe == made.recipe


def test_float32_is_said_with_its_reason():
    assert decide(recipe(), Made(cpu=SLOW)).notes == (
        "model.dtype: auto is float32 here: bfloat16 products are 40 times slower than float32 on this CPU",
    )
    assert decide(recipe(), Made(cpu=FAST)).notes == ()
    made = decide(recipe(**ON_GPUS), Made(gpu=OLD))
    assert made.notes == ("model.dtype: auto is float32 here: no bfloat16 products on Tesla T4",)


@pytest.mark.parametrize(("gpu", "dtype"), [(NEW, "bfloat16"), (OLD, "float32")])
def test_on_gpus_they_decide_and_the_cpu_is_not_asked(gpu, dtype):
    assert decide(recipe(**ON_GPUS), Made(gpu=gpu)).recipe.model.precision == dtype


def test_a_recipe_for_the_cpu_on_a_machine_with_gpus_asks_the_cpu():
    assert decide(recipe(), Made(cpu=SLOW, visible=True)).recipe.model.precision == "float32"


def test_in_one_process_the_roles_take_the_gpu_that_is_there():
    assert decide(recipe(backend="local"), Made(gpu=NEW, visible=True)).recipe.model.precision == "bfloat16"
    assert decide(recipe(backend="local"), Made(cpu=SLOW)).recipe.model.precision == "float32"


def test_where_gpus_and_cpus_mix_the_gpus_decide_and_the_cost_is_said():
    roles = {"policy": {"gpus": 1}, "rollout": {"gpus": 1}, "critic": {"gpus": 1}}
    made = decide(recipe(**roles), Made(cpu=SLOW, gpu=NEW))
    assert made.recipe.model.precision == "bfloat16"
    (said,) = made.warnings
    assert "bfloat16 for reference: bfloat16 products are 40 times slower" in said
    assert decide(recipe(**roles), Made(cpu=FAST, gpu=NEW)).warnings == ()


def test_what_stands_on_the_policys_gpus_is_on_gpus():
    roles = {"policy": {"gpus": 1}, **{name: {"share": "policy"} for name in ("reference", "critic", "rollout")}}
    assert decide(recipe(**roles), Made(gpu=NEW)).recipe.model.precision == "bfloat16"


def test_float32_in_the_recipe_asks_nothing():
    made = decide(recipe("float32"), Made(), kept="bfloat16")
    assert (made.recipe, made.notes, made.warnings) == (recipe("float32"), (), ())


def test_bfloat16_in_the_recipe_stays_and_its_cost_is_said():
    made = decide(recipe("bfloat16"), Made(cpu=SLOW), kept="float32")
    assert made.recipe == recipe("bfloat16")
    (said,) = made.warnings
    assert said.startswith("model.dtype: bfloat16 for policy, reference, critic, rollout:")
    assert "40 times slower" in said
    assert "auto is float32 here" in said
    assert decide(recipe("bfloat16"), Made(cpu=FAST)).warnings == ()
    assert "no bfloat16 products on Tesla T4" in decide(recipe("bfloat16", **ON_GPUS), Made(gpu=OLD)).warnings[0]


@pytest.mark.parametrize(
    ("kept", "cpu", "said"),
    [
        ("bfloat16", SLOW, "40 times slower than float32 on this CPU; --set model.dtype=float32"),
        ("float32", FAST, "2 times as fast as float32 on this CPU; --set model.dtype=bfloat16"),
    ],
)
def test_a_run_keeps_its_dtype_and_says_what_that_costs_here(kept, cpu, said):
    made = decide(recipe(), Made(cpu=cpu), kept)
    assert made.recipe.model.precision == kept
    (warning,) = made.warnings
    assert warning.startswith(f"model.dtype: the run keeps {kept}, in which it began;")
    assert said in warning


@pytest.mark.parametrize(("kept", "cpu"), [("bfloat16", FAST), ("float32", SLOW)])
def test_a_run_that_resumes_where_it_began_says_nothing(kept, cpu):
    made = decide(recipe(), Made(cpu=cpu), kept)
    assert (made.recipe.model.precision, made.notes, made.warnings) == (kept, (), ())


def test_ranks_that_train_whole_copies_get_float32():
    roles = {**ON_GPUS, "policy": {"gpus": 1, "ranks": 2, "zero_stage": 0}}
    made = decide(recipe(**roles), Made(gpu=NEW))
    assert made.recipe.model.precision == "float32"
    assert "zero_stage: 0" in made.notes[0]
    with pytest.raises(RecipeError, match=r"began in bfloat16.*--set model.dtype=float32"):
        decide(recipe(**roles), Made(gpu=NEW), kept="bfloat16")
    assert decide(recipe(**roles), Made(gpu=NEW), kept="float32").recipe.model.precision == "float32"


def test_the_cpu_here_is_measured(monkeypatch):
    monkeypatch.setattr("rlhf.recipe.dtype.cpu_products", lambda: Products(1e9, 4e10, False))
    assert Here().cpu == SLOW


@pytest.mark.parametrize(
    ("name", "dtype"), [("h100-80gb", "bfloat16"), ("t4-16gb", "float32"), ("v100-32gb", "float32")]
)
def test_planned_gpus_decide_whatever_is_here(name, dtype):
    here = Here(0, DEVICES[name])
    made = decide(recipe(**ON_GPUS), here)
    assert made.recipe.model.precision == dtype
    assert [name in said for said in made.notes] == ([True] if dtype == "float32" else [])


def test_gpus_that_are_elsewhere_count_as_ones_that_have_it():
    assert Here(0).gpu.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("driver", "torch", "expected"),
    [
        ("NVIDIA H100, 9.0\nNVIDIA H100, 9.0", None, [("NVIDIA H100", True)] * 2),
        ("Tesla T4, 7.5", None, [("Tesla T4", False)]),
        ("NVIDIA GeForce RTX 4090, 8.9\nNVIDIA GeForce GT 1030, 6.1", '[["NVIDIA GeForce RTX 4090", true]]',
         [("NVIDIA GeForce RTX 4090", True)]),
        ("", '[["AMD Instinct", true]]', [("AMD Instinct", True)]),
        ("Odd, [N/A]", '[["Odd", false]]', [("Odd", False)]),
        ("RTX, 8.9\nGT, 6.1", "", [("RTX", True), ("GT", False)]),
        ("", "", []),
    ],
)  # fmt: skip
def test_gpus_are_asked_by_the_driver_and_where_that_does_not_do_by_torch(monkeypatch, driver, torch, expected):
    def answer(command: list[str]) -> str:
        if command[0] == "nvidia-smi":
            return driver
        assert torch is not None, "torch was asked"
        return torch

    monkeypatch.setattr(devices, "_answer", answer)
    assert bfloat16_gpus() == expected


def test_one_old_gpu_is_enough_for_float32(monkeypatch):
    monkeypatch.setattr("rlhf.recipe.dtype.bfloat16_gpus", lambda: [("RTX", True), ("GT", False)])
    assert Here(2).gpu == Speed("GT", "float32")


def test_what_cannot_be_asked_answers_nothing(tmp_path):
    assert devices._answer([str(tmp_path / "nothing")]) == ""
    assert devices._answer(["false"]) == ""


def test_torch_is_asked_in_a_process_of_its_own():
    assert json.loads(devices._answer([devices.sys.executable, "-c", devices.ASKS_TORCH])) is not None
