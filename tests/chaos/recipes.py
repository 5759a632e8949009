"""Recipes broken in every way a person or a disk breaks them, checked by the real `rlhf validate`."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner, Result

from rlhf.cli import main
from rlhf.command import MAX_LINES
from tests.chaos.row import Row, only

COUNT = 10_000
SLOW_S = 2.0
TYPO_SHARE = 0.2
HINTED = 0.95
SHIPPED = Path(__file__).parents[2] / "recipes"
CANARY = "executed"

KEY = re.compile(r"(?<![\w./\"'])([a-z_]+)(?=:(?: |$))")
VALUE = re.compile(r"(?<=: )[^\s{}\[\],&*][^{}\[\],\n]*")
REFERENCE = re.compile(r"(?<=(?:init|licy|tage|line|airs): )[a-z_]+")
CHECKPOINTS = re.compile(r"(?<=^checkpoints: )\{.*\}$", re.MULTILINE)
"""Keys that the recipe is free to choose."""
KIND = re.compile(r"(?<=kind: )[a-z_]+")
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
VALUES = (
    "[1, 2]", "{a: 1}", "{}", "[]", "text", "true", "no", "null", "~", "", "''", "0", "-1", "1.5", "-0.0", ".nan",
    ".inf", "-.inf", "1e400", "1e-400", "9" * 30, "0x" + "f" * 40, "9" * 5000, "2024-01-01", "12:30:45", "0o17",
    "1_000",
    "|\n  block", ">-\n  folded", '"\\ud800"', '"\\x00"', '"\\u202e"', "\U0001f600", "'unclosed", '"unclosed',
    "[unclosed", "{unclosed", "*nobody", "&again", "&self [*self]", "!!str 3", "!!binary aGk=", "!!set {a, b}",
    "!!omap [a: 1]",
    "!unknown x", "!!python/name:os.system", f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/new:subprocess.check_output [['touch', '{CANARY}']]", "/etc/passwd", "../../../etc/passwd", "~/x",
    "a\x00b", "http://u:p@h/", "gguf://", "gguf://os/../x", "scheme://", "x" * 100_000, "@at", "`tick", "%percent",
    "a: b", "- dash", "? ask", "<<", "=", "!!null", "!!float x", "!!int ten", "!!bool maybe", "!!timestamp x",
    "!<tag:x> y",
)  # fmt: skip
TAILS = (
    "\t- tab\n", "---\nname: second\n", "...\nafter\n", "%YAML 9.9\n---\n", "? [complex, key]\n: 1\n", "{a: 1}: 2\n",
    "1: one\n", "null: x\n", "<<: {seed: 3}\n", "<<: [{seed: 3}, {seed: 4}]\n", "<<: 3\n", "<<: *nobody\n",
    "x: &x {<<: *x}\n", "deep: " + "[" * 200 + "]" * 200 + "\n", "deep: " + "[" * 5000 + "\n",
    "deep: " + "{a: " * 3000 + "\n",
    "".join(" " * depth + "a:\n" for depth in range(300)), "\ufeff", "\u2028", "\x07", "\x85", "# only a comment",
    "\n" * 1000,
    "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "m0: &m0 {a: 1}\n"
    + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 12)),
    "".join(f"key{n}: 1\n" for n in range(2000)), "extends: mutant.yaml\n", "extends: /dev/null\n", "extends: .\n",
)  # fmt: skip

Mutation = Callable[[str, random.Random], str | bytes]


def run(count: int, rng: random.Random) -> Row:
    """Break `count` recipes, one in five by a typo in one key, and run `rlhf validate` on each."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(SHIPPED, Path(name) / "recipes"))
        recipes = sorted(folder.rglob("*.yaml"))
        texts = {path: path.read_text() for path in recipes}
        _validated(recipes[0])  # imports are not what is timed
        for _ in range(count):
            path = rng.choice(recipes)
            right, broken = _broken(texts[path], rng)
            mutant = path.with_name("mutant.yaml")
            mutant.write_bytes(broken if isinstance(broken, bytes) else broken.encode(errors="surrogatepass"))
            result, seconds = _validated(mutant)
            seen.update(_verdict(result, seconds))
            if right:
                seen["single typos"] += 1
                seen["hint right"] += f"(did you mean {right}?)" in result.stderr
        executed = sum(1 for _ in folder.rglob(CANARY)) + Path(CANARY).exists()
    counts = {"injected": count} | {what: seen[what] for what in ("exit 0", "exit 2", "single typos", "hint right")}
    wrong = {what: seen[what] for what in ("tracebacks", "hangs", "other exits", "over 6 lines")} | {
        "executed": executed
    }
    return Row(
        "mutated recipes",
        "0 tracebacks, 0 hangs, exit 0 or 2; hint right for 95 % of single typos",
        counts | wrong,
        not any(wrong.values()) and seen["hint right"] >= HINTED * seen["single typos"],
    )


def _broken(text: str, rng: random.Random) -> tuple[str, str | bytes]:
    """Return the key that a typo was made in, or nothing, and the broken recipe."""
    if rng.random() < TYPO_SHARE:
        return typo(text, rng)
    broken: str | bytes = text
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if isinstance(broken, str):
            broken = rng.choice(MUTATIONS)(broken, rng)
    return "", broken


