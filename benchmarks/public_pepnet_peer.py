"""The peer's side of benchmarks.public_pepnet: mlgb's PEPNet on a stream from a file.

PYTHON benchmarks/public_pepnet_peer.py SETTINGS.json: runs in the peer's environment and imports nothing of
this project. Reads the stream (npz); every way of using the library learns it in order and predicts each
batch before training it; writes the predictions (npz, one array a way), and ends with one line of JSON.
Shapes: N impressions, F single-id features, L tags, T tasks, B batch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlgb  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import torch
from mlgb.utils import get_sparse_feature_name_dict  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor, nn

ADAM_RATE = 1e-3
ADAGRAD_RATE = 0.05


def build(settings: dict[str, Any], way: dict[str, Any]) -> nn.Module:
    """The published class, through the library's own front door."""
    dim = settings["dim"]
    single = tuple(
        get_sparse_feature_name_dict(name, num_ids, 1, embed_dim=dim)
        for name, num_ids in settings["features"].items()
    )
    tags = (get_sparse_feature_name_dict("tags", settings["num_tags"], settings["tags_max"], embed_dim=dim),)
    model: nn.Module = mlgb.get_model(
        ((), single, tags),
        model_name="PEPNet",
        aim="mtl",
        lang="torch",
        task=("binary",) * settings["num_tasks"],
        device="cpu",
        seed=settings["seed"],
        inputs_if_multivalued=True,
        embed_dim=dim,
        pool_mv_mode="Pooling:average",
        f_ep_id_list=tuple(settings["domain_features"]),
        f_pp_id_list=tuple(settings["prior_features"]),
        tower_dnn_hidden_units=tuple(way["tower_widths"]),
        **way["options"],
    )
    return model


def hidden_weights(model: Any) -> dict[str, list[Tensor]]:
    """What is kept in plain lists and dicts, where torch does not look."""
    gate = model.pep_net_fn.gnu_0_fn
    tables = [
        table.weight
        for layer in (model.input_fn.embed_cate_fn, model.input_fn.embed_mv_fn)
        for table in layer.embed_fn_map.values()
    ]
    return {"epnet_gate": [*gate.ffn_weight_list, *gate.ffn_bias_list], "embeddings": tables}


def optimizers_of(
    model: nn.Module, hidden: dict[str, list[Tensor]], *, all_weights: bool
) -> list[torch.optim.Optimizer]:
    """As the library's examples do it, or with the hidden weights handed over by name."""
    if not all_weights:
        return [torch.optim.Adam(model.parameters(), lr=ADAM_RATE)]
    dense = [*model.parameters(), *hidden["epnet_gate"]]
    return [
        torch.optim.Adam(dense, lr=ADAM_RATE),
        torch.optim.Adagrad(hidden["embeddings"], lr=ADAGRAD_RATE),
    ]


def state_of(hidden: list[Tensor], before: list[Tensor], model: nn.Module) -> dict[str, Any]:
    """Whether the weights are known to torch, get gradients, and were changed by training."""
    known = {id(parameter) for parameter in model.parameters()}
    saved = {value.data_ptr() for value in model.state_dict().values()}
    return {
        "values": sum(weight.numel() for weight in hidden),
        "in_parameters": sum(id(weight) in known for weight in hidden),
        "in_state_dict": sum(weight.data_ptr() in saved for weight in hidden),
        "tensors": len(hidden),
        "with_gradient": sum(weight.grad is not None and bool(weight.grad.any()) for weight in hidden),
        "largest_change": max(
            float((weight.detach() - old).abs().max()) for weight, old in zip(hidden, before, strict=True)
        ),
    }


def learn(
    settings: dict[str, Any], way: dict[str, Any], stream: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """One way of using the library, over the whole stream: predictions float32 [N, T], and what was found."""
    ids_NF, tags_NL, labels_NT = stream["ids_NF"], stream["tags_NL"], stream["labels_NT"]
    num, batch = len(labels_NT), settings["batch_size"]

    def inputs(part: slice) -> list[Any]:
        ids_BF = ids_NF[part]
        return [np.zeros((len(ids_BF), 0), np.float32), ids_BF, tags_NL[part][:, None, :]]

    model = build(settings, way)
    # The library makes its layers at the first call; they must be there before the optimizer is.
    model(inputs(slice(0, 2)))
    hidden = hidden_weights(model)
    if way.get("first_values"):
        for table in hidden["embeddings"]:
            nn.init.uniform_(table, -way["first_values"], way["first_values"])
    before = {name: [weight.detach().clone() for weight in weights] for name, weights in hidden.items()}
    optimizers = optimizers_of(model, hidden, all_weights=way["all_weights"])
    loss_of = nn.BCELoss()
    scores_NT = np.empty(labels_NT.shape, np.float32)
    start_s = time.process_time()
    for start in range(0, num, batch):
        part = slice(start, min(start + batch, num))
        outputs = model(inputs(part))
        labels_BT = torch.from_numpy(labels_NT[part])
        loss = sum(loss_of(output[:, 0], labels_BT[:, task]) for task, output in enumerate(outputs))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        scores_NT[part] = torch.cat(outputs, dim=1).detach().numpy()
    return scores_NT, {
        "cpu_s": time.process_time() - start_s,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden": {name: state_of(weights, before[name], model) for name, weights in hidden.items()},
    }


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with np.load(settings["stream"], allow_pickle=False) as file:
        stream = dict(file)
    scores, found = {}, {}
    for name, way in settings["ways"].items():
        scores[name], found[name] = learn(settings, way, stream)
    np.savez(settings["scores"], **scores)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
