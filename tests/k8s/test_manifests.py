"""The manifests are valid, and what they name fits together: ports, addresses, files, secrets, labels."""

from __future__ import annotations

import copy
import re
from dataclasses import astuple

import kubernetes_validate
import msgspec
import numpy as np
import pytest

from param_server.memory_budget import row_bytes
from param_server.row_store import COLUMNS
from param_server.serving_config import ServingConfig
from tests.k8s.manifests import (
    FOLDER,
    KUSTOMIZATION,
    REPOSITORY,
    Document,
    commands_of,
    container_of,
    documents,
    named,
    pod_of,
    workloads,
)
from trainer.config import load_config, preset
from trainer.recommender import slots_for
from trainer.stream.broker import ENVIRONMENT_PREFIX, security_from_environment

VERSION = kubernetes_validate.latest_version()


def label(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


every_document = pytest.mark.parametrize("document", documents(), ids=label)
every_workload = pytest.mark.parametrize("workload", workloads(), ids=label)


@every_document
def test_it_is_valid_and_has_no_unknown_field(document: Document) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@every_workload
def test_validation_would_find_a_misspelled_field_and_a_wrong_type(workload: Document) -> None:
    misspelled, wrong = copy.deepcopy(workload), copy.deepcopy(workload)
    container_of(misspelled)["livenesProbe"] = {}
    container_of(wrong)["livenessProbe"]["periodSeconds"] = "often"
    for bad in (misspelled, wrong):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(bad, VERSION, strict=True)


def test_the_kustomization_names_every_file() -> None:
    (config,) = KUSTOMIZATION["configMapGenerator"]
    named_files = {*KUSTOMIZATION["resources"], *config["files"]}
    assert named_files | {"kustomization.yaml", "Dockerfile", "README.md"} == {
        file.name for file in FOLDER.iterdir()
    }
    assert {container_of(one)["image"] for one in workloads()} == {
        image["name"] for image in KUSTOMIZATION["images"]
    }


@every_workload
def test_every_file_that_a_command_names_is_mounted(workload: Document) -> None:
    container = container_of(workload)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    commands = [word for command in commands_of(container).values() for word in command]
    paths = re.findall(r"/(?:etc|var)/[\w./-]+", " ".join(commands))
    assert paths
    for path in paths:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    volumes = {one["name"] for one in pod_of(workload)["volumes"]}
    volumes |= {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_configurations_load_and_name_the_shard_and_mounted_files() -> None:
    config = load_config(FOLDER / "freshet.toml")
    assert config.schema == preset("quickstart").schema
    service = named("Service", "freshet-shard")
    port = service["spec"]["ports"][0]["port"]
    address = f"freshet-shard-0.{service['metadata']['name']}:{port}"
    assert named("StatefulSet", "freshet-shard")["spec"]["serviceName"] == service["metadata"]["name"]
    assert config.serving.shard_address == address
    assert f"--shard={address}" in container_of(named("Deployment", "freshet-replica"))["args"]
    mounts = container_of(named("StatefulSet", "freshet-trainer"))["volumeMounts"]
    folders = [mount["mountPath"] for mount in mounts]
    for file in (config.serving.tls_ca_file, config.serving.tls_cert_file, config.serving.tls_key_file):
        assert file.rpartition("/")[0] in folders


def memory_of(kind: str, name: str) -> int:
    limit: str = container_of(named(kind, name))["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    return int(limit.removesuffix("Gi")) << 30


def test_the_pods_have_the_memory_that_the_tables_and_versions_need() -> None:
    """By k8s/README.md's "Size it", with a full table whose rows go out with score and last sighting."""
    config = load_config(FOLDER / "freshet.toml")
    serving = msgspec.toml.decode((FOLDER / "serving.toml").read_bytes(), type=ServingConfig)
    num_rows = sum(slots_for(table, world_size=1, config=config) for table in config.tables)
    dim = config.schema.dims[0]
    version = num_rows * (8 + 4 * dim + 4 + 8)
    assert serving.memory_budget_bytes + 2.3 * version <= memory_of("Deployment", "freshet-replica")
    in_the_shard = num_rows * row_bytes(dim, columns=[np.dtype(one) for one in COLUMNS.values()])
    assert 2 * in_the_shard + version <= memory_of("StatefulSet", "freshet-shard")
    assert sum(table.bytes_limit for table in config.tables) < memory_of("StatefulSet", "freshet-trainer") / 4


@every_workload
def test_services_policies_and_probes_mean_the_pods_own_port(workload: Document) -> None:
    name, container = workload["metadata"]["name"], container_of(workload)
    pod_labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == pod_labels == {"app": name}
    ports = [port["containerPort"] for port in container.get("ports", [])]
    service, policy = named("Service", name), named("NetworkPolicy", name)
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == pod_labels
    assert [port["port"] for port in service["spec"].get("ports", [])] == ports
    allowed = [port["port"] for rule in policy["spec"].get("ingress", []) for port in rule["ports"]]
    assert allowed == ports
    commands = commands_of(container)
    found = set(re.findall(r"(?:0\.0\.0\.0|localhost):(\d+)", str(commands)))
    assert found == {str(port) for port in ports}
    assert {"livenessProbe"} < set(commands)


def test_everyone_with_a_policy_to_pass_is_a_pod_of_these() -> None:
    (rule,) = named("NetworkPolicy", "freshet-shard")["spec"]["ingress"]
    (expression,) = rule["from"][0]["podSelector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app", "In")
    assert set(expression["values"]) == {one["metadata"]["name"] for one in workloads()} - {"freshet-shard"}


@every_workload
def test_pods_are_not_root_and_write_to_their_volumes_alone(workload: Document) -> None:
    pod, container = pod_of(workload), container_of(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    security = container["securityContext"]
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_every_secret_is_explained() -> None:
    text = (FOLDER / "README.md").read_text()
    secrets = set(re.findall(r"secretName': '([\w-]+)|secretKeyRef': \{'name': '([\w-]+)", str(documents())))
    names = {name for pair in secrets for name in pair if name}
    assert len(names) == 5
    for name in names:
        assert f"`{name}`" in text


def test_every_setting_of_kafka_comes_from_its_secret_and_none_is_needed() -> None:
    trainer = named("StatefulSet", "freshet-trainer")
    references = {
        variable["name"]: variable["valueFrom"]["secretKeyRef"]
        for variable in container_of(trainer)["env"]
        if variable["name"].startswith(ENVIRONMENT_PREFIX)
    }
    given = dict.fromkeys(references, "given") | {f"{ENVIRONMENT_PREFIX}SECURITY_PROTOCOL": "SASL_SSL"}
    assert set(astuple(security_from_environment(given))) == {"SASL_SSL", "given"}
    assert all(one["name"] == "freshet-kafka" and one["optional"] for one in references.values())
    (volume,) = [one["secret"] for one in pod_of(trainer)["volumes"] if one["name"] == "kafka"]
    assert (volume["secretName"], volume["optional"]) == ("freshet-kafka", True)
    (mount,) = [one["mountPath"] for one in container_of(trainer)["volumeMounts"] if one["name"] == "kafka"]
    text = (FOLDER / "README.md").read_text()
    for key in [*(one["key"] for one in references.values()), *(item["key"] for item in volume["items"])]:
        assert f"`{key}`" in text
    assert f"`ssl-cafile` with the value `{mount}/{volume['items'][0]['path']}`" in text


def test_the_image_holds_what_make_env_installs_and_copies_folders_that_are_there() -> None:
    dockerfile, makefile = (FOLDER / "Dockerfile").read_text(), (REPOSITORY / "Makefile").read_text()
    installed = re.findall(r"-r requirements/([\w$(){}.-]+)", dockerfile)
    expected = re.findall(r"-r requirements/([\w$(){}.-]+)", makefile)
    assert [name.replace("${DEVICE}", "$(DEVICE)") for name in installed] == expected
    for folder in re.findall(r"^COPY (\S+) ", dockerfile, re.MULTILINE):
        assert (REPOSITORY / folder).is_dir()
