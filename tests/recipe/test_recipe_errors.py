"""Bad recipes: the exact line a user reads, position included."""

import time
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.load import load_recipe


def message(folder, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        folder.load(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "    steps: 3",
            "    setps: 3\n    steps: 3",
            "recipe.yaml:21:5: stages.ppo.setps: unknown key (did you mean steps?)",
        ),
        ("    init: sft", "    zzz: 1", "recipe.yaml:14:5: stages.rm.zzz: unknown key"),
        (
            "prompts.jsonl}\n    judge",
            "prompts.jsonl, limitt: 2}\n    judge",
            "recipe.yaml:10:41: stages.pairs.prompts.limitt: unknown key (did you mean limit?)",
        ),
        ("steps: 3", "steps: thirty", "recipe.yaml:21:12: stages.ppo.steps: must be a whole number, got 'thirty'"),
        ("steps: 3", "steps: 0", "recipe.yaml:21:12: stages.ppo.steps: must be greater than 0, got 0"),
        ("steps: 3", 'steps: "3"', "recipe.yaml:21:12: stages.ppo.steps: must be a whole number, got '3'"),
        ("steps: 3", "steps: true", "recipe.yaml:21:12: stages.ppo.steps: must be a whole number, got true"),
        ("steps: 3", "steps:", "recipe.yaml:21:5: stages.ppo.steps: must be a whole number, got null"),
        ("    steps: 3\n", "", "recipe.yaml:16:5: stages.ppo.steps: required but missing"),
        (
            "kind: reward",
            "kind: rewrad",
            "recipe.yaml:13:11: stages.rm.kind: must be one of 'sft', 'classify', 'synthesize', 'annotate', 'reward', "
            "'ppo', 'grpo', 'dr_grpo', 'rloo', 'reinforce_pp', 'online_dpo', 'dpo', 'robust_dpo', 'ipo', 'hinge', "
            "'simpo', 'orpo', 'kto', 'compare', got 'rewrad' (did you mean reward?)",
        ),
        ("    kind: reward\n", "", "recipe.yaml:12:5: stages.rm.kind: required but missing"),
        (
            "dtype: float32",
            "dtype: float16",
            "recipe.yaml:2:38: model.dtype: must be 'auto', 'bfloat16' or 'float32', got 'float16'"
            " (did you mean bfloat16?)",
        ),
        (
            "name: trial",
            "name: trial\ntuning: full",
            "recipe.yaml:2:9: tuning: must be a mapping of keys, got 'full' (write {kind: full})",
        ),
        (
            "name: trial",
            "name: trial\ntuning: {kind: loar}",
            "recipe.yaml:2:16: tuning.kind: must be one of 'full', 'lora', 'qlora', 'ia3', 'llama_adapter', "
            "'prefix_tuning', 'prompt_tuning', 'p_tuning', 'bitfit', 'layers', got 'loar' (did you mean lora?)",
        ),
        (
            "name: trial",
            "name: trial\nlora: {r: 4}",
            "recipe.yaml:2:1: lora: unknown key (write tuning: {kind: lora, r: 8})",
        ),
        (
            "steps: 3",
            "steps: 3\n    critic_lora: full",
            "recipe.yaml:22:5: stages.ppo.critic_lora: unknown key (write critic_tuning: {kind: full})",
        ),
        (
            "name: trial",
            "name: trial\ntuning: {kind: lora, rr: 1}",
            "recipe.yaml:2:22: tuning.rr: unknown key (did you mean r?)",
        ),
        (
            "name: trial",
            "name: trial\ntuning: {kind: lora, r: 0}",
            "recipe.yaml:2:25: tuning.r: must be greater than 0, got 0",
        ),
        (
            "name: trial",
            "name: trial\ntuning: {kind: lora, target_modules: 3}",
            "recipe.yaml:2:38: tuning.target_modules: must be 'all-linear' or a list, got 3",
        ),
        (
            "name: trial",
            "name: trial\ntuning: {kind: lora, target_modules: [q, 3]}",
            "recipe.yaml:2:42: tuning.target_modules[1]: must be text, got 3",
        ),
        (
            "name: sft\n    kind: sft",
            "name: SFT 1\n    kind: sft",
            "recipe.yaml:4:11: stages.SFT 1.name: must be lower-case letters, digits, - and _, "
            "starting with a letter, got 'SFT 1'",
        ),
        (
            'path: "rewards.py:score"}\n  - name: rm',
            "path: rewards.py}\n  - name: rm",
            "recipe.yaml:11:35: stages.pairs.judge.path: must be file.py:function, relative to the "
            "recipe, got 'rewards.py'",
        ),
        (
            "prompts: {path: data/heldout.jsonl}",
            "prompts: {stage: pairs}",
            "recipe.yaml:33:15: stages.duel.prompts.stage: not possible here, use one of 'path', 'hub'",
        ),
        (
            "candidates: [sft, ppo, dpo]",
            "candidates: [sft]",
            'recipe.yaml:31:17: stages.duel.candidates: must be a list of 2 or more, got ["sft"]',
        ),
        ("name: trial\n", "", "recipe.yaml:1:1: name: required but missing"),
        ("data/sft.jsonl", "data/stf.jsonl", "recipe.yaml:6:18: stages.sft.data.path: file not found: data/stf.jsonl"),
        ("data/sft.jsonl", "data", "recipe.yaml:6:18: stages.sft.data.path: a folder, not a file: data"),
        (
            'path: "rewards.py:score"}\n  - name: rm',
            'path: "rewrads.py:score"}\n  - name: rm',
            "recipe.yaml:11:35: stages.pairs.judge.path: file not found: rewrads.py",
        ),
        ('"tiny://llama"', "./model", "recipe.yaml:2:15: model.path: folder not found: ./model"),
        (
            '"tiny://llama"',
            "hub/id, chat_template: t.jinja",
            "recipe.yaml:2:38: model.chat_template: file not found: t.jinja",
        ),
    ],
)
def test_schema_errors(folder, text, old, new, expected):
    assert old in text
    assert message(folder, text.replace(old, new, 1)) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kind: reward", "kid: reward", "recipe.yaml:13:5: stages.rm.kid: unknown key (did you mean kind?)"),
        ("{kind: model", "{kidn: model", "recipe.yaml:19:14: stages.ppo.reward.kidn: unknown key (did you mean kind?)"),
        ("data: {stage", "data: {stgae", "recipe.yaml:15:12: stages.rm.data.stgae: unknown key (did you mean stage?)"),
        ("name: trial\n", "name: trial\nextend: x\n", "recipe.yaml:2:1: extend: unknown key (did you mean extends?)"),
    ],
)
def test_a_typo_in_a_key_that_chooses_between_sections_has_a_hint(folder, text, old, new, expected):
    assert expected in message(folder, text.replace(old, new, 1)).splitlines()


