"""The manifests under k8s/ as Python values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "k8s"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())

Document = dict[str, Any]


def documents() -> list[Document]:
    """Everything that `kubectl apply -k` makes, but for the generated ConfigMap."""
    return [
        document
        for name in KUSTOMIZATION["resources"]
        for document in yaml.safe_load_all((FOLDER / name).read_text())
    ]


def named(kind: str, name: str) -> Document:
    (found,) = [one for one in documents() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def workloads() -> list[Document]:
    return [one for one in documents() if one["kind"] in ("StatefulSet", "Deployment")]


def pod_of(workload: Document) -> Document:
    spec: Document = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: Document) -> Document:
    (container,) = pod_of(workload)["containers"]
    found: Document = container
    return found


def commands_of(container: Document) -> dict[str, list[str]]:
    """What the pod runs: `main`, and its probes by name."""
    probes = {
        name: container[name]["exec"]["command"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
        if name in container
    }
    return {"main": container["args"], **probes}
