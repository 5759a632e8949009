"""`rlhf chat`: histories, commands, two models side by side, and text that cannot act."""

from __future__ import annotations

from click.testing import CliRunner
from rich.console import Console

from rlhf.cli import main
from rlhf.errors import DataError
from rlhf.serving.chat import Chat
from rlhf.serving.talk import LocalTalker, Style


class Echo:
    """A talker that says how often it was asked, and with what."""

    def __init__(self, name="echo", ending=""):
        self.name = name
        self.ending = ending
        self.seen = []

    def reply(self, messages, style):
        self.seen.append([dict(one) for one in messages])
        if messages[-1]["content"] == "too long":
            raise DataError("the conversation is too long")
        yield f"{self.name} answer "
        yield f"{sum(one['role'] == 'user' for one in messages)}{self.ending}"


def talk(talkers, lines, width=80):
    console = Console(record=True, width=width, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    Chat(talkers, Style(), console).run(lines)
    return console.export_text()


def test_each_model_keeps_its_own_history():
    one, other = Echo("one"), Echo("two")
    said = talk([one, other], ["first\n", "\n", "second\n"])
    assert [turn["content"] for turn in other.seen[1]] == ["first", "two answer 1", "second"]
    assert [turn["content"] for turn in one.seen[1]] == ["first", "one answer 1", "second"]
    assert "one answer 2" in said


def test_two_answers_stand_side_by_side():
    said = talk([Echo("one"), Echo("two")], ["hello"])
    assert any("one answer 1" in line and "two answer 1" in line for line in said.splitlines())


def test_reset_quit_and_unknown_commands():
    echo = Echo()
    said = talk([echo], ["a", "/reset", "b", "/nope", "/quit", "never"])
    assert [len(messages) for messages in echo.seen] == [1, 1]
    assert "the conversation begins anew" in said
    assert "no such command; /reset begins anew, /quit ends" in said
    assert "never" not in said


def test_a_question_that_fails_is_not_remembered():
    echo = Echo()
    said = talk([echo], ["a", "too long", "b"])
    assert "the conversation is too long" in said
    assert [turn["content"] for turn in echo.seen[-1]] == ["a", "echo answer 1", "b"]


def test_what_a_model_says_cannot_act(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "longsecretvalue")
    evil = Echo(ending="\x1b[2J\u202e[bold]x[/bold] longsecretvalue")
    for talkers in ([evil], [evil, Echo("two")]):
        said = talk(talkers, ["hello"], width=160)
        assert "\x1b" not in said
        assert "<U+001B>[2J<U+202E>[bold]x[/bold] ***" in said


def test_a_stage_answers_piped_lines_the_same_each_time(run):
    def ask(*options):
        return CliRunner().invoke(
            main, ["chat", str(run / "sft"), "--max-tokens", "8", *options], input="Say cab.\n/reset\nSay cab.\n"
        )

    greedy = ask("--temperature", "0")
    assert greedy.exit_code == 0, greedy.output
    first, middle, second = greedy.output.partition("the conversation begins anew\n")
    assert middle
    assert first == second
    drawn = [ask("--seed", seed, "--temperature", "3").output for seed in ("3", "3", "4")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_full_conversation_says_how_to_go_on(run):
    done = CliRunner().invoke(main, ["chat", str(run / "sft"), "--max-tokens", "500"], input="Say cab. Say cab.\n")
    assert done.exit_code == 0
    assert "exceeds the 512 of sft: /reset, or a lower" in " ".join(done.output.split())


def test_greedy_answers_are_those_of_the_rollout_engine(run):
    from rlhf.engines.base import RolloutSpec
    from rlhf.engines.hf_generate import TransformersEngine
    from rlhf.recipe.role_schema import RolloutRole
    from rlhf.types import Prompt, Sampling

    folder = run / "stages" / "dpo" / "model"
    engine = TransformersEngine(RolloutSpec(folder, "float32", RolloutRole(), max_length=128, threads=1, seed=0))
    messages = [{"role": "user", "content": "Name vow"}]
    prompt = Prompt("0", tuple(engine.tokenizer.prompt_ids(messages)), "")
    theirs = engine.generate([prompt], Sampling(12, 0.0), [[0]])[0].text
    assert "".join(LocalTalker("dpo", folder).reply(messages, Style(0, 12))) == theirs


def test_mistakes_are_said_in_a_line(run):
    def chat(*arguments):
        return CliRunner().invoke(main, ["chat", *map(str, arguments)], input="hi\n")

    assert "name a stage, such as" in chat().output
    assert "3 models: one, or two side by side" in chat("a", "b", "c").output
    gone = chat("--url", "http://127.0.0.1:9")
    assert gone.exit_code == 2
    assert "is `rlhf serve` running there?" in gone.output
