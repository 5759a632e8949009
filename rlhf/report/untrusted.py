"""Text that a model wrote, made safe to look at."""

from __future__ import annotations

import unicodedata

# Other, control / format / surrogate / private use / unassigned; separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Line breaks and tabs are layout; the joiners shape emoji and many scripts and reorder nothing.
HARMLESS = {"\n", "\t", "\u200c", "\u200d"}


def visible(text: str, limit: int = 4000) -> str:
    """Spell out characters that act instead of showing, as <U+202E>, and cut the text after `limit` characters.

    This covers escape sequences for terminals, text-direction overrides (Boucher & Anderson 2021), zero-width
    and tag characters and lone surrogates. It does not escape HTML: that is the template's part.
    """
    shown = "".join(
        f"<U+{ord(letter):04X}>" if letter not in HARMLESS and unicodedata.category(letter) in HIDDEN else letter
        for letter in text[:limit]
    )
    cut = len(text) - limit
    return f"{shown} ... ({cut} more characters)" if cut > 0 else shown
