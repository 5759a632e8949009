"""The page is whole, needs no network and does not run or hide what a model wrote."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made import comparison, samples, spent

from rlhf.recipe.base import Budget
from rlhf.report.frontier import frontier_point
from rlhf.report.html import write_html
from rlhf.report.samples import Samples
from rlhf.untrusted import visible

EVIL = (
    "<script>alert(1)</script> </script></td><img src=https://evil.example/x onerror=alert(2)> "
    "<a href='javascript:alert(3)'>x</a> <svg/onload=alert(4)> {{ 7*7 }} "
    "\x1b[2J\x1b]0;title\x07 safe\u202eelif\u2066 \u200b zero \ud800 lone \x00 nul & &amp;"
)


class Page(HTMLParser):
    """Everything with its attributes, the scripts, and the text of the sample cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.texts, self.open, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.open.append("text" if "text" in given.get("class", "").split() else tag)
        if tag == "script":
            self.scripts.append((given, ""))
        if self.open[-1] == "text":
            self.texts.append("")

    def handle_endtag(self, tag):
        if self.open:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open[-1] == "text":
            self.texts[-1] += data
        self.words.append(data if self.open[-1] not in ("script", "style") else "")


CURVES = {
    "ppo": [
        {"step": float(i), "time": 0.0, "reward": i / 9, "gold": 1.0, "kl": i / 3, "</script>x": 1.0} for i in range(9)
    ],
    "rm": [{"step": float(i), "loss": 1.0 / (i + 1)} for i in range(2000)],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    candidates = [samples("sft"), samples("ppo", gold=0.8, reward=1.0, kl=5.0), samples("dpo", gold=0.2, kl=2.0)]
    candidates[1] = spent(candidates[1], 1_234_567, 89, accuracy=0.75)
    marked = replace(candidates[1].samples[0], prompt=EVIL, response=EVIL)
    candidates[1] = replace(candidates[1], samples=Samples.of([marked, *candidates[1].samples[1:]]))
    fine = replace(marked, response="fine")
    candidates[0] = replace(candidates[0], samples=Samples.of([fine, *candidates[0].samples[1:]]))
    write_html(path, comparison(*candidates), CURVES, candidates, {"model <b>": EVIL, "recipe": "quickstart"})
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def test_untrusted_text_arrives_as_text_and_nothing_else(parsed):
    assert parsed.texts[0] == parsed.texts[2] == visible(EVIL)
    assert [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "link", "object", "embed", "base", "form")] == []
    assert all(not name.startswith("on") for _, given in parsed.tags for name in given)


def test_acting_characters_are_spelled_out(page, parsed):
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", own)
    for spelled in ("<U+001B>[2J", "safe<U+202E>elif<U+2066>", "<U+200B>", "<U+D800>", "<U+0000>", "{{ 7*7 }}"):
        assert spelled in parsed.texts[0]


def test_no_network_and_only_our_scripts(parsed):
    assert not [given for _, given in parsed.tags if {"src", "href", "srcset", "data", "action"} & set(given)]
    runnable = [body for given, body in parsed.scripts if given.get("type") != "application/json"]
    assert len(runnable) == 2
    assert "plotly.js" in runnable[0][:200]
    policy = next(g["content"] for _, g in parsed.tags if g.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    rule = re.search(r"script-src ([^;]*);", policy).group(1)
    hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in runnable]
    assert rule.split() == [f"'sha256-{digest}'" for digest in hashes]


