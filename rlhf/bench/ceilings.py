"""What the hardware can do: matrix products and copies, on the CPU with the threads of a role and all, and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf.bench.figures import Figure, found
from rlhf.bench.setting import Setting

SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 2048)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
"""(rows, inputs, outputs) of the products that are tried."""

SCORED = {"cpu": 1024, "cuda": 8192}
"""Positions that go through the language-model head at once."""

COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes of what is copied: far more than caches hold."""

LAPS_S, LEAST_LAPS = 0.3, 3


@dataclass(frozen=True)
class Place:
    """Where something is computed."""

    device: Literal["cpu", "cuda"]
    threads: int

    def __str__(self) -> str:
        """`1 thread`, `2 threads` or `GPU`."""
        if self.device == "cuda":
            return "GPU"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"


def places(setting: Setting) -> list[Place]:
    """Return where ceilings are measured."""
    on_cpu = [Place("cpu", threads) for threads in setting.thread_counts()]
    return [*on_cpu, *([Place("cuda", 1)] if torch.cuda.is_available() else [])]


def measure_gemm(setting: Setting, known: Sequence[Figure]) -> list[Figure]:
    """Return TFLOP/s of matrix products: the best of several shapes in either dtype, and one shaped like the head.

    The head's, (positions x hidden) times (hidden x vocabulary), is in the model's dtype, and its limit is the best of
    that dtype, itself included: it writes more than it multiplies.
    """
    from rlhf.recipe.model_shape import read_shape

    model = read_shape(setting.folder)
    figures: list[Figure] = []
    for place in places(setting):
        torch.set_num_threads(place.threads)
        head = (SCORED[place.device], model.hidden, model.vocabulary)
        rates = {
            dtype: [rate(shape, place, dtype, setting.seconds) for shape in (*SHAPES[place.device], head)]
            for dtype in ("bfloat16", "float32")
        }
        figures += [Figure(f"gemm {dtype}", max(tried) / 1e12, str(place)) for dtype, tried in rates.items()]
        own = rates[setting.recipe.model.precision]
        figures.append(Figure("gemm head", own[-1] / 1e12, str(place), max(own) / 1e12))
    return figures


def measure_copy(setting: Setting, known: Sequence[Figure]) -> list[Figure]:
    """Return GB/s of copying one tensor into another as large, bytes read and bytes written both counted.

    That is how STREAM counts (McCalpin 1995), and what reading alone may reach too.
    """
    figures = []
    for place in places(setting):
        torch.set_num_threads(place.threads)
        source, target = (torch.ones(COPIED[place.device], dtype=torch.uint8, device=place.device) for _ in range(2))
        seconds = best_seconds(partial(target.copy_, source), place, setting.seconds)
        figures.append(Figure("copy", 2 * source.nbytes / seconds / 1e9, str(place)))
    return figures


def flops(known: Sequence[Figure], dtype: str, place: Place) -> float | None:
    """Return the measured ceiling of products, operations per second; None where there is none."""
    ceiling = found(known, f"gemm {dtype}", str(place))
    return ceiling and ceiling * 1e12


def bandwidth(known: Sequence[Figure], place: Place) -> float | None:
    """Return the measured bytes per second of reading and writing together; None where there are none."""
    ceiling = found(known, "copy", str(place))
    return ceiling and ceiling * 1e9


def best_seconds(work: Callable[[], object], place: Place, scale: float) -> float:
    """Return the shortest time of some work, which is what others on the machine disturbed least."""
    return min(laps(work, place, LAPS_S * scale))


def laps(work: Callable[[], object], place: Place, budget: float, least: int = LEAST_LAPS) -> Iterator[float]:
    """Yield the seconds of each repetition, at least so many, after one that does not count."""
    work()
    _wait(place)
    ends = time.perf_counter() + budget
    done = 0
    while done < least or time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        _wait(place)
        yield time.perf_counter() - began
        done += 1


def rate(shape: tuple[int, int, int], place: Place, dtype: str, scale: float) -> float:
    """Return the operations per second of a product (rows x inputs) times (inputs x outputs)."""
    rows, inputs, outputs = shape
    left, right = (_matrix(a, b, place, dtype) for a, b in ((rows, inputs), (outputs, inputs)))
    return 2 * rows * inputs * outputs / best_seconds(partial(linear, left, right), place, scale)


def _matrix(rows: int, columns: int, place: Place, dtype: str) -> Tensor:
    return torch.randn(rows, columns, device=place.device, dtype=getattr(torch, dtype))


def _wait(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.synchronize()
