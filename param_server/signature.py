"""The serving signature: what a model asks for and what it answers; it travels with the program."""

from __future__ import annotations

from typing import Literal

import msgspec

from param_server.errors import ManifestError

DOMAIN_FEATURE = "domain"
LENGTHS_SUFFIX = ".lengths"
INPUT_NAME = "embeddings"
DOMAIN_INPUT_NAME = "domains"
OUTPUT_NAME = "probabilities"
"""The program's inputs, the second of them only where it reads the domain, and its output."""
SIGNATURE_BYTES_MAX = 4 << 20


class SignatureFeature(msgspec.Struct, frozen=True, kw_only=True):
    """One input of the model; it becomes `dim` values an impression."""

    name: str
    class_id: int
    table: str
    dim: int
    kind: Literal["single", "multi", "dense"] = "single"
    bucket_edges: tuple[float, ...] = ()
    ids_max: int = 64


class ServingSignature(msgspec.Struct, frozen=True, kw_only=True):
    """Features in the order in which the program reads their embeddings, and tasks in its output's."""

    model_name: str
    schema_hash: str
    features: tuple[SignatureFeature, ...]
    domains: tuple[str, ...]
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [name for feature in self.features for name, _, _ in feature_inputs(feature)]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"feature names must be there and unique, found {names}")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be there and unique, found {list(self.tasks)}")
        dims: dict[str, int] = {}
        for feature in self.features:
            if not 1 <= feature.dim <= 4096 or not 0 <= feature.class_id <= 4095 or feature.ids_max < 1:
                raise ValueError(
                    f"feature '{feature.name}': dim 1..4096, class_id 0..4095 and ids_max from 1 are "
                    f"allowed, found {feature.dim}, {feature.class_id} and {feature.ids_max}"
                )
            if dims.setdefault(feature.table, feature.dim) != feature.dim:
                raise ValueError(f"feature '{feature.name}': table '{feature.table}' has another dim")

    @property
    def width(self) -> int:
        return sum(feature.dim for feature in self.features)


def encode_signature(signature: ServingSignature) -> bytes:
    return msgspec.json.encode(signature)


def decode_signature(data: bytes, *, where: str) -> ServingSignature:
    """Raises: ManifestError naming `where` and the field that is wrong."""
    if len(data) > SIGNATURE_BYTES_MAX:
        raise ManifestError(f"{where}: at most {SIGNATURE_BYTES_MAX} bytes are allowed, found {len(data)}")
    try:
        return msgspec.json.decode(data, type=ServingSignature)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{where}: {error}") from error


def feature_inputs(feature: SignatureFeature) -> list[tuple[str, str, list[int]]]:
    """(name, Open Inference datatype, shape) of the tensors that a request brings for a feature."""
    if feature.kind == "dense":
        return [(feature.name, "FP32", [-1])]
    if feature.kind == "multi":
        return [(feature.name, "INT64", [-1]), (feature.name + LENGTHS_SUFFIX, "INT32", [-1])]
    return [(feature.name, "BYTES" if feature.name == DOMAIN_FEATURE else "INT64", [-1])]
