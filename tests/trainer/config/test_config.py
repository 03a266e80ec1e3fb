"""Configuration: round trips, and each wrong input named with its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from feature_eviction.policy import AdmissionConfig, ClassPolicy
from param_server.rules_config import RowRules, RulesConfig
from trainer.config import Config, FeatureConfig, load_config, preset, to_toml
from trainer.config.config import IMPRESSIONS_PER_RECORD_MAX, KafkaConfig
from trainer.config.presets import PRESETS
from trainer.errors import ConfigError
from trainer.recommender import policy_of
from trainer.stream.record import RECORD_IMPRESSIONS_MAX

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_printed_preset_reads_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(preset(name)))
    assert load_config(path) == preset(name)
    assert load_config(path).hash() == preset(name).hash()


def test_hashes_tell_configurations_apart() -> None:
    config = preset("quickstart")
    assert replace(config, seed=2).hash() != config.hash()
    assert replace(config, seed=2).schema.hash() == config.schema.hash()
    tasks = config.schema.tasks[:-1]
    assert replace(config.schema, tasks=tasks).hash() != config.schema.hash()


def test_what_gives_rows_no_meaning_leaves_the_schema_hash() -> None:
    schema = preset("quickstart").schema
    feature = replace(
        schema.features[3],
        ttl_s=60,
        min_updates=2,
        max_rows=1000,
        protected=True,
        ids_max=7,
        admission=AdmissionConfig(kind="count", min_count=3),
    )
    changed = replace(
        schema,
        features=(*schema.features[:3], feature, *schema.features[4:]),
        tasks=(replace(schema.tasks[0], loss_weight=0.5), *schema.tasks[1:]),
        positive_task="like",
    )
    assert changed != schema
    assert changed.hash() == schema.hash()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"class_id": 99},
        {"dim": 32},
        {"kind": "single", "bucket_edges": ()},
        {"bucket_edges": (1.0, 3.5)},
        {"role": "other"},
    ],
    ids=str,
)
def test_what_gives_rows_their_meaning_changes_the_schema_hash(change: dict[str, Any]) -> None:
    schema = preset("quickstart").schema
    features = (*schema.features[:-1], replace(schema.features[-1], **change))
    assert replace(schema, features=features).hash() != schema.hash()


def test_order_and_names_of_domains_and_tasks_change_the_schema_hash() -> None:
    schema = preset("quickstart").schema
    others = [
        replace(schema, features=schema.features[::-1]),
        replace(schema, domains=schema.domains[::-1]),
        replace(schema, tasks=schema.tasks[::-1]),
    ]
    assert len({schema.hash(), *(other.hash() for other in others)}) == 4


def test_a_configured_record_fits_what_a_record_may_hold() -> None:
    assert IMPRESSIONS_PER_RECORD_MAX == RECORD_IMPRESSIONS_MAX


def test_features_that_share_rows_agree_on_their_quota() -> None:
    one = FeatureConfig(name="one", class_id=7, dim=16, max_rows=10)
    with pytest.raises(ValueError, match="share class_id 7; their max_rows must be equal"):
        replace(preset("quickstart").schema, features=(one, replace(one, name="two", max_rows=11)))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 1", "sed = 1", "unknown field `sed`"),
        ("seed = 1", 'seed = "one"', r"Expected `int`, got `str` - at `\$\.seed`"),
        ('device = "cpu"', 'device = "tpu"', r"at `\$\.train\.device`"),
        ("bytes_limit = ", "bytes_limt = ", r"at `\$\.tables\[0\]`"),
        ("dim = 16\nbytes", "dim = 24\nbytes", r"features use dims \[16\], tables give dims \[24\]"),
        ('positive_task = "click"', 'positive_task = "clik"', "positive_task 'clik' is not one of"),
        ('kind = "dense"', 'kind = "single"', "bucket_edges belong to kind 'dense'"),
        ("update_limit = 20", "update_limit = -1", "update_limit must not be negative"),
        ('name = "follow"', 'name = "like"', "task names must be unique, found twice: like"),
        ("class_id = 3", "class_id = 4", "share class_id 4"),
        ("class_id = 3", "class_id = 4096", r"class_id must be in 0\.\.4095, found 4096"),
        ("seed = 1", "seed = ", "config.toml"),
        ("seed = 1", "seed = -1", "seed must be at least 0, found -1"),
        ("seed = 1", f"seed = {2**64}", f"seed must be at most {2**64 - 1}, found {2**64}"),
        ("impressions = 200000", "impressions = 0", "impressions must be at least 1, found 0"),
        ("impressions-dead-letters", "impressions", "topic and dead_letter_topic must differ"),
        ('topic = "impressions"', 'topic = "a b"', r"topic must be 1\.\.249 .* found 'a b' - at `\$\.kafka`"),
        ('topic = "impressions"', f'topic = "{"a" * 250}"', r"topic must be 1\.\.249"),
        ("127.0.0.1:9092", "localhost", "bootstrap_servers must be host:port.* found 'localhost'"),
        ("127.0.0.1:9092", "a:1,", "bootstrap_servers must be host:port"),
        ("127.0.0.1:9092", "a:65536", "bootstrap_servers must be host:port"),
        ("num_partitions = 8", "num_partitions = 0", "num_partitions must be at least 1, found 0"),
        ("start_timeout_s = 30", "start_timeout_s = 0", "start_timeout_s must be at least 1"),
        ("prefetch_impressions_max = 16384", "prefetch_impressions_max = 0", "must be at least 1"),
        ("record_bytes_max = 1048576", "record_bytes_max = 0", "record_bytes_max must be at least 1"),
        ("fetch_bytes_max = 8388608", "fetch_bytes_max = -1", "fetch_bytes_max must be at least 1"),
        ("record_bytes_max = 1048576", f"record_bytes_max = {2**31}", "record_bytes_max must be at most"),
        (
            "fetch_bytes_max = 8388608",
            f"fetch_bytes_max = {2**31}",
            "fetch_bytes_max must be at most 2147483647",
        ),
        ("gate_hidden = 64", "gate_hidden = 0", "gate_hidden must be at least 1"),
        ("gate_gamma = 2.0", "gate_gamma = 0.0", r"gate_gamma must be in \(0, 1e\+09\], found 0\.0"),
        ("gate_gamma = 2.0", "gate_gamma = nan", "gate_gamma must be in .*, found nan"),
        ("gate_gamma = 2.0", "gate_gamma = 1e300", "gate_gamma must be in .*, found 1e.300"),
        ("metrics_window = 50000", f"metrics_window = {2**40}", "metrics_window must be at most 10000000"),
        ("batch_wait_ms = 200", "batch_wait_ms = 3600000", "batch_wait_ms must be at most 10000"),
        ("victim_window = 64", f"victim_window = {2**63 - 1}", "victim_window must be at most 2147483647"),
        ("ttl_s = 345600", f"ttl_s = {2**40}", r"ttl_s must be in 1\.\.2\^31-1 seconds"),
        ('group = "freshet-trainer"', 'group = ""', "group must not be empty"),
        ("num_experts = 4", "num_experts = 0", "num_experts must be at least 1, found 0"),
        ("num_own_experts = 1", "num_own_experts = 0", "num_own_experts must be at least 1, found 0"),
        ("ple_levels = 2", "ple_levels = 0", "ple_levels must be at least 1, found 0"),
        ("cross_layers = 3", "cross_layers = -1", "cross_layers must be at least 1, found -1"),
        ("l2 = 0.0", "l2 = -1e-7", "l2 must be at least 0 and finite, found -1e-07"),
        ("l2 = 0.0", "l2 = inf", "l2 must be at least 0 and finite, found inf"),
        ("    32,\n    32,\n", "", r"cin_rows must be one or more widths of at least 1, found \[\]"),
        ("bottom_widths = [\n    100,\n", "bottom_widths = [\n    0,\n", r"bottom_widths .* found \[0\]"),
        ('ppnet_input = "prior_and_embedding"', 'ppnet_input = "all"', r"at `\$\.model\.ppnet_input`"),
        ('name = "pepnet"', "name = 3", r"Expected `str`, got `int` - at `\$\.model\.name`"),
        ("    100,\n    64,\n", "", r"tower_widths must be one or more widths of at least 1, found \[\]"),
        ("    100,\n    64,\n", "    100,\n    0,\n", r"tower_widths .* found \[100, 0\]"),
        (
            "embedding_init_scale = 0.01",
            "embedding_init_scale = -0.01",
            "embedding_init_scale must be in 0",
        ),
        (
            "victim_window = 64",
            "victim_window = 0",
            r"victim_window must be at least 1, found 0 - at `\$\.tables",
        ),
        ("expiry_scan = 256", "expiry_scan = -1", "expiry_scan must be at least 0, found -1"),
        ("count_window_s = 86400", "count_window_s = 0", "count_window_s must be at least 1, found 0"),
        ("bytes_limit = 4194304", "bytes_limit = 0", "bytes_limit must be at least 1"),
        ("num_replicas = 2", "num_replicas = -1", "num_replicas must be at least 0"),
        ("keep_max = 100", "keep_max = 2", "keep_max must be at least 3, found 2"),
        ("keep_s = 0", "keep_s = -1", "keep_s must be at least 0, found -1"),
        ("lease_s = 0", "lease_s = 29", r"lease_s must be 0 or at least twice interval_s \(15\), found 29"),
        ("keep_full = 2", "keep_full = 0", "keep_full must be at least 1"),
        ('"127.0.0.1:0"', '"nowhere"', "shard_address must be host:port or empty, found 'nowhere'"),
        ('"127.0.0.1:0"', '"a:1,b"', "shard_address must be host:port or empty, found 'b'"),
        ('"127.0.0.1:0"', '"a:1,b:2"', r"shard_address must name num_shards \(1\) addresses.* found 2"),
        ("num_shards = 1", "num_shards = 0", "num_shards must be at least 1, found 0"),
        (
            'tls_ca_file = ""',
            'tls_ca_file = "ca.pem"',
            "TLS needs tls_ca_file, tls_cert_file",
        ),
        (
            "gate_auc_drop_max = 0.0",
            "gate_auc_drop_max = 1.0",
            "gate_auc_drop_max must be at least 0",
        ),
        ("auto_rollback = false", "auto_rollback = true", "auto_rollback needs a quality gate"),
        ('gate_task = ""', 'gate_task = "clik"', "publish: gate_task 'clik' is not one of"),
        ("gate_window = 20", "gate_window = 0", "gate_window must be at least 1, found 0"),
        (
            'gate_auc_drop_max = 0.0\ngate_task = ""\ngate_window = 20\ngate_impressions_min = 10000',
            "gate_auc_drop_max = 0.01\ngate_impressions_min = 150001",
            r"publish\.gate_impressions_min must be at most what train\.metrics_window holds "
            r"\(50000 of each of 3 domains\), found 150001",
        ),
        (
            "[publish.rules.by_table]",
            "[publish.rules.by_table.item]\nmin_updates = 2",
            r"publish\.rules: by_table names item; the schema's tables are dim16$",
        ),
        (
            "[publish.rules.by_class]",
            "[publish.rules.by_class.99]\nmin_updates = 2\n[publish.rules.by_class.4]",
            r"publish\.rules: by_class names 99; the schema's feature classes are 1, 2, .*, 9, 10$",
        ),
        ("record_impressions = 64", "record_impressions = 65537", "record_impressions must be at most 65536"),
        ("event_days = 12.0", "event_days = 36501.0", "event_days must be at most 36500"),
        ("loss_weight = 1.0", "loss_weight = -1.0", "task 'like': loss_weight must not be negative"),
        ("ttl_s = 345600", "ttl_s = 0", r"feature 'item_id': ttl_s must be in 1\.\.2\^31-1 seconds, found 0"),
        ("ttl_s = 345600", "max_rows = 0", r"feature 'item_id': max_rows must be in 1\.\.2\^31-1, found 0"),
        ("min_updates = 0", "min_updates = -1", r"min_updates must be in 0\.\.2\^31-1, found -1"),
        (
            "min_updates = 0",
            "min_updates = 3",
            "feature 'domain': min_updates are to be gathered within ttl_s",
        ),
    ],
)
def test_wrong_configuration_is_one_line_with_its_place(
    old: str, new: str, named: str, tmp_path: Path
) -> None:
    text = to_toml(preset("quickstart"))
    assert old in text
    path = tmp_path / "config.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=named) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_features_quota_and_trial_reach_its_id_table() -> None:
    config = preset("quickstart")
    item = replace(config.schema.features[3], max_rows=500, min_updates=2)
    features = (*config.schema.features[:3], item, *config.schema.features[4:])
    config = replace(config, schema=replace(config.schema, features=features))
    classes = {policy.class_id: policy for policy in policy_of_table(config)}
    assert (classes[4].max_rows, classes[4].min_updates, classes[4].ttl_s) == (500, 2, item.ttl_s)
    assert (classes[5].max_rows, classes[5].min_updates) == (None, 0)


def test_a_tables_windows_reach_its_id_table() -> None:
    config = preset("quickstart")
    table = replace(config.tables[0], victim_window=8, expiry_scan=9, count_window_s=3600)
    policy = policy_of(table, num_slots=1000, config=config)
    assert (policy.victim_window, policy.expiry_scan, policy.count_window_s) == (8, 9, 3600)


def test_rules_of_tables_and_classes_that_there_are_read_back(tmp_path: Path) -> None:
    config = preset("quickstart")
    rules = RulesConfig(by_table={"dim16": RowRules(min_updates=2)}, by_class={"4": RowRules(min_updates=3)})
    config = replace(config, publish=replace(config.publish, rules=rules))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path).publish.rules == rules


def policy_of_table(config: Config) -> tuple[ClassPolicy, ...]:
    return policy_of(config.tables[0], num_slots=1000, config=config).classes


@pytest.mark.parametrize("servers", ["a:1", "kafka_1.example:9092, b-2:9093", "[::1]:9092"])
def test_usual_server_lists_are_accepted(servers: str) -> None:
    assert KafkaConfig(bootstrap_servers=servers).bootstrap_servers == servers


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(to_toml(preset("quickstart")).encode() + b"# \xff\n")
    with pytest.raises(ConfigError, match=r"config\.toml: not UTF-8"):
        load_config(path)


def test_missing_file_and_unknown_preset_are_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_config(Path("nowhere.toml"))
    with pytest.raises(ConfigError, match=r"unknown preset 'quikstart' .did you mean 'quickstart'") as caught:
        preset("quikstart")
    assert str(caught.value).endswith("there are: kuairand, one_domain, paper, quickstart, seesaw")
    with pytest.raises(ConfigError, match="unknown preset '42'; there are"):
        preset("42")


def field_names(kind: type[msgspec.Struct]) -> list[str]:
    names = []
    for field in msgspec.structs.fields(kind):
        names.append(field.name)
        for inner in getattr(field.type, "__args__", (field.type,)):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                names.extend(field_names(inner))
    return names


def test_every_field_is_read_somewhere() -> None:
    """An option that is accepted and then ignored is a lie; `preset` alone is a label."""
    sources = [
        path.read_text()
        for package in ("trainer", "param_server", "feature_eviction")
        for path in (REPOSITORY / package).rglob("*.py")
        if "_pb2" not in path.name
    ]
    code = "\n".join(sources)
    unread = [
        name
        for name in sorted(set(field_names(Config)) - {"preset"})
        if not re.search(rf"\.{name}\b(?!\s*=[^=])", code)
    ]
    assert unread == []


def test_several_shards_are_named_with_commas() -> None:
    serving = replace(
        preset("quickstart").serving, shard_address="127.0.0.1:7000, 127.0.0.1:7001", num_shards=2
    )
    assert serving.shard_addresses == ("127.0.0.1:7000", "127.0.0.1:7001")
    assert replace(serving, shard_address="").shard_addresses == ()


def test_the_papers_sizes_are_a_preset() -> None:
    """PEPNet, arXiv 2302.01115, section 4.1; the stream is seesaw's."""
    paper, seesaw = preset("paper"), preset("seesaw")
    assert paper.produce == seesaw.produce
    assert {feature.dim for feature in paper.schema.features} == {40}
    assert [table.dim for table in paper.tables] == [40]
    assert (paper.model.tower_widths, paper.model.gate_gamma) == ((100, 64), 2.0)
    assert (paper.train.batch_size, paper.optimizer.dense_learning_rate) == (1024, 1e-3)
    assert paper.model.l2 in (1e-7, 1e-5, 1e-3)
    assert paper.model.num_experts in (4, 6, 8)
