"""The reference's logprobs from the cache: the same bits without a pass, and a pass for anything that changes them."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from annotate_made import Flushes, Killed
from online_made import context_of, stage_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rlhf.stages.reference_cache as cache
from rlhf.data.sequences import TokenSequence, answered
from rlhf.engines.base import LearnerSpec
from rlhf.interrupts import Interrupted, Interrupts
from rlhf.local import LocalModel
from rlhf.models.tiny import build_tiny
from rlhf.recipe.base import Optimizer
from rlhf.recipe.tuning_schema import Full, Lora
from rlhf.roles import Ready
from rlhf.stage_progress import read_progress
from rlhf.stages.reference_cache import reference_sums, response_sums
from rlhf.types import TokenScores

GROUPS = [
    [answered((5, 6, 7, 8), response) for response in ((9, 10), (11, 12, 13), (14,))],
    [],
    [answered((5, 6), (9, 10)), answered((20, 21, 22), (30, 31))],
]


@dataclass
class Asked:
    """A model that counts what it is asked."""

    model: LocalModel
    during: Callable[["Asked"], None]
    rows: list[int] = field(default_factory=list)

    def logprobs(self, batch):
        self.rows.append(len(batch))
        self.during(self)
        return self.model.logprobs(batch)


@dataclass
class Bench:
    """A model, what describes it, and what was said."""

    spec: LearnerSpec
    folder: Path
    said: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    interrupts: Interrupts = field(default_factory=Interrupts)
    during: Callable[[Asked], None] = lambda asked: None

    def sums(self, groups=GROUPS, **changes):
        """Return the sums and the rows of each pass, in a run of its own."""
        spec = replace(self.spec, **changes)
        context, model = context_of(stage_of("grpo"), self.folder), Asked(LocalModel(spec), self.during)
        context.tracker.say = self.said.append
        context.recovery.interrupts = self.interrupts
        found = reference_sums(model, spec, groups, 0, context)
        self.steps.append(context.tracker.step)
        return found, model.rows

    def files(self):
        return sorted(path for path in (self.folder / "cache").rglob("*") if path.is_file())


@pytest.fixture
def bench(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    spec = LearnerSpec(
        role="policy",
        kind="causal",
        checkpoint=tiny_folder,
        dtype="float32",
        tuning=Full(),
        optimizer=Optimizer(),
        head_learning_rate=None,
        max_tokens_per_microbatch=64,
        temperature=1.0,
        threads=1,
        seed=3,
    )
    return Bench(spec, tmp_path)


def test_a_second_run_makes_no_pass_and_gets_the_same_bits(bench):
    made, passes = bench.sums()
    plain = [response_sums(LocalModel(bench.spec), group, 0) for group in GROUPS]
    assert (made, passes, bench.said) == (plain, [3, 2], [])
    assert [len(sums) for sums in made] == [3, 0, 2]
    again, passes = bench.sums()
    assert (again, passes) == (made, [])
    assert bench.said == ["takes the reference's logprobs of 5 responses from the cache"]
    assert len(bench.files()) == 2


def test_each_sum_is_of_its_own_response(bench):
    """An oracle without padding or neighbours."""
    model = AutoModelForCausalLM.from_pretrained(bench.spec.checkpoint, dtype=torch.float32)
    for sequence, found in zip(GROUPS[0], bench.sums()[0][0], strict=True):
        tokens = torch.tensor([sequence.tokens])
        logits = model(tokens).logits[0, :-1].detach()
        logprobs = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[3:]
        assert found == pytest.approx(float(logprobs.sum()), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"optimizer": Optimizer(learning_rate=1.0)},
        {"role": "reference", "optimizer": None},
    ],
)
def test_what_bears_on_training_alone_changes_nothing(bench, changes):
    made, _ = bench.sums()
    assert bench.sums(**changes) == (made, [])


def test_new_adapters_change_no_bit_whatever_their_seed(bench):
    made, passes = bench.sums(tuning=Lora(r=4))
    assert passes == [3, 2]
    assert bench.sums(tuning=Lora(r=4), seed=9) == (made, [])
    fresh = LocalModel(replace(bench.spec, tuning=Lora(r=4), seed=9))
    assert [response_sums(fresh, group, 0) for group in GROUPS] == made


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"temperature": 0.7},
        {"max_tokens_per_microbatch": 4},
        {"threads": 2},
        {"tuning": Lora(r=4)},
        {"gradient_checkpointing": True},
    ],
)
def test_what_may_change_a_bit_asks_again(bench, changes):
    bench.sums()
    assert bench.sums(**changes)[1] == [3, 2]


def test_one_other_token_or_mask_or_order_asks_again_for_its_group_alone(bench):
    bench.sums()
    first, _, other = GROUPS
    token = [answered((5, 6, 7, 8), (9, 11)), *first[1:]]
    mask = [TokenSequence(first[0].tokens, (False,) * 3 + (True,) * 3), *first[1:]]
    cut = [answered((5, 6, 7), (8, 9, 10)), *first[1:]]
    assert mask == cut
    for group in (token, mask, first[::-1], first[:2]):
        assert bench.sums([group, other])[1] == [len(group)]


def test_another_model_asks_again_and_the_same_one_elsewhere_does_not(bench, tmp_path):
    made, _ = bench.sums()
    same = build_tiny(tmp_path / "copy")
    assert bench.sums(checkpoint=same) == (made, [])
    weights = load_file(same / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, same / "model.safetensors", {"format": "pt"})
    changed, passes = bench.sums(checkpoint=same)
    assert (passes, changed != made) == ([3, 2], True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", lambda name: "0.0"),
        ("accelerators", lambda recipe, stage: 1.0),
        ("_code_digest", lambda: "other"),
    ],
)
def test_other_software_or_another_device_asks_again(bench, monkeypatch, name, value):
    bench.sums()
    monkeypatch.setattr(cache, name, value)
    assert bench.sums()[1] == [3, 2]


def swap(text):
    kept = json.loads(text)
    return json.dumps(kept | {"sums": kept["sums"][::-1]})


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: text[:-9], swap, lambda text: "[1]", lambda text: "{}"]
)
def test_a_damaged_file_is_said_and_made_anew(bench, damage):
    made, _ = bench.sums()
    whole = [file.read_bytes() for file in bench.files()]
    bench.files()[0].write_text(damage(bench.files()[0].read_text()))
    again, passes = bench.sums()
    assert (again, len(passes)) == (made, 1)
    assert [file.read_bytes() for file in bench.files()] == whole
    assert any("so the reference is asked again" in said and str(bench.files()[0]) in said for said in bench.said)
    assert bench.sums() == (made, [])


def test_a_cache_that_cannot_be_written_costs_a_pass_and_no_run(bench):
    (bench.folder / "cache").write_text("no folder")
    made, passes = bench.sums()
    assert (passes, [len(sums) for sums in made]) == ([3, 2], [3, 0, 2])
    assert any(said.startswith("cannot keep the reference's logprobs for later runs: ") for said in bench.said)


def test_sums_that_are_not_finite_are_not_kept(bench):
    class Broken:
        def logprobs(self, batch):
            found = torch.full(batch.tokens.shape, torch.nan)
            return Ready(TokenScores(found, found))

    context = context_of(stage_of("grpo"), bench.folder)
    reference_sums(Broken(), bench.spec, GROUPS, 0, context)
    assert bench.files() == []


def test_parts_are_bounded_by_tokens_too_and_pairs_stay_together(bench, monkeypatch):
    sides = [answered((5, 6), (9,) * length) for length in (1, 1, 8, 8, 2, 2, 2, 2, 40, 1, 1)]
    for limit, parts in ((10**6, [11]), (20, [2, 2, 4, 2, 1]), (27, [4, 4, 2, 1]), (1, [2, 2, 2, 2, 2, 1])):
        monkeypatch.setattr(cache, "CPU_PART_TOKENS", limit)
        monkeypatch.setenv("RLHF_CACHE", str(bench.folder / f"cache-{limit}"))
        assert bench.sums([sides])[1] == parts
        assert bench.sums([sides], ranks=1)[1] == []


def test_longer_data_with_the_same_beginning_asks_for_what_is_new(bench, monkeypatch):
    monkeypatch.setattr(cache, "PART", 2)
    rows = [answered((5, 6), (9, n)) for n in range(10, 20)]
    short, passes = bench.sums([rows[:7]])
    assert passes == [2, 2, 2, 1]
    longer, passes = bench.sums([rows])
    assert passes == [2, 2]  # the half part and what follows it
    assert longer[0][:6] == short[0][:6]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_interrupt_ends_after_a_part_which_the_next_run_does_not_ask_again(bench, monkeypatch, number):
    monkeypatch.setattr(cache, "PART", 2)
    rows = [answered((5, 6), (9, n)) for n in range(10, 20)]
    monkeypatch.setenv("RLHF_CACHE", str(bench.folder / "through"))
    through, _ = bench.sums([rows])
    monkeypatch.setenv("RLHF_CACHE", str(bench.folder / "cache"))

    def signalled(asked):
        if len(asked.rows) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    bench.during = signalled
    with Interrupts() as bench.interrupts, pytest.raises(Interrupted) as stop:
        bench.sums([rows])
    assert (stop.value.exit_code, str(stop.value)) == (
        143,
        f"after part {number} of 5 of the reference's logprobs, which are kept",
    )
    assert len(bench.files()) == number
    bench.during, bench.interrupts = lambda asked: None, Interrupts()
    assert bench.sums([rows]) == (through, [2] * (5 - number))


def test_a_death_at_every_flush_costs_one_part_at_most(bench, monkeypatch):
    monkeypatch.setattr(cache, "PART", 2)
    rows = [answered((5, 6), (9, n)) for n in range(10, 16)]
    monkeypatch.setenv("RLHF_CACHE", str(bench.folder / "through"))
    flushes = Flushes()
    with flushes.counted():
        through, passes = bench.sums([rows])
    assert flushes.count == 2 * len(passes) == 6  # the file, and its name in the folder
    for after in (False, True):
        for fatal in range(1, 7):
            root = bench.folder / f"{after}-{fatal}"
            monkeypatch.setenv("RLHF_CACHE", str(root))
            with Flushes(fatal, after).counted(), pytest.raises(Killed):
                bench.sums([rows])
            made = len(list((root / "reference").glob("[!.]*")))
            assert made >= (fatal - 1) // 2
            again, passes = bench.sums([rows])
            assert (again, len(passes)) == (through, 3 - made)


def test_the_parts_are_shown_and_leave_no_step_behind(bench, monkeypatch):
    monkeypatch.setattr(cache, "PART", 2)
    bench.sums()
    progress = read_progress(bench.folder)
    assert (progress.label, progress.step, progress.total) == ("reference logprobs", 3, 3)
    assert bench.steps == [0]


def test_many_responses_are_asked_in_parts(bench, monkeypatch):
    whole, _ = bench.sums()
    monkeypatch.setattr(cache, "PART", 2)
    monkeypatch.setenv("RLHF_CACHE", str(bench.folder / "other"))
    parts, passes = bench.sums()
    assert passes == [2, 1, 2]
    for one, other in zip(parts, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
