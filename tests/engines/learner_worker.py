"""One rank of two: `learner_worker.py MODEL_FOLDER JOB_FOLDER RANK PORT` makes every round of a learner on two ranks.

Writes to `JOB_FOLDER/<case>-<rank>.pt`, and saved models to `JOB_FOLDER/saved-<case>`.
"""

import sys
from pathlib import Path

import torch
from learner_cases import BUCKET, LEARNER_CASES, go_round

from rlhf.engines import ranks, zero_config
from rlhf.models import merging

DEADLINE_S = 100.0


def main() -> None:
    folder, job, rank, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    ranks.join(rank, 2, "127.0.0.1", port, DEADLINE_S)
    merging.BUCKET = BUCKET
    for case in LEARNER_CASES:
        zero_config.WHOLE_BELOW = 100_000 if case.whole else 0
        torch.save(go_round(case, folder, 2, job / f"saved-{case}"), job / f"{case}-{rank}.pt")


if __name__ == "__main__":
    main()
