"""Publishes to replicas on two nodes of a cluster and prints what each serves; run by test_two_nodes.py.

python two_nodes.py MODEL_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))

from rollout_oracle import differences, open_model, perturb

from actors.rollout import RolloutActor
from actors.weights import publish
from rlhf.engines.base import RolloutSpec
from rlhf.models.merging import merged_weights
from rlhf.recipe.role_schema import RolloutRole
from rlhf.types import Prompt, Sampling

DEADLINE_S = 120.0
PROMPTS = [Prompt("a", (10, 20, 30), ""), Prompt("b", (40, 50), "")]


class Seen(RolloutActor):
    """A replica that tells how its weights came."""

    def relayed(self) -> bool:
        return self.copy is not None


def served(replica: Any, model: Any) -> dict[str, Any]:
    rollouts = ray.get(replica.generate.remote(PROMPTS, Sampling(8), [[1], [2]]), timeout=DEADLINE_S)
    return {
        "node": ray.get(replica.transport.remote())[2],
        "relayed": ray.get(replica.relayed.remote()),
        "served": ray.get(replica.served.remote()),
        "difference": float(differences(model, rollouts).max()),
    }


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=2, resources={"far": 2})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    spec = RolloutSpec(folder, "float32", RolloutRole(engine="transformers"), max_length=64, threads=1, seed=0)
    actor = ray.remote(concurrency_groups={"generate": 1})(Seen)
    far = [actor.options(num_cpus=1, resources={"far": 1}).remote(spec) for _ in range(2)]
    replicas = [actor.options(num_cpus=1).remote(spec), *far]
    model = open_model(folder)
    for version in (1, 2):
        perturb(model, version, 0.5)
        receipt = publish(lambda: merged_weights(model), replicas, version, DEADLINE_S)
        told = [served(replica, model) for replica in replicas]
        print(json.dumps({"checksum": receipt.checksum, "version": version, "replicas": told}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
