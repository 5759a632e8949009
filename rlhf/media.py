"""Packages for images and sound, hidden from the libraries that would import them: models here read text.

An installation of vLLM brings them, easily in builds for another torch than the one that is there, and then every
import of transformers' models and of vLLM's engine fails. Where they are not installed both work as well.
"""

from __future__ import annotations

import sys
from typing import Any, cast

MEDIA = ("torchvision", "torchaudio", "torchcodec")


def hide_media() -> None:
    """Let those that are not imported yet look as if they were not installed, for the life of this process."""
    modules = cast("dict[str, Any]", sys.modules)
    for name in MEDIA:
        modules.setdefault(name, None)
