"""One rank of two: `state_worker.py MODEL_FOLDER JOB_FOLDER RANK PORT` trains, saves, and goes on in a new engine."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import CASES, HEAD_RATE, OPTIMIZER, build_model
from rank_cases import RankCase, parameters
from torch import Tensor, nn

from rlhf.engines import ranks, zero_config
from rlhf.engines.base import TrainEngine
from rlhf.engines.deepspeed_engine import DeepSpeedEngine
from rlhf.engines.state_files import StateFiles, write_state

MAX_TOKENS = 24
DEADLINE_S = 100.0
STATE_CASES = [
    RankCase("policy", 0, True),
    RankCase("sft", 1, False),
    RankCase("reward", 2, True),
    RankCase("sft", 2, False, "bfloat16"),
    RankCase("policy", 2, False, offload="optimizer"),
    RankCase("value", 3, False),
    RankCase("sft", 3, False, "bfloat16"),
    RankCase("policy", 3, True, offload="parameters"),
]


def learn(engine: TrainEngine, case: RankCase, step: int) -> None:
    chosen = CASES[case.objective]
    batch = chosen.batch()
    engine.step(batch if step % 2 == 0 else batch.select([1]), chosen.objective, 1.0 - 0.1 * step)


def two_engines(case: RankCase, folder: Path, job: Path, rank: int) -> list[dict[str, Tensor]]:
    """Return the parameters after three steps: without a stop, with one after the second, and from one rank's state."""

    def build() -> tuple[TrainEngine, nn.Module]:
        module = build_model(folder, case.kind, case.lora, case.dtype)
        engine = DeepSpeedEngine(module, OPTIMIZER, HEAD_RATE, MAX_TOKENS, case.stage, case.dtype, case.offload)
        return engine, module

    engine, module = build()
    for step in range(3):
        if step == 2:
            (job / str(case)).mkdir(exist_ok=True)
            write_state(engine.state(), job / str(case), "policy", rank, 2)
        learn(engine, case, step)
    found = [parameters(engine, module)]
    engine.close()
    dist.barrier()
    for saved in (job / str(case), job / f"alone-{case}"):
        engine, module = build()
        engine.restore(StateFiles(saved, "policy"))
        learn(engine, case, 2)
        found.append(parameters(engine, module))
        engine.close()
    return found


def main() -> None:
    folder, job, rank, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    ranks.join(rank, 2, "127.0.0.1", port, DEADLINE_S)
    zero_config.WHOLE_BELOW = 0
    for case in STATE_CASES:
        torch.save(two_engines(case, folder, job, rank), job / f"{case}-{rank}.pt")


if __name__ == "__main__":
    main()
