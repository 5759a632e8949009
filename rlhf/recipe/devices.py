"""Known accelerators and what they can do, from their makers' data sheets.

NVIDIA's data sheets of the A100 (2021), H100 (SXM5), H200, L40S, L4 and B200 (in the DGX B200), and the Ada GPU
architecture white paper for the RTX 4090. Rates are of dense bfloat16 products accumulated in float32, without
sparsity; memory and its bandwidth are in decimal units there and memory is in bytes as CUDA reports it here, roughly;
`link` is the bandwidth to a neighbour in one direction: NVLink, or else PCIe.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import RecipeError

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """An accelerator: bytes of memory, operations a second, bytes a second of its memory and of its link."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


def _device(name: str, gib: float, tflops: float, gbs: float, link_gbs: float) -> Device:
    return Device(name, int(gib * 2**30), tflops * TERA, gbs * GB, link_gbs * GB)


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
    return Device(found.name, found.total_memory, like.flops, like.bandwidth, like.link)


def _model(device: Device) -> str:
    """Return what CUDA's name of the device has in it: `h100`, `rtx 4090`."""
    return device.name.partition("-")[0].replace("rtx", "rtx ")
