"""What a GGUF file says of itself, read within the bounds of the file: whatever it claims, no more is allocated."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from rlhf.errors import RecipeError
from rlhf.models.limits import HEADS, INNER_WIDTH, LAYERS, POSITIONS, VOCABULARY, WIDTH

VERSIONS = (2, 3)
ENTRIES, TENSORS, NAME, DIMENSIONS = 2**16, 2**16, 2**16, 4
"""The most entries and tensors, bytes of a name, and dimensions of a tensor."""

LARGEST_ALIGNMENT = 2**16
FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip
SIZES = {
    "block_count": LAYERS,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER_WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": HEADS,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "context_length": POSITIONS,
    "vocab_size": VOCABULARY,
    "expert_count": LAYERS,
}
"""The largest value of an architecture's sizes, by their names behind that of the architecture."""


def check_gguf(file: Path) -> int:
    """Return how many weights a GGUF file holds.

    RecipeError where it is none, where a count, a length or a size exceeds what the file has room for or our limits,
    and where tensors overlap or lie outside.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(content).weights()
    except (ValueError, struct.error) as error:
        raise RecipeError(f"{file}: no GGUF file that can be read: {error}") from error


class _Header:
    """Reads from front to back; ValueError where the file ends before what it announces."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.place = 0
        self.alignment = GGUF_DEFAULT_ALIGNMENT

    def weights(self) -> int:
        """Check the whole header and return the sum of its tensors' elements."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and we read {' and '.join(map(str, VERSIONS))}")
        tensors, entries = self._number("Q"), self._number("Q")
        if tensors > TENSORS or entries > ENTRIES:
            raise ValueError(f"it announces {tensors} tensors and {entries} entries; {TENSORS} is the most of each")
        for _ in range(entries):
            self._entry()
        spaces = [self._tensor() for _ in range(tensors)]
        start = -(-self.place // self.alignment) * self.alignment
        ends = 0
        for begin, size, _ in sorted(spaces):
            if begin < ends:
                raise ValueError("its tensors overlap")
            ends = begin + size
        if spaces and start + ends > len(self.content):
            raise ValueError(f"its tensors end at byte {start + ends}, and it has {len(self.content)}")
        return sum(elements for _, _, elements in spaces)

    def _entry(self) -> None:
        key = self._text(NAME).decode("utf-8", "replace")
        kind = GGUFValueType(self._number("I"))
        if kind is GGUFValueType.STRING:
            self._text()
        elif kind is GGUFValueType.ARRAY:
            self._array(key)
        else:
            self._check(key, (self._number(FORMATS[kind]),))

    def _array(self, key: str) -> None:
        kind, count = GGUFValueType(self._number("I")), self._number("Q")
        if kind is GGUFValueType.ARRAY:
            raise ValueError(f"{key} is a list of lists")
        if kind is GGUFValueType.STRING:
            self._room(8 * count)
            for _ in range(count):
                self._text()
            return
        size = struct.calcsize(FORMATS[kind])
        if _limit(key) is None:
            self._skip(size * count)
        else:
            self._check(key, struct.unpack(f"<{count}{FORMATS[kind]}", self._bytes(size * count)))

    def _tensor(self) -> tuple[int, int, int]:
        """Return where a tensor begins in the data, its bytes and its elements."""
        name = self._text(NAME).decode("utf-8", "replace")
        count = self._number("I")
        if count > DIMENSIONS:
            raise ValueError(f"tensor {name[:80]!r} has {count} dimensions")
        shape = [self._number("Q") for _ in range(count)]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self._number("I"))]
        elements = math.prod(shape)
        return self._number("Q"), -(-elements // block) * size, elements

    def _check(self, key: str, values: tuple[int | float, ...]) -> None:
        if key == "general.alignment":
            (self.alignment,) = (int(value) for value in values)
            if self.alignment not in [2**power for power in range(LARGEST_ALIGNMENT.bit_length())]:
                raise ValueError(f"{key} is {self.alignment}")
        limit = _limit(key)
        if limit is not None and any(not 0 <= value <= limit for value in values):
            raise ValueError(f"{key[:80]} must be from 0 to {limit}, not {max(values)}")

    def _text(self, most: int | None = None) -> bytes:
        length = self._number("Q")
        if most is not None and length > most:
            raise ValueError(f"it has a name of {length} bytes; {most} is the most")
        return self._bytes(length)

    def _number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        (value,) = struct.unpack(f"<{kind}", self._bytes(size))
        return value

    def _bytes(self, count: int) -> bytes:
        self._room(count)
        start, self.place = self.place, self.place + count
        return self.content[start : self.place]

    def _skip(self, count: int) -> None:
        self._room(count)
        self.place += count

    def _room(self, count: int) -> None:
        if count > len(self.content) - self.place:
            raise ValueError(
                f"at byte {self.place} it announces {count} bytes more, and has {len(self.content) - self.place}"
            )


def _limit(key: str) -> int | None:
    return SIZES.get(key.partition(".")[2])
