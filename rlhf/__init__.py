"""Alignment of language models: one recipe from SFT to an honest comparison of PPO and DPO."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rlhf.untrusted import PrintableRecords

if TYPE_CHECKING:
    from rlhf.api import Recipe, Run, run

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "run"]

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it misses kernels that nobody needs
logging.getLogger("rlhf").addFilter(PrintableRecords())  # messages quote models, data and servers


def __getattr__(name: str) -> Any:
    """Import the Python API when it is first asked for: `import rlhf` alone loads nothing."""
    if name in __all__:
        from rlhf import api

        return getattr(api, name)
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
