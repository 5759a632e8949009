"""All checks of this machine; the slow imports run beside the others."""

from __future__ import annotations

from pathlib import Path

from rlhf.doctor.check import Check
from rlhf.doctor.hardware import check_hardware
from rlhf.doctor.services import check_services
from rlhf.doctor.software import build_check, check_versions, import_checks, start_probes, torch_build
from rlhf.models.cache import default_cache


def check_machine(output: Path) -> list[Check]:
    """Look at everything a run needs; `output` is where run folders will be made."""
    probes = start_probes()
    checks = [*check_versions(), *check_services()]
    results = probes.results()
    cuda, gpus = torch_build(results)
    checks += [*import_checks(results), build_check(gpus)]
    return [*checks, *check_hardware(output, default_cache(), cuda, gpus)]
