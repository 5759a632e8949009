"""The page in a real Chromium: it draws, filters, prints, and runs nothing that a model wrote."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import BINARY, Browser, chromium
from made import comparison, samples, spent

from rlhf.report.html import write_html
from rlhf.report.samples import Samples

pytestmark = pytest.mark.browser

ATTACKS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    '<a href="javascript:window.hacked = 3">press</a>',
    "<svg onload='window.hacked = 4'>",
    "</div></article><iframe srcdoc='<script>parent.hacked = 5</script>'></iframe>",
    "\"><input autofocus onfocus='window.hacked = 6'>",
    "</script><script>window.hacked = 7</script>",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    found = [samples("sft"), *(samples(f"ppo@{seed}", gold=0.5, reward=1.0, kl=4.0) for seed in (1, 2))]
    found += [spent(samples("dpo", gold=0.2, kl=2.0), 1000)]
    for place, attack in enumerate(ATTACKS):
        found = [
            replace(
                item,
                samples=Samples.of(
                    replace(sample, response=attack, prompt=attack + sample.prompt) if turn == place else sample
                    for turn, sample in enumerate(item.samples)
                ),
            )
            for item in found
        ]
    curves = {
        f"ppo@{seed}": [{"step": float(i), "reward": i / 9 + seed, "kl": i / 3} for i in range(20)] for seed in (1, 2)
    }
    evil = {"</script><script>window.hacked = 8</script>": 1.0}
    curves["dpo"] = [{"step": float(i), "loss": 1.0, **evil} for i in range(20)]
    facts = {attack: attack for attack in ATTACKS}
    write_html(path, comparison(*found), curves, found, facts, environment=facts)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BINARY
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def shown(browser: Browser, what: str = ".card") -> list[str]:
    """Return the texts of what is to be seen, in the order of the page."""
    code = f"[...document.querySelectorAll('#cards {what}')].filter(n => n.offsetParent).map(n => n.textContent)"
    return browser.evaluate(code)


def choose(browser: Browser, field: str, value: str) -> None:
    """Set a field as a person would and let the page hear of it."""
    event = "input" if field == "search" else "change"
    node = f"document.getElementById('{field}')"
    browser.evaluate(f"{node}.value = {value!r}; {node}.dispatchEvent(new Event('{event}'))")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_it_draws_and_fits_in_any_width_and_light(browser, report, tmp_path, width, dark):
    browser.open(report, width=width, dark=dark, mobile=width < 600)
    for place in range(browser.evaluate("document.querySelectorAll('.plot').length")):
        browser.evaluate(f"document.querySelectorAll('.plot')[{place}].scrollIntoView()")
        browser.until(f"document.querySelectorAll('.plot')[{place}].querySelector('.main-svg')")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.querySelectorAll('.plot path.js-line')].length") >= 5
    red, green, blue = map(int, re.findall(r"\d+", browser.evaluate("getComputedStyle(document.body).color"))[:3])
    assert (red + green + blue > 600) == dark
    ink = browser.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert ink == ("rgb(154, 163, 178)" if dark else "rgb(93, 102, 117)")
    assert len(browser.screenshot(tmp_path / "page.png")) > 20_000
    assert browser.seen("Runtime.exceptionThrown") == []


def test_nothing_that_a_model_wrote_runs_and_nothing_is_fetched(browser, report):
    browser.open(report, width=1200)
    while not browser.evaluate("document.getElementById('more').hidden"):
        browser.evaluate("document.getElementById('more').click()")
    for attack in ATTACKS:
        assert any(attack in text for text in shown(browser))
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, iframe, a, [onerror], [onload], [onfocus]').length") == 0
    urls = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.seen("Log.entryAdded") == []


def test_the_policy_stops_a_script_that_got_in_anyway(browser, report):
    browser.open(report, width=1200)
    code = "document.getElementById('cards').innerHTML = `<img src=x onerror='window.hacked = 9'>`"
    browser.evaluate(f"{code}; new Promise(done => setTimeout(done, 300))")
    browser.evaluate(
        "s = document.createElement('script'), s.textContent = 'window.hacked = 10', document.body.append(s)"
    )
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in event["entry"]["text"] for event in browser.seen("Log.entryAdded"))


def test_the_browser_of_samples_searches_filters_sorts_and_shows_more(browser, report):
    browser.open(report, width=1200)
    assert len(shown(browser)) == 12
    assert browser.evaluate("document.getElementById('found').textContent") == "24 of 24 prompts"
    browser.evaluate("document.getElementById('more').click()")
    assert len(shown(browser)) == 24
    assert browser.evaluate("document.getElementById('more').hidden")
    choose(browser, "search", "QUESTION 2")
    assert len(shown(browser)) == 5  # 2, 20, 21, 22 and 23
    choose(browser, "search", "of ppo@1")
    assert len(shown(browser)) == 12
    assert browser.evaluate("document.getElementById('found').textContent") == "17 of 24 prompts"
    choose(browser, "who", "dpo")
    assert shown(browser) == []
    choose(browser, "search", "")
    assert len(shown(browser, ".answer")) == 12
    assert all(text.startswith("dpo") for text in shown(browser, ".answer"))
    for order, turn in (("down", 1), ("up", -1)):
        choose(browser, "order", order)
        golds = [float(re.search(r"gold (-?[\d.]+)", text).group(1)) for text in shown(browser, ".answer")]
        assert golds == sorted(golds, key=lambda gold: -turn * gold)
    choose(browser, "order", "")
    choose(browser, "who", "")
    assert [re.search(r"question (\d+)", text).group(1) for text in shown(browser)] == [str(i) for i in range(12)]


def test_typing_reaches_the_search(browser, report):
    browser.open(report, width=390, mobile=True)
    browser.evaluate("document.getElementById('search').focus()")
    browser.call("Input.insertText", text="question 13")
    assert len(shown(browser)) == 1


def test_it_prints_light_with_every_plot_even_from_a_dark_screen(browser, report, tmp_path):
    browser.open(report, width=1200, dark=True)
    document = browser.pdf(tmp_path / "report.pdf")
    assert document.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type /Page\b", document)) <= 30
    drawn = browser.evaluate("[...document.querySelectorAll('.plot')].filter(n => n.offsetParent && !n.dataset.drawn)")
    assert drawn == []
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.getElementById('bar')).display") == "none"
