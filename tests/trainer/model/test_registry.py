"""Every registered model: its name, its weights, its training, its way to serving."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from msgspec.structs import replace

from param_server.client import DOMAIN_INPUT_NAME, INPUT_NAME, OUTPUT_NAME
from tests.trainer.model.equations import NUM_DOMAINS, NUM_TASKS, Built
from trainer.collectives import Ranks
from trainer.config import Config, preset
from trainer.config.schema import TaskConfig
from trainer.errors import ConfigError
from trainer.model import (
    MODELS,
    build_model,
    check_can_be_served,
    kind_of,
    model_of,
    multi_task_loss,
    uses_domain,
)
from trainer.model.base_rates import begin_at_base_rates
from trainer.model.compiled import compile_dense
from trainer.model.l2 import is_bias
from trainer.model.layout import FeatureLayout
from trainer.publish.program import dense_weights, export_program
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

PEPNET_KIND = {"pepnet", "epnet", "ppnet", "pepnet_mmoe", "epnet_mmoe", "ppnet_mmoe"}
SINGLE_TASK = {"deepfm", "dcn", "xdeepfm", "dcnv2"}
MULTI_TASK = {"dcnv2_mt", "shared_bottom", "mmoe", "ple"}
MULTI_DOMAIN = {"ple_md", "shared_top", "specific_top", "specific_all"}
NAMES = sorted(MODELS)


def test_the_models_of_the_comparison_are_all_there() -> None:
    assert set(MODELS) == PEPNET_KIND | SINGLE_TASK | MULTI_TASK | MULTI_DOMAIN
    assert {name for name, kind in MODELS.items() if kind.trained_per == "task"} == SINGLE_TASK
    assert [name for name, kind in MODELS.items() if kind.trained_per == "domain"] == ["specific_all"]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_names_a_paper_and_a_place_in_it(name: str) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}|doi 10\.\d{4}/\S+", MODELS[name].source)
    assert re.search(r"equations? \d|sections? \d", MODELS[name].source)


@pytest.mark.parametrize(
    ("name", "close"),
    [("pepnt", "pepnet"), ("deep_fm", "deepfm"), ("PLE", "ple"), ("sharedbottom", "shared_bottom")],
)
def test_unknown_name_shows_the_closest_ones(name: str, close: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown model '{name}'; the closest are .*\b{close}\b"):
        kind_of(name)


def test_a_name_close_to_none_shows_all() -> None:
    with pytest.raises(ConfigError, match=f"there are {', '.join(NAMES)}"):
        kind_of("42")


def test_options_for_a_model_of_ones_own_are_refused_by_the_others() -> None:
    with pytest.raises(ConfigError, match=r"model\.options: 'depth' .* 'mmoe' does not read it"):
        Built("mmoe", options={"depth": 3})


@pytest.mark.parametrize("name", NAMES)
def test_answers_begin_at_the_base_rates(name: str) -> None:
    built = Built(name, first_layer="hidden")

    def logits(*rates: float) -> np.ndarray:
        tasks = [TaskConfig(name=f"t{number}", base_rate=rate) for number, rate in enumerate(rates)]
        begin_at_base_rates(built.model, tasks)
        with torch.no_grad():
            return built.model(built.embedding_BE, built.domain_B).numpy()

    after_BT, before_BT = logits(0.5, 0.9, 0.001), logits(0.75, 0.5, 0.5)
    expected_T = np.log([1 / 3, 9.0, 1 / 999])
    # As exact as float32 is at the size of the logits: a cross network's may be in the hundreds.
    atol = 4 * float(np.spacing(np.abs([after_BT, before_BT]).max()))
    np.testing.assert_allclose(after_BT - before_BT, np.broadcast_to(expected_T, after_BT.shape), atol=atol)
    assert atol < 1e-3


def test_a_configurations_model_begins_at_its_tasks_base_rates() -> None:
    config = preset("quickstart")
    rates = [task.base_rate for task in config.schema.tasks]
    bias = model_of(config).ppnet.output_bias.detach().sigmoid().flatten().tolist()
    assert bias == pytest.approx(rates)
    assert min(rates) < 0.01


def test_an_output_bias_of_another_size_is_refused() -> None:
    tasks = [TaskConfig(name="rare", base_rate=0.01)] * (NUM_TASKS + 1)
    with pytest.raises(ConfigError, match=rf"expected an output_bias of {NUM_TASKS + 1} values"):
        begin_at_base_rates(Built("mmoe").model, tasks)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_saved_and_gets_a_gradient(name: str) -> None:
    built = Built(name, first_layer="hidden")
    logits_BT = built.model(built.embedding_BE, built.domain_B)
    assert logits_BT.dtype == torch.float32
    # Squared: a sum alone has no gradient through a softmax of equal experts.
    logits_BT.square().sum().backward()
    without = [
        name for name, p in built.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []
    assert set(dict(built.model.named_parameters())) == set(built.model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_first_weights_are_xaviers_and_biases_zero(name: str) -> None:
    """A matrix is what lies in the last two axes; a linear layer keeps one output a task or an expert.

    The first layers of gates lie side by side, and each is cut into what sees the prior and what sees the
    embedding; second layers of a task each are cut out of one matrix.
    """
    config = replace(preset("quickstart").model, name=name)
    torch.manual_seed(0)
    layout = FeatureLayout.of(preset("quickstart").schema)
    model = build_model(layout, num_tasks=6, num_domains=3, config=config)
    for key, parameter in model.named_parameters():
        if is_bias(key):
            assert not parameter.any(), key
            continue
        fan_out, fan_in = parameter.shape[-2:]
        if key in ("first_order.weight", "linear.weight"):
            fan_out = 1
        elif key.endswith("mix.gate.weight"):
            fan_out = config.num_experts
        elif "gate_input." in key:
            gate_input = model.get_submodule(key.partition("gate_input.")[0] + "gate_input")
            fan_in = gate_input.prior.weight.shape[1] + layout.width
            fan_out = config.gate_hidden
        elif re.search(r"ppnet\.(gates\.\d|towers\.\d\.gate|experts\.\d\.gate)\.", key):
            fan_in, fan_out = parameter.shape[1], parameter.shape[0] * parameter.shape[2]
        bound = (6.0 / (fan_in + fan_out)) ** 0.5
        assert parameter.abs().max() <= bound, key
        if parameter.numel() > 500:
            assert parameter.abs().max() > 0.95 * bound, key
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), key


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_products_are_near_and_leave_float32_gradients(name: str) -> None:
    built = Built(name)
    expected_BT = built.model(built.embedding_BE, built.domain_B).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits_BT = built.model(built.embedding_BE, built.domain_B).float()
    scale = expected_BT.abs().max().item()
    torch.testing.assert_close(logits_BT, expected_BT, rtol=0, atol=0.03 * scale)
    logits_BT.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in built.model.parameters())


@pytest.fixture(scope="module")
def small_config(make_config: Callable[..., Config]) -> Config:
    return make_config(batch_size=128)


@pytest.fixture(scope="module")
def batches(small_config: Config, make_batches: Callable[..., list[Impressions]]) -> list[Impressions]:
    """The same for all models."""
    return make_batches(small_config, 12)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_learns_through_the_recommender(
    name: str, ranks: Ranks, small_config: Config, batches: list[Impressions]
) -> None:
    small = replace(small_config.model, name=name, bottom_widths=(16,), cin_rows=(8, 8))
    config = replace(small_config, model=small)
    recommender = Recommender(config, ranks=ranks)
    before = {key: p.detach().clone() for key, p in recommender.dense.named_parameters()}
    losses = []
    for batch in batches:
        scores_NT = recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
        logits = torch.logit(torch.from_numpy(scores_NT).double(), eps=1e-9)
        losses.append(
            multi_task_loss(
                logits,
                labels_BT=torch.from_numpy(batch.labels_NT).double(),
                known_BT=torch.from_numpy(batch.known_NT).double(),
                weight_T=torch.ones(logits.shape[1]),
            ).item()
        )
    assert np.mean(losses[-3:]) < 0.97 * np.mean(losses[:3])
    still = [key for key, p in recommender.dense.named_parameters() if torch.equal(p, before[key])]
    assert still == []
    predicted = recommender.predict(batches[-1])
    assert np.isfinite(predicted).all()
    assert predicted.std(axis=0).min() > 0


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("ple_md", "ppnet_mmoe", "specific_all", "xdeepfm")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
    ],
)
def test_the_exported_program_answers_as_the_model(name: str) -> None:
    """`embeddings` and, for a model that uses it, the domain; weights by name, as a version brings them."""
    built = Built(name)
    model, width = built.model, built.layout.width
    program = export_program(model, embedding_width=width)
    options = onnxruntime.SessionOptions()
    weights = {
        key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in dense_weights(model).items()
    }
    for key, value in weights.items():
        options.add_initializer(key, value)
    session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 300):
        inputs = {INPUT_NAME: torch.randn(batch, width)}
        if name in MULTI_DOMAIN:
            inputs[DOMAIN_INPUT_NAME] = torch.randint(NUM_DOMAINS, (batch,))
        assert [one.name for one in session.get_inputs()] == list(inputs)
        with torch.no_grad():
            expected = torch.sigmoid(model(*inputs.values())).numpy()
        given = {key: value.numpy() for key, value in inputs.items()}
        found = session.run([OUTPUT_NAME], given)[0]
        assert found.shape == (batch, NUM_TASKS)
        # DCNv2's crosses are products of products, whose rounding the two libraries do in another order.
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MULTI_DOMAIN))
def test_a_model_that_uses_the_domain_is_served_where_requests_bring_it(name: str) -> None:
    model = Built(name).model
    assert uses_domain(model)
    config = preset("quickstart")
    config = replace(config, model=replace(config.model, name=name))
    check_can_be_served(model, config=config)
    features = tuple(one for one in config.schema.features if one.name != "domain")
    without = replace(config, schema=replace(config.schema, features=features))
    with pytest.raises(ConfigError, match=rf"model '{name}' .* no feature 'domain'"):
        check_can_be_served(model, config=without)
    check_can_be_served(Built("mmoe").model, config=without)


@pytest.mark.parametrize("name", ["specific_top"])
def test_what_cuts_the_batch_is_not_compiled(name: str) -> None:
    built = Built(name)
    forward = compile_dense(built.model, num_rows=4, width=built.layout.width, precision=torch.float32)
    assert forward is built.model


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - MULTI_DOMAIN))
def test_a_compiled_model_is_the_same_model(name: str) -> None:
    built = Built(name)
    rows = len(built.embedding_BE)
    forward: Any = compile_dense(
        built.model, num_rows=rows, width=built.layout.width, precision=torch.float32
    )
    expected_BT = built.model(built.embedding_BE, None)
    torch.testing.assert_close(forward(built.embedding_BE, None), expected_BT, rtol=1e-4, atol=1e-4)