def typo(text: str, rng: random.Random) -> tuple[str, str]:
    """Return a key of the schema and the recipe in which one of its letters is wrong."""
    commentless = re.sub(r"#.*", lambda found: " " * len(found[0]), text)
    named = [name.span() for name in CHECKPOINTS.finditer(commentless)]
    keys = [key for key in KEY.finditer(commentless) if not any(a <= key.start() < b for a, b in named)]
    key = rng.choice(keys)
    return key[0], text[: key.start()] + _misspelt(key[0], rng) + text[key.end() :]


def _misspelt(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    letter = rng.choice(LETTERS)
    ways = [word[:at] + letter + word[at:], word[:at] + word[at] + word[at:], word[: at + 1] + letter + word[at + 1 :]]
    if len(word) > 1:
        ways += [word[:at] + word[at + 1 :], word[:at] + letter + word[at + 1 :]]
        ways += [word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]] if at else []
    return rng.choice([way for way in ways if way != word] or [word + letter])


def _validated(path: Path) -> tuple[Result, float]:
    began = time.monotonic()
    with _alarm(10 * SLOW_S):
        result = CliRunner().invoke(main, ["validate", str(path)])
    return result, time.monotonic() - began


def _verdict(result: Result, seconds: float) -> Iterator[str]:
    said = result.stdout + result.stderr
    raised = result.exception is not None and not isinstance(result.exception, SystemExit)
    if raised or "Traceback" in said or said.startswith("error: unexpected "):
        yield "tracebacks"
    if seconds > SLOW_S:
        yield "hangs"
    yield f"exit {result.exit_code}" if result.exit_code in (0, 2) else "other exits"
    if len(result.stderr.splitlines()) > MAX_LINES or (
        result.exit_code == 2 and not result.stderr.startswith("error: ")
    ):
        yield "over 6 lines"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so long, and then give the timer back to whoever had it."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def _matched(pattern: re.Pattern[str], new: Callable[[re.Match[str], random.Random], str]) -> Mutation:
    """Return what replaces one random match of `pattern`."""

    def mutate(text: str, rng: random.Random) -> str:
        found = list(pattern.finditer(text))
        if not found:
            return text[: len(text) // 2]
        at = rng.choice(found)
        return text[: at.start()] + new(at, rng) + text[at.end() :]

    return mutate


def _lines(change: Callable[[list[str], int, random.Random], None]) -> Mutation:
    """Return what changes the lines of a recipe at a random one."""

    def mutate(text: str, rng: random.Random) -> str:
        lines = text.splitlines(keepends=True) or ["\n"]
        change(lines, rng.randrange(len(lines)), rng)
        return "".join(lines)

    return mutate


def _delete(lines: list[str], at: int, rng: random.Random) -> None:
    del lines[at]


def _swap(lines: list[str], at: int, rng: random.Random) -> None:
    other = rng.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


def _twice(lines: list[str], at: int, rng: random.Random) -> None:
    lines.insert(rng.randrange(len(lines)), lines[at])


def _indent(lines: list[str], at: int, rng: random.Random) -> None:
    spaces = rng.choice((" ", "  ", "   ", "\t", "\u00a0", None))
    lines[at] = lines[at][rng.randint(1, 2) :] if spaces is None else spaces + lines[at]


def _join(lines: list[str], at: int, rng: random.Random) -> None:
    lines[at] = lines[at].rstrip("\n")


def _bytes(text: str, rng: random.Random) -> bytes:
    raw = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(rng.choice((1, 3, 30))):
        raw.insert(rng.randrange(len(raw) + 1), rng.choice((0, 9, 255, 0xC3, 0x1B, rng.randrange(256))))
    return bytes(raw)


def _character(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return (
        text[:at]
        + rng.choice("\x00\x1b\u202e\u00e9\u4e16\U0001f600\ud800\ufeff\u2028:#{}[]&*!|>'\"%@`,?- \t\n\r\\")
        + text[at:]
    )


MUTATIONS: tuple[Mutation, ...] = (
    _matched(VALUE, lambda at, rng: rng.choice(VALUES)),
    _matched(VALUE, lambda at, rng: rng.choice(VALUES)),
    _matched(VALUE, lambda at, rng: rng.choice(("-", "1e9", "0.", '"')) + at[0]),
    _matched(
        KEY, lambda at, rng: rng.choice(("zzz", "Name", "NAME", "'", '"a\\nb"', "?", "<<", "kind", "__class__", "1"))
    ),
    _matched(REFERENCE, lambda at, rng: rng.choice(("nobody", "base", "duel", "rm", "pairs", at[0][::-1]))),
    _matched(
        KIND, lambda at, rng: rng.choice(("pppo", "Sft", "compare", "dpo", "http", "model", "llm", "annotate", "''"))
    ),
    *map(_lines, (_delete, _swap, _twice, _indent, _indent, _join)),
    _bytes,
    _character,
    _character,
    lambda text, rng: text[: rng.randrange(len(text) + 1)],
    lambda text, rng: (
        text.encode(errors="surrogatepass")[: rng.randrange(len(text) + 1)] + bytes([rng.randrange(128, 256)])
    ),
    lambda text, rng: text + rng.choice(TAILS),
    lambda text, rng: rng.choice(TAILS) + text,
    lambda text, rng: rng.choice(("", " \n", "# nothing\n", "null", "[]", "3", "---", text * 2)),
    lambda text, rng: text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")), errors="replace"),
    lambda text, rng: text.replace("\n", rng.choice(("\r\n", "\r", "\x85", " ", "\n\n"))),
)


if __name__ == "__main__":
    only(run, COUNT)