def test_a_mistake_in_an_anchor_is_said_once(folder, text):
    shared = text.replace("data: {stage: pairs}", "data: &d {stage: pairs, stpe: 1}", 1)
    shared = shared.replace("data: {stage: pairs}", "data: *d")
    assert message(folder, shared) == "recipe.yaml:15:29: stages.rm.data.stpe: unknown key (did you mean stage?)"


def test_several_problems_come_in_the_order_of_the_file(folder, text):
    text = text.replace("steps: 3", "steps: -3").replace("init: sft", "intt: sft").replace("name: trial", "name: 5")
    assert message(folder, text).splitlines() == [
        "recipe.yaml:1:7: name: must be text, got 5",
        "recipe.yaml:14:5: stages.rm.intt: unknown key (did you mean init?)",
        "recipe.yaml:21:12: stages.ppo.steps: must be greater than 0, got -3",
    ]


def test_at_most_six_lines(folder, text):
    bad = "".join(f"key{n}: 1\n" for n in range(6))
    assert len(message(folder, bad + text).splitlines()) == 6
    lines = message(folder, bad + "key6: 1\nkey7: 1\n" + text).splitlines()
    assert len(lines) == 6
    assert lines[4] == "recipe.yaml:5:1: key4: unknown key"
    assert lines[5] == "and 3 more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1:1: the recipe is empty"),
        ("# only a comment\n", "recipe.yaml:1:1: the recipe is empty"),
        ("- a\n- b\n", "recipe.yaml:1:1: a recipe must be a mapping of keys"),
        ("just words", "recipe.yaml:1:1: a recipe must be a mapping of keys"),
        ("name: a\nseed: 1\nseed: 2\n", 'recipe.yaml:3:1: not valid YAML: found duplicate key "seed"'),
        ("name: a: b\n", "recipe.yaml:1:8: not valid YAML: mapping values are not allowed here"),
        ("name: [a\nb: 1\n", "recipe.yaml:2:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("name: *x\n", "recipe.yaml:1:7: not valid YAML: found undefined alias 'x'"),
        ("a: 1\n---\nb: 1\n", "recipe.yaml:2:1: not valid YAML: but found another document"),
        ("name: a\x07b\n", "recipe.yaml:1:8: not valid YAML: character U+0007"),
        (
            "name: 2024-01-01\n",
            "recipe.yaml:1:7: only text, numbers, true, false and null are allowed; quote this value",
        ),
        (
            "name: !!python/name:os.system x\n",
            "recipe.yaml:1:7: only text, numbers, true, false and null are allowed; quote this value",
        ),
        ("name: a\nseed: .inf\n", "recipe.yaml:2:7: numbers must be finite and below 2**63"),
        ("name: a\nseed: 1e999\n", "recipe.yaml:2:7: numbers must be finite and below 2**63"),
        ("name: a\nseed: .nan\n", "recipe.yaml:2:7: numbers must be finite and below 2**63"),
        ("name: a\nseed: 0x" + "f" * 5000, "recipe.yaml:2:7: numbers must be finite and below 2**63"),
        ('name: "\\ud800"\n', "recipe.yaml:1:7: half of a surrogate pair is no character"),
        ("%YAML 9.9\n---\nname: a\n", "recipe.yaml:1:1: a recipe needs no % directives"),
        ("name: a\n%YAML 9.9\n---\n", "recipe.yaml:2:1: a recipe needs no % directives"),
        ("%TAG ! tag:x,2000:\n---\nname: a\n", "recipe.yaml:1:1: a recipe needs no % directives"),
        ('extends: "a\\0b"\n', "recipe.yaml:1:10: text must not hold the character U+0000"),
        ("name: a\n1: b\n", "recipe.yaml:2:1: keys must be text, got 1"),
        ("a: " + "[" * 60 + "]" * 60, "recipe.yaml:1:53: nested deeper than 50 levels"),
    ],
)
def test_not_a_recipe(folder, text, expected):
    assert message(folder, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deep: " + "[" * 60_000, "recipe.yaml:1:56: nested deeper than 50 levels"),
        ("deep: " + "{a: " * 30_000, "recipe.yaml:1:200: nested deeper than 50 levels"),
        ("- " * 60_000, "recipe.yaml:1:101: nested deeper than 50 levels"),
        ("? " * 60_000, "recipe.yaml:1:101: nested deeper than 50 levels"),
        ("".join(" " * depth + "a:\n" for depth in range(400)), "recipe.yaml:50:50: nested deeper than 50 levels"),
    ],
)
def test_what_would_take_very_long_to_read_is_refused_at_once(folder, text, expected):
    began = time.process_time()
    assert message(folder, text) == expected
    assert time.process_time() - began < 1


