"""New instructions and answers as a model writes them: what of them is the text, and whether it is worth keeping.

The filters are those of self-instruct (Wang et al. 2022, section 2.2) and of those who use it: too short or too long,
like one that is there already by ROUGE-L, about something that text cannot hold, or debris of another format.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Indel

# Scripts that put no space between words: each character counts as a word.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    r"\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
LABEL = re.compile(r"(new |next )?(task|instruction|question|prompt)\b[ #]*\d*\s*[:.)\]-]+\s*", re.IGNORECASE)
NUMBER = re.compile(r"#?\d{1,3}\s*[.):\u3001]\s*(?=\D)")
MARKS = "*_#>-\u2022 \t"
QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "\u300c": "\u300d"}
BANNED = re.compile(
    r"\b(image|picture|photo|photograph|screenshot|video|audio|attachment|diagram|flowchart)s?\b|\battached\b"
    r"|\bas an ai\b|\b(ai )?language model\b"
    r"|\u56fe\u7247|\u56fe\u50cf|\u7167\u7247|\u89c6\u9891|\u97f3\u9891|\u9644\u4ef6"
    r"|\u4f5c\u4e3a(\u4e00\u4e2a|\u4e00\u540d)?(\u4eba\u5de5\u667a\u80fd|AI|\u8bed\u8a00\u6a21\u578b)",
    re.IGNORECASE,
)
SPEAKS_AS_MACHINE = re.compile(r"\bas an ai\b|\b(ai )?language model\b|\u8bed\u8a00\u6a21\u578b", re.IGNORECASE)
ECHO = 0.8
"""An answer as near as that to its instruction only says it again."""
DISTINCT = 0.5
FEWEST_WORDS = 8
UNSEEN = {"Cc", "Cs", "Co", "Cn"}


def words(text: str) -> list[str]:
    """Return the words of a text, in one case and without the punctuation around them; of CJK each character is one."""
    found = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word for item in found if (word := _stripped(item))]


def normalised(text: str) -> str:
    """Return a text without what makes two equal ones look different: case, punctuation, spaces, width."""
    return " ".join(words(text))


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the F1 of ROUGE-L (Lin 2004) of two lists of words: twice their longest common subsequence over both."""
    return float(Indel.normalized_similarity(first, second))


def parse_instructions(text: str, finished: bool) -> list[str]:
    """Return the instructions that a model wrote as it went on with a numbered list, from where a number stands.

    One is a line. What is no part of the list ends it; the last line counts where the text is `finished`, and was not
    cut at the token limit.
    """
    lines = text.split("\n")
    found = []
    for place, line in enumerate(lines if finished else lines[:-1]):
        bare = line.strip().lstrip(MARKS)
        if place and bare and not (NUMBER.match(bare) or LABEL.match(bare)):
            break
        if item := _plain(bare):
            found.append(item)
    return found


def _plain(text: str) -> str:
    """Return an item of a list without its number, its label, and marks and quotes around it."""
    for lead in (NUMBER, LABEL):
        if match := lead.match(text):
            text = text[match.end() :].lstrip(MARKS)
    text = text.strip("*_ \t")
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def instruction_fault(text: str, min_words: int, max_words: int) -> str | None:
    """Return why an instruction is not worth keeping by itself, or None."""
    count = len(words(text))
    if not text:
        return "no whole instruction"
    if _damaged(text):
        return "debris"
    if count < min_words:
        return "too short"
    if count > max_words:
        return "too long"
    return "not a text task" if BANNED.search(text) else None


def answer_fault(text: str, instruction: str, finished: bool) -> str | None:
    """Return why an answer is not worth keeping, or None."""
    said = words(text)
    if not said:
        return "answer: empty"
    if not finished:
        return "answer: cut off"
    if _damaged(text):
        return "answer: debris"
    if SPEAKS_AS_MACHINE.search(text):
        return "answer: speaks as a machine"
    if rouge_l(said, words(instruction)) >= ECHO:
        return "answer: repeats the instruction"
    return "answer: goes round in circles" if circles(said) else None


def circles(said: Sequence[str]) -> bool:
    """Return whether more than half of the three-word sequences of a text are repeats of earlier ones."""
    triples = list(zip(said, said[1:], said[2:], strict=False))
    return len(said) >= FEWEST_WORDS and len(set(triples)) < DISTINCT * len(triples)


def _damaged(text: str) -> bool:
    """Return whether a text holds characters that are none, half a code block, or marks of a chat template."""
    unseen = any(unicodedata.category(letter) in UNSEEN and letter not in "\n\t" for letter in text)
    return unseen or "\ufffd" in text or text.count("```") % 2 == 1 or "<|" in text


def _stripped(word: str) -> str:
    """Return a word without punctuation and symbols at its ends; a mark that belongs to its letter stays."""
    letters = [place for place, letter in enumerate(word) if unicodedata.category(letter)[0] not in "PSZC"]
    return word[letters[0] : letters[-1] + 1] if letters else ""
