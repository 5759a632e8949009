"""Known accelerators and what they can do, from their makers' data sheets.

NVIDIA's data sheets of the A100 (2021), H100 (SXM5), H200, L40S, L4, B200 (in the DGX B200), V100 (SXM2) and T4, and
the Ada GPU architecture white paper for the RTX 4090. Rates are of dense bfloat16 products accumulated in float32,
without sparsity, and of float32 products where a GPU has none in bfloat16; memory and its bandwidth are in decimal
units there and memory is in bytes as CUDA reports it here, roughly; `link` is the bandwidth to a neighbour in one
direction: NVLink, or else PCIe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.errors import RecipeError

GB = 10**9
TERA = 10**12
FIRST = 8.0
"""The first compute capability of NVIDIA's that multiplies bfloat16 numbers (Ampere)."""
ANSWER_S = 120.0
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
ASKS_TORCH = """
import json, torch
found = []
for number in range(torch.cuda.device_count()):
    with torch.cuda.device(number):
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    found.append([torch.cuda.get_device_name(number), able])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Device:
    """An accelerator: bytes of memory, operations a second, bytes a second of its memory and of its link.

    `bfloat16` says whether it multiplies such numbers.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    bfloat16: bool = True


def _device(name: str, gib: float, tflops: float, gbs: float, link_gbs: float, bfloat16: bool = True) -> Device:
    return Device(name, int(gib * 2**30), tflops * TERA, gbs * GB, link_gbs * GB, bfloat16)


DEVICES = {
    device.name: device
    for device in (
        _device("a100-40gb", 39.4, 312, 1555, 300),
        _device("a100-80gb", 79.2, 312, 2039, 300),
        _device("h100-80gb", 79.1, 989, 3350, 450),
        _device("h200-141gb", 139.8, 989, 4800, 450),
        _device("b200-180gb", 178.0, 2250, 7700, 900),
        _device("l40s-48gb", 44.4, 362, 864, 32),
        _device("l4-24gb", 22.0, 121, 300, 32),
        _device("rtx4090-24gb", 23.5, 165, 1008, 32),
        _device("v100-32gb", 31.7, 15.7, 900, 150, bfloat16=False),
        _device("t4-16gb", 14.6, 8.1, 300, 16, bfloat16=False),
    )
}


def named_device(name: str) -> Device:
    """Return a device by its name; RecipeError lists the known ones."""
    if name not in DEVICES:
        raise RecipeError(f"--gpu {name}: unknown device, known are {', '.join(DEVICES)}")
    return DEVICES[name]


def local_device() -> Device | None:
    """Return this machine's first GPU with its real memory, or None; rates of an unknown one are an A100's."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    like = next((known for known in DEVICES.values() if _model(known) in found.name.lower()), DEVICES["a100-40gb"])
    return Device(found.name, found.total_memory, like.flops, like.bandwidth, like.link, like.bfloat16)


def bfloat16_gpus() -> list[tuple[str, bool]]:
    """Return the name of each GPU that this process may use, and whether it multiplies bfloat16 numbers.

    The driver's tool answers without CUDA being opened here. Where it is missing, or its GPUs differ, another process
    asks torch, which knows the ones that are visible. Empty where neither finds any.
    """
    cards = [line.rpartition(",") for line in _answer(SMI).splitlines()]
    able = [(name.strip(), float(capability) >= FIRST) for name, _, capability in cards if _is_number(capability)]
    if able and len({one for _, one in able}) == 1:
        return able
    found = _answer([sys.executable, "-c", ASKS_TORCH]).splitlines()[-1:]
    return [(str(name), bool(one)) for name, one in json.loads(found[0])] if found else able


def _answer(command: Sequence[str]) -> str:
    """Return what a command prints, nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdecimal()


def _model(device: Device) -> str:
    """Return what CUDA's name of the device has in it: `h100`, `rtx 4090`."""
    return device.name.partition("-")[0].replace("rtx", "rtx ")