def test_style_loads_nothing(page):
    style = re.search(r"<style>(.*?)</style>", page, flags=re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_every_section_is_there(parsed):
    text = " ".join("".join(parsed.words).split())
    assert "ppo wins by gold reward" in text
    headings = (
        "Candidates | Paired differences | Win rates, all against all | Findings | Reward against distance | "
        "Spread of single responses | Learning curves | Samples side by side | What each method spent | "
        "How this was measured"
    )
    for heading in headings.split(" | "):
        assert heading in text
    assert "1,234,567" in text
    assert "The recipe declares no budget" in text
    assert "one seed per method" in text
    assert "dpo minus ppo" in text
    assert "quickstart" in text
    assert "seed 5" in text


def test_plots_hold_the_points_their_intervals_and_the_path_of_training(parsed):
    plots = [json.loads(body) for given, body in parsed.scripts if given.get("type") == "application/json"]
    gold, reward = plots[:2]
    assert [trace["name"] for trace in gold["data"]] == ["ppo while training", "sft", "ppo", "dpo"]
    path, _, ppo, _ = gold["data"]
    assert path["x"] == [i / 3 for i in range(9)]
    assert ppo["x"] == pytest.approx([5.0])
    assert ppo["error_y"]["array"][0] > 0
    assert reward["data"][0]["y"] == [i / 9 for i in range(9)]
    assert len(plots) == 2 + 2 + 4 + 1
    long = plots[-1]["data"][0]
    assert len(long["x"]) <= 800
    assert long["x"][-1] == 1999


def test_plots_of_several_runs_have_their_checkpoints_and_a_band(tmp_path):
    runs = [samples(f"ppo@{seed}", gold=0.4 + seed / 10, reward=1.0, kl=5.0 + seed) for seed in (1, 2)]
    points = [frontier_point("ppo@1", samples("ppo@1", gold=0.2, kl=2.0).samples, 10)]
    curves = {
        f"ppo@{seed}": [{"step": float(i), "reward": i + seed, "kl": i / 3} for i in range(5 + seed)] for seed in (1, 2)
    }
    candidates = [samples("sft"), *runs]
    write_html(tmp_path / "report.html", comparison(*candidates, frontier=points), curves, candidates, {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    plots = [json.loads(body) for given, body in page.scripts if given.get("type") == "application/json"]
    gold, reward = plots[0], next(plot for plot in plots[4:] if len(plot["data"]) == 2)
    names = [trace["name"] for trace in gold["data"]]
    assert names == ["ppo@1 checkpoints", "ppo@2 checkpoints", "sft", "ppo"]
    assert gold["data"][0]["x"] == pytest.approx([2.0, 6.0])
    assert gold["data"][0]["customdata"] == ["step 10", "finished"]
    assert all(error > 0 for error in gold["data"][0]["error_y"]["array"])
    assert [trace["name"] for trace in plots[1]["data"]] == ["ppo@2 while training", *names]
    around, mean = reward["data"]
    assert mean["y"] == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 8.0]
    assert around["y"] == [1, 2, 3, 4, 5, 6, 8, 8, 7, 6, 5, 4, 3, 2]
    text = " ".join("".join(page.words).split())
    assert "2 seeds" in text
    assert "ppo@1 0.5" in text


def test_histograms_hold_every_response(parsed):
    plots = [json.loads(body) for given, body in parsed.scripts if given.get("type") == "application/json"]
    lengths, kls = plots[2:4]
    for plot in (lengths, kls):
        assert [trace["name"] for trace in plot["data"]] == ["sft", "ppo", "dpo"]
        for trace in plot["data"]:
            assert sum(trace["y"][:-2]) == pytest.approx(1)
    assert lengths["data"][0]["x"][0] == 19.5


def test_costs_stand_beside_the_budget_and_recipes_beside_each_other(tmp_path):
    candidates = [samples("sft", reward=None), spent(samples("ppo", gold=1.0, reward=None), 800, 40)]
    found = comparison(*candidates, budget=Budget(gradient_tokens=1000), reward_accuracy=0.875)
    recipes = {
        name: {"stages": [{"name": "ppo", "kind": "ppo", "kl_coef": coef}]} for name, coef in (("a", 1), ("<b>", 2))
    }
    environment = {"torch": "2.13.0"}
    write_html(tmp_path / "r.html", found, {}, candidates, {}, recipes=recipes, environment=environment)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.words).split())
    assert "Share of budget" in text
    assert "80%" in text
    assert "88% of the held-out pairs rightly" in text
    assert "stages.ppo.kl_coef 1 2" in text
    assert "<b>" in text
    assert "torch 2.13.0" in text
    assert "Reward model" not in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_samples_are_spread_over_the_prompts_not_picked(parsed):
    prompts = parsed.texts[4::4]
    assert prompts == [f"question {place}" for place in range(1, 24)]
    cards = [given for tag, given in parsed.tags if tag == "article"]
    answers = [given for _, given in parsed.tags if given.get("class") == "answer"]
    assert len(cards) == 24
    assert [given["data-name"] for given in answers[:3]] == ["sft", "ppo", "dpo"]


def test_one_prompt_one_candidate_and_no_curves_still_make_a_page(tmp_path):
    only = samples("sft", prompts=1)
    write_html(tmp_path / "report.html", comparison(only), {}, [only], {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No winner" in text
    assert "[unknown]" in text
    assert "Learning curves" not in text


def test_visible_keeps_languages_and_emoji_and_says_what_it_cut():
    kept = "na\u00efve \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f468\u200d\U0001f469 a\tb\nc"
    assert visible(kept) == kept
    assert visible("abcdef", limit=4) == "abcd ... (2 more characters)"
    assert visible("\x1b[31m\r\u2028\ue000") == "<U+001B>[31m<U+000D><U+2028><U+E000>"
