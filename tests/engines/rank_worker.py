"""One rank of the rank-invariance tests: `rank_worker.py JOB RANK`, started with the same job for every rank.

A job is a folder with `cases.json`; each case's metrics and parameters are written to `<index>-<rank>.pt`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import CASES, HEAD_RATE, OPTIMIZER, build_model

from rlhf.engines import deepspeed_engine
from rlhf.engines.deepspeed_engine import DeepSpeedEngine
import time
deepspeed_engine.WHOLE_BELOW = 0

folder, job, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
t0=time.time()
dist.init_process_group("gloo", init_method=f"file://{job}/ranks", rank=rank, world_size=2)
for stage in (0,1,2,3):
  for lora in (False, True):
    for name in CASES:
        if len(sys.argv)>4 and name not in sys.argv[4:]: continue
        case = CASES[name]
        t1=time.time()
        module = build_model(folder, case.kind, lora)
        engine = DeepSpeedEngine(module, OPTIMIZER, HEAD_RATE, 24, stage, "float32")
        t2=time.time()
        b=case.batch()
        m = [engine.step(b, case.objective, 1.0), engine.step(b.select([1]), case.objective, 0.5)]
        if name=="policy":
            b.advantages[1,8]=float("inf")
            m+= [engine.step(b, case.objective, 1.0), engine.step(case.batch(), case.objective, 1.0)]
        if case.kind=="causal":
            from rlhf.engines.scoring import score_tokens
            from cases import token_batch
            module.eval()
            sc = score_tokens(module, token_batch(), 1.0, 24)
        with engine.gathered():
            p = {n: q.detach().clone() for n, q in module.named_parameters()}
        t3=time.time()
        engine.close()
        if rank==0: print(stage, lora, name, [dict(x) for x in m], f"build {t2-t1:.2f} run {t3-t2:.2f}", flush=True)
        torch.save((p, [x.sums for x in m], sc if case.kind=="causal" else None), job / f"{stage}-{lora}-{name}-{rank}.pt")
print("total", time.time()-t0)
