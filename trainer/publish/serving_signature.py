"""The serving signature of a schema: what a replica must know to turn a request into keys."""

from __future__ import annotations

from param_server.client import ServingSignature, SignatureFeature, encode_signature
from trainer.config.schema import SchemaConfig
from trainer.model.layout import FeatureLayout

MODEL_NAME = "freshet"


def signature_of(schema: SchemaConfig, layout: FeatureLayout) -> bytes:
    """The signature as JSON; features in the order of the concatenated embedding."""
    return encode_signature(
        ServingSignature(
            model_name=MODEL_NAME,
            schema_hash=schema.hash(),
            features=tuple(
                SignatureFeature(
                    name=feature.name,
                    class_id=feature.class_id,
                    table=feature.table,
                    dim=feature.dim,
                    kind=feature.kind,
                    bucket_edges=feature.bucket_edges,
                    ids_max=feature.ids_max,
                )
                for feature in layout.features
            ),
            domains=schema.domains,
            tasks=tuple(schema.task_names),
        )
    )
