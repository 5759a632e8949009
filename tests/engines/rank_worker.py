"""One rank of two: `rank_worker.py MODEL_FOLDER JOB_FOLDER RANK PORT` steps through every case of two ranks.

Writes to `JOB_FOLDER/<case>-<rank>.pt`.
"""

import sys
from pathlib import Path

import torch
from engine_cases import HEAD_RATE, OPTIMIZER, build_model
from rank_cases import RANK_CASES, Outcome, RankCase, drive

from rlhf.engines import ranks, zero_config
from rlhf.engines.deepspeed_engine import DeepSpeedEngine
from rlhf.models.recompute import recompute_activations

MAX_TOKENS = 24
DEADLINE_S = 100.0


def run(case: RankCase, folder: Path) -> Outcome:
    module = build_model(folder, case.kind, case.lora, case.dtype, flat=True)
    if case.recompute:
        recompute_activations(module)
    engine = DeepSpeedEngine(module, OPTIMIZER, HEAD_RATE, MAX_TOKENS, case.stage, case.dtype, case.offload)
    outcome = drive(engine, module, case, MAX_TOKENS)
    engine.close()
    return outcome


def main() -> None:
    folder, job, rank, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    ranks.join(rank, 2, "127.0.0.1", port, DEADLINE_S)
    zero_config.WHOLE_BELOW = 0  # Or ZeRO-3 would leave every parameter of so small a model whole.
    for case in RANK_CASES:
        torch.save(run(case, folder), job / f"{case}-{rank}.pt")


if __name__ == "__main__":
    main()
