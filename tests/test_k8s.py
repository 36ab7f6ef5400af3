"""The Kubernetes files against what the published CRDs require, and against what a run needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from sora_train.config.load import build

FILES = sorted((Path(__file__).parents[1] / "launch/k8s").glob("*.yaml"))
# Paths that the CRDs of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1, 2.2), JobSet (v1alpha2) and the Training
# Operator (kubeflow.org/v1, 1.9) require, or that the controllers look for; written down from them by hand.
JOB = "spec.template.spec.replicatedJobs.0"
REQUIRED: dict[str, dict[str, type]] = {
    "TrainingRuntime": {
        "metadata.name": str, "spec.mlPolicy.numNodes": int, "spec.mlPolicy.torch.numProcPerNode": int,
        f"{JOB}.name": str, f"{JOB}.template.spec.template.spec.containers.0.name": str,
        f"{JOB}.template.metadata.labels.trainer:kubeflow:org/trainjob-ancestor-step": str,
        "spec.template.spec.failurePolicy.rules.0.name": str, "spec.template.spec.failurePolicy.rules.0.action": str,
        f"{JOB}.template.spec.podFailurePolicy.rules.0.action": str,
        f"{JOB}.template.spec.podFailurePolicy.rules.0.onExitCodes.operator": str,
        f"{JOB}.template.spec.podFailurePolicy.rules.0.onExitCodes.values": list,
    },
    "TrainJob": {"metadata.name": str, "spec.runtimeRef.name": str, "spec.trainer.numNodes": int,
                 "spec.trainer.numProcPerNode": int},
    "PyTorchJob": {
        "metadata.name": str, "spec.pytorchReplicaSpecs.Master.replicas": int,
        "spec.pytorchReplicaSpecs.Master.restartPolicy": str,
        "spec.pytorchReplicaSpecs.Master.template.spec.containers.0.name": str,
        "spec.pytorchReplicaSpecs.Worker.template.spec.containers.0.image": str,
    },
}  # fmt: skip
VERSIONS = {"TrainingRuntime": "trainer.kubeflow.org/v1alpha1", "TrainJob": "trainer.kubeflow.org/v1alpha1",
            "PyTorchJob": "kubeflow.org/v1"}  # fmt: skip


def documents() -> Iterator[dict[str, Any]]:
    for path in FILES:
        yield from yaml.safe_load_all(path.read_text())


def at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part.replace(":", ".")]
    return tree


def pods(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in a tree."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pods(value)


@pytest.mark.parametrize("document", list(documents()), ids=lambda d: d["kind"])
def test_what_the_schemas_require_is_there(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == VERSIONS[document["kind"]]
    for path, kind in REQUIRED[document["kind"]].items():
        assert isinstance(at(document, path), kind), path
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    for pod in pods(document):
        for container in pod["containers"]:
            assert all(isinstance(v.get("value", ""), str) for v in container.get("env", []))  # numbers are refused
            assert {m["name"] for m in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}


def test_every_kind_is_there() -> None:
    assert sorted(d["kind"] for d in documents()) == sorted(VERSIONS)


def test_pods_have_shared_memory_rdma_and_time_to_save() -> None:
    found = [pod for document in documents() for pod in pods(document)]
    assert len(found) == 3
    for pod in found:
        (container,) = pod["containers"]
        settings = {v["name"]: v.get("value") for v in container["env"]}
        assert pod["terminationGracePeriodSeconds"] > int(str(settings["SHUTDOWN_TIMEOUT"]))
        (memory,) = [v for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        assert {"name": memory["name"], "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert "rdma/hca" in container["resources"]["limits"]
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert "./launch/multinode.sh" in container["args"][0]


def test_the_two_halves_of_a_job_fit() -> None:
    kinds = {d["kind"]: d for d in documents()}
    runtime, job = kinds["TrainingRuntime"], kinds["TrainJob"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    rule = at(runtime, f"{JOB}.template.spec.podFailurePolicy.rules.0.onExitCodes")
    assert rule["values"] == [2] and at(runtime, f"{JOB}.template.spec.template.spec.restartPolicy") == "Never"
    specs = kinds["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    settings = {v["name"]: v.get("value") for v in at(specs, "Master.template.spec.containers.0.env")}
    assert int(settings["NNODES"]) == sum(spec["replicas"] for spec in specs.values())


def test_their_arguments_compose(compose_tree: Callable[..., DictConfig]) -> None:
    found = [v["value"] for d in documents() for v in environment(d) if v["name"] == "ARGUMENTS"]
    assert len(found) == 3
    for line in set(found):
        assert "'" not in line and '"' not in line  # the shell splits the variable at blanks alone
        assert build(compose_tree(*shlex.split(line)), need_vae=False).steps == 100000


def environment(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield from tree.get("env", [])
        for value in tree.values():
            yield from environment(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from environment(value)