def test_alias_bombs_are_refused(folder):
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    assert message(folder, bomb) == "recipe.yaml:4:45: with its aliases more than 10000 keys and values"
    merges = "b: &b {" + ", ".join(f"k{n}: 1" for n in range(200)) + "}\n"
    merges += "".join(f"c{n}: {{<<: *b}}\n" for n in range(5000))
    began = time.process_time()
    assert message(folder, merges) == "recipe.yaml:25:11: with its aliases more than 10000 keys and values"
    assert time.process_time() - began < 1
    chain = "a0: &a0 {b: 1}\n" + "".join(f"a{n}: &a{n} {{b: *a{n - 1}}}\n" for n in range(1, 60))
    assert message(folder, chain) == "recipe.yaml:1:10: nested deeper than 50 levels"


@pytest.mark.parametrize("ring", ["tuning: &l {r: *l}\n", "tuning: &l {<<: *l}\n"])
def test_an_alias_inside_its_own_anchor_is_refused(folder, text, ring):
    column = ring.index("*") + 1
    assert message(folder, text + ring) == f"recipe.yaml:36:{column}: *l stands inside of what it repeats"


@pytest.mark.parametrize("value", ["!!bool maybe", "!!binary aGk=", "!!set {a}", "!mine x", "!!omap [a: 1]"])
def test_tags_are_refused(folder, text, value):
    plain = "only text, numbers, true, false and null are allowed; quote this value"
    assert message(folder, text + f"tuning: {value}\n") == f"recipe.yaml:36:9: {plain}"


