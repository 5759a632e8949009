"""Why a process died, as far as Ray, the kernel and its own log tell, and what to do about it."""

from __future__ import annotations

import logging
import re

from ray import ObjectRef
from ray.exceptions import RayError

from actors.process import KernelKills, Place

log = logging.getLogger("rlhf")
KERNEL = KernelKills()
LOW_MEMORY = re.compile(r"low on memory|out of memory|OUT_OF_MEMORY|memory (usage )?threshold", re.I)
NODE_LOST = re.compile(r"node (has died|is dead|was (dead|terminated|lost))", re.I)
EXIT_CODE = re.compile(r"exit code (\d+)")
CRASH = re.compile(r"Segmentation fault|SIGSEGV|Fatal Python error: \S+|Bus error|SIGABRT")
LESS_MEMORY = "give its role less to hold (max_tokens_per_microbatch, max_sequences, kv_cache_gib) or more memory"


def told(error: RayError, reference: ObjectRef | None) -> str:
    """Return in one line what ended the process behind a call, where it was, and the remedy; details are logged."""
    place = place_of(reference)
    words = place.last_words() if place else ""
    log.info("%s\nlast words of the process:\n%s", error, words)
    what, remedy = _cause(_detail(error), words)
    return f"({what}){f' on {place}' if place else ''}; {remedy}"


def place_of(reference: ObjectRef | None) -> Place | None:
    """Return where the process behind a call is or was, if the cluster knows."""
    return Place.of(reference.task_id().actor_id().hex()) if reference is not None else None


def _detail(error: RayError) -> str:
    """Return what Ray says, without its list of common causes, which names them all."""
    return str(error).partition(" Some common causes")[0].strip()


def _cause(detail: str, words: str) -> tuple[str, str]:
    if LOW_MEMORY.search(detail):
        return "Ray's memory monitor ended it, as the machine ran low on memory", LESS_MEMORY
    if NODE_LOST.search(detail):
        return "its machine was lost", "see whether that machine is up and reaches the cluster's head"
    if "ray.kill" in detail:
        return "it was ended through Ray", "see who else works on this cluster"
    if "SIGTERM" in detail:
        return "it was ended from outside by SIGTERM", "see who or what ends processes on that machine"
    if code := EXIT_CODE.search(detail):
        return f"it ended itself with exit code {code[1]}", "its last words are in logs/run.log"
    if crash := CRASH.search(words):
        return f"it crashed: {crash[0]}", "its last words are in logs/run.log"
    if KERNEL.more():
        return "the kernel's OOM killer ended it", LESS_MEMORY
    if "End of file" in detail:
        return "it ended without a word: SIGKILL or a crash", f"out of memory is the usual cause: {LESS_MEMORY}"
    return detail.splitlines()[-1].rpartition("Worker exit detail: ")[2].strip(" ."), "details are in logs/run.log"
