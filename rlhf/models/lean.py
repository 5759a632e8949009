"""A shorter start: transformers and PEFT without the packages that they load for what nothing here uses.

Where scikit-learn, scipy or bitsandbytes is installed, transformers (for assisted generation and the losses of object
detection) and PEFT (for every adapter) import it: 38 % of the processor time of `import rlhf.engines.learner` was
theirs, and each role is a process. Packages for images and sound
stay out for another reason: see rlhf/media.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from rlhf.media import MEDIA


def import_lean() -> None:
    """Import transformers and PEFT as if those packages were not there; whoever wants them can import them after.

    Where either is imported already it may have found them, and must go on finding them: then nothing is done.
    """
    if {"transformers", "peft"} & sys.modules.keys():
        return
    with _hidden("sklearn", "scipy", "bitsandbytes", *MEDIA):
        from transformers.utils import import_utils as installed

        for name in MEDIA:
            getattr(installed, f"is_{name}_available")()  # it remembers the answer, as do those of PEFT below
        import transformers.generation.candidate_generator  # noqa: F401  asks for the first two
        from peft import import_utils

        for available in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
            available()


def show_bitsandbytes() -> None:
    """Let transformers and PEFT find bitsandbytes, for models in 4 bits."""
    from peft import import_utils
    from transformers.utils import is_bitsandbytes_available

    for available in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available, is_bitsandbytes_available):
        available.cache_clear()


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Let packages that are not imported yet look as if they were not installed."""
    modules = cast("dict[str, Any]", sys.modules)
    absent = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            modules.pop(name, None)