def test_line_breaks_in_a_key_stay_on_one_line(folder, text):
    assert message(folder, text + '"a\\nb": 1\n') == "recipe.yaml:36:1: a b: unknown key"


def test_non_utf8_has_its_position(folder):
    Path("recipe.yaml").write_bytes(b"name: a\nseed: \xff\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipe.yaml"))
    assert str(caught.value) == "recipe.yaml:2:7: not UTF-8 text (byte 0xff)"


def test_missing_folder_and_oversized_recipe(folder):
    for path, expected in [
        ("no.yaml", "no.yaml: recipe not found"),
        ("data", "data: cannot read the recipe: Is a directory"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(path))
        assert str(caught.value) == expected
    folder.write("big.yaml", "# " + "x" * (128 << 10))
    with pytest.raises(RecipeError, match=r"^big.yaml: larger than 128 KiB"):
        load_recipe(Path("big.yaml"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.ppo.clip_rnge=0.3", "--set stages.ppo.clip_rnge: unknown key (did you mean clip_range?)"),
        ("stages.ppo.steps=many", "--set stages.ppo.steps: must be a whole number, got 'many'"),
        ("stages.poo.steps=3", "--set stages.poo.steps: no stage is named 'poo' (did you mean ppo?)"),
        ("stages.3.steps=3", "--set stages.3.steps: no stage is named '3'"),
        ("sed=3", "--set sed: unknown key (did you mean seed?)"),
        ("roles.policy.gpu=1", "--set roles.policy.gpu: unknown key (did you mean gpus?)"),
        ("name.x=1", "--set name.x: 'x' cannot be set inside the value 'trial'"),
        ("stages.duel.candidates.0=sft", "--set stages.duel.candidates.0: a list is set as a whole: [a, b]"),
        ("stages.sft.data.path=no.jsonl", "--set stages.sft.data.path: file not found: no.jsonl"),
        (
            "stages.ppo.policy=rm",
            "--set stages.ppo.policy: 'rm' is a stage of kind reward, but a language model is needed here "
            "(there are base, sft)",
        ),
        ("seed", "--set seed: must look like stages.ppo.kl_coef=0.05"),
        ("=3", "--set =3: must look like stages.ppo.kl_coef=0.05"),
        ("a..b=3", "--set a..b=3: must look like stages.ppo.kl_coef=0.05"),
        ("seed=[1", "--set seed: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed=", "--set seed: must be a whole number, got null"),
    ],
)
def test_bad_overrides(folder, text, override, expected):
    assert message(folder, text, override) == expected


def test_extends_problems(folder, text):
    folder.write("base.yaml", text.replace("steps: 3", "stesp: 3"))
    expected = "base.yaml:21:5: stages.ppo.stesp: unknown key (did you mean steps?)"
    assert message(folder, "extends: base.yaml\nstages: [{name: ppo, steps: 2}]\n") == expected
    assert message(folder, "extends: no.yaml\n") == "recipe.yaml:1:10: extends: file not found: no.yaml"
    expected = "recipe.yaml:1:10: extends: must be the name of one recipe file, got ['a']"
    assert message(folder, "extends: [a]\n") == expected


def test_extends_cycles_are_refused(folder):
    folder.write("a.yaml", "extends: sub/b.yaml\n")
    folder.write("sub/b.yaml", "extends: ../recipe.yaml\n")
    expected = "sub/b.yaml:1:10: extends: ../recipe.yaml extends this recipe again, a cycle"
    assert message(folder, "extends: a.yaml\n") == expected
    assert message(folder, "extends: recipe.yaml\n").endswith("recipe.yaml extends this recipe again, a cycle")
