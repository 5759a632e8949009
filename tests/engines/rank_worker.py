"""One rank of two: `rank_worker.py MODEL_FOLDER JOB_FOLDER RANK` runs every case of `rank_cases` with DeepSpeed.

Writes to `JOB_FOLDER/<case>-<rank>.pt`. The engine joins the ranks that the environment names.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import HEAD_RATE, OPTIMIZER, build_model
from rank_cases import RANK_CASES, Outcome, RankCase, drive

from rlhf.engines import deepspeed_engine
from rlhf.engines.deepspeed_engine import DeepSpeedEngine

MAX_TOKENS = 24


def run(case: RankCase, folder: Path) -> Outcome:
    module = build_model(folder, case.kind, case.lora, case.dtype)
    engine = DeepSpeedEngine(module, OPTIMIZER, HEAD_RATE, MAX_TOKENS, case.stage, case.dtype)
    outcome = drive(engine, module, case, MAX_TOKENS, engine.gathered)
    engine.close()
    return outcome


def main() -> None:
    folder, job, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    deepspeed_engine.WHOLE_BELOW = 0  # Or ZeRO-3 would leave every parameter of so small a model whole.
    for case in RANK_CASES:
        torch.save(run(case, folder), job / f"{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
