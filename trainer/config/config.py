"""The configuration of a run: frozen structs, each part owning its section.

A deployment writes TOML (`python -m trainer config` prints one), an experiment calls a preset.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import tomli_w

from feature_eviction.policy import ScoreConfig
from param_server.client import RulesConfig
from trainer.config.explained import explained
from trainer.config.schema import SchemaConfig, table_name
from trainer.errors import ConfigError

IMPRESSIONS_PER_RECORD_MAX = 65_536
EVENT_DAYS_MAX = 36_500
"""A century: event times stay far inside the 32-bit seconds of the id tables."""
SEED_MAX = 2**64 - 1
"""PyTorch's generators take no more."""
INT32_MAX = 2**31 - 1
KAFKA_BYTES_MAX = INT32_MAX
"""Kafka's protocol says sizes in 32 bits."""
FACTOR_MAX = 1e9
"""Beyond it a factor or an accumulator leaves float32 soon."""
METRICS_WINDOW_MAX = 10_000_000
"""Of each domain, and all of it in memory."""
BATCH_WAIT_MS_MAX = 10_000
"""Nothing else is heeded while a batch is waited for: no stop, no version, no checkpoint."""

FirstLayer = Literal["epnet_output", "hidden"]
EPNetInput = Literal["domain_and_embedding", "domain"]
EPNetGate = Literal["element", "field"]
PPNetInput = Literal["prior_and_embedding", "prior"]

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_HOST_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def is_host_port(address: str) -> bool:
    """Whether the text is host:port or [IPv6]:port, the port in 0..65535."""
    found = _HOST_PORT.fullmatch(address)
    return found is not None and int(found.group(1)) <= 65_535


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every section is: frozen, keyword-only, closed to unknown keys."""

    def _check_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")

    def _check_at_most(self, most: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) <= most:
                raise ValueError(f"{name} must be at most {most}, found {getattr(self, name)}")


class ModelConfig(Section, frozen=True, kw_only=True):
    """Which dense model, its sizes and its named options; PEPNet's are the paper's (arXiv 2302.01115)."""

    name: str = "pepnet"
    """A name of trainer/model/registry.py, or `module:Class` of a model of your own."""
    tower_widths: tuple[int, ...] = (100, 64)
    """Hidden layers of every task tower, and of the deep networks of DeepFM, DCN, xDeepFM and DCNv2."""
    bottom_widths: tuple[int, ...] = (100,)
    """Hidden layers below the towers: of a shared or a domain's own bottom, and of each expert."""
    num_experts: int = 4
    """MMoE's experts, PLE's shared ones; the paper tries 4, 6 and 8."""
    num_own_experts: int = 1
    """PLE's experts of each group's own, at each level."""
    ple_levels: int = 2
    """Levels of PLE's experts; 1 = CGC."""
    cross_layers: int = 3
    """Cross layers of DCN and DCNv2."""
    cin_rows: tuple[int, ...] = (32, 32)
    """Rows of each layer of xDeepFM's interaction network."""
    l2: float = 0.0
    """L2 regularisation of the dense model: l2 / 2 * (sum of squares of all its weights, biases excepted) is
    added to the loss of each impression. Rows of the tables are not regularised: one that is not in a batch
    would have to move. The paper tries 1e-7, 1e-5 and 1e-3."""
    gate_hidden: int = 64
    """Width of each gate's hidden layer."""
    gate_gamma: float = 2.0
    """The gate's range is (0, gamma)."""
    first_layer: FirstLayer = "epnet_output"
    """H^(1) of equation 8: EPNet's output itself, or a first hidden layer on it."""
    epnet_input: EPNetInput = "domain_and_embedding"
    """The KDD version's input, or the early version's."""
    epnet_gate: EPNetGate = "element"
    """One gate value for each element of the embedding, or one a feature."""
    ppnet_input: PPNetInput = "prior_and_embedding"
    """What PPNet's gates see: the equation's input, or the prior alone."""
    gate_input_gradient: bool = False
    """Let the gates train the embedding that they see, where the equations stop the gradient."""
    options: dict[str, str | int | float | bool] = {}
    """What a model of your own reads; the models of this package have the options above."""
    compile: bool = False
    """Train through torch.compile; needs a C++ compiler (GPU: Triton) and some tens of seconds at a start."""

    def __post_init__(self) -> None:
        for name in ("tower_widths", "bottom_widths", "cin_rows"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1:
                raise ValueError(f"{name} must be one or more widths of at least 1, found {list(widths)}")
        self._check_at_least(1, "gate_hidden", "num_experts", "num_own_experts", "ple_levels", "cross_layers")
        # A file's values are checked as it is read; an experiment's, made by replace, are checked here.
        for name, kind in (
            ("first_layer", FirstLayer),
            ("epnet_input", EPNetInput),
            ("epnet_gate", EPNetGate),
            ("ppnet_input", PPNetInput),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {choices}, found '{getattr(self, name)}'")
        if not 0 <= self.l2 < math.inf:
            raise ValueError(f"l2 must be at least 0 and finite, found {self.l2}")
        if not 0 < self.gate_gamma <= FACTOR_MAX:
            raise ValueError(f"gate_gamma must be in (0, {FACTOR_MAX:g}], found {self.gate_gamma}")


class OptimizerConfig(Section, frozen=True, kw_only=True):
    """Row-wise AdaGrad for embeddings, Adam for the dense part; by name: trainer/config/optimizers.py."""

    embedding: Literal["adagrad", "adam"] = "adagrad"
    """adagrad: row-wise, 4 bytes a row. adam: 8 bytes a value, for comparisons alone: `train` and `run`
    refuse it, since checkpoints do not hold its state."""
    embedding_learning_rate: float = 0.05
    """AdaGrad's."""
    embedding_eps: float = 1e-6
    """AdaGrad's."""
    embedding_initial_accumulator: float = 0.0
    """AdaGrad's mean of squares of a new row. At 0 its first step has the same length for every gradient, the
    learning rate times the root of the dim; above, small gradients make small steps."""
    embedding_adam_learning_rate: float = 1e-3
    """Adam's; a rate for AdaGrad is far too high for it."""
    embedding_init_scale: float = 0.01
    """A new row is uniform in [-scale, scale], a pure function of (seed, id)."""
    dense_learning_rate: float = 1e-3
    """Adam's, of the dense model."""

    def __post_init__(self) -> None:
        for name in (
            *("embedding_learning_rate", "embedding_eps"),
            *("embedding_adam_learning_rate", "dense_learning_rate"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("embedding_init_scale", "embedding_initial_accumulator"):
            if not 0 <= getattr(self, name) <= FACTOR_MAX:
                raise ValueError(f"{name} must be in 0..{FACTOR_MAX:g}, found {getattr(self, name)}")


class TableConfig(Section, frozen=True, kw_only=True):
    """The one shared table of a dim: its budget and its score."""

    dim: int
    """The features of this dim are in it; its name is `dim16` for 16."""
    bytes_limit: int
    """Everything the table may use: rows, optimizer state and id table together, over all ranks."""
    score: ScoreConfig = ScoreConfig()
    victim_window: int = 64
    """Slots examined for one victim; at a rank's number of slots or more it is the exact minimum."""
    expiry_scan: int = 256
    """Due rows that each batch examines for expiry, on each rank."""
    count_window_s: int = 86_400
    """Admission by count counts by windows of event time: when the next one begins, all counts are halved."""

    def __post_init__(self) -> None:
        self._check_at_least(1, "dim", "bytes_limit", "victim_window", "count_window_s")
        self._check_at_least(0, "expiry_scan")
        self._check_at_most(INT32_MAX, "victim_window", "count_window_s", "expiry_scan")

    @property
    def name(self) -> str:
        return table_name(self.dim)


class TrainConfig(Section, frozen=True, kw_only=True):
    """The loop: batch, device, metrics."""

    batch_size: int = 1024
    """Impressions of one step over all ranks together."""
    batch_wait_ms: int = 200
    """A batch that has not filled within this time is trained as it is."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where rows and dense model are; with cuda each rank takes a GPU of its own."""
    num_threads: int = 1
    """PyTorch's threads in each rank."""
    rank_timeout_s: int = 120
    """A rank that does not hear from another for so long ends, and torchrun starts all of them anew. Longer
    than the slowest rank takes to load its share of a checkpoint."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the dense model's products run in while it learns. Weights, embeddings, loss and all predictions
    for serving are float32 in either case."""
    metrics_window: int = 50_000
    """Newest impressions of each domain that AUC and GAUC look at, over all ranks."""
    ledger: bool = False
    """Count how often each impression was applied, for checking: up to 36 bytes each, for the whole run."""
    warm_up_steps: int = 0
    """Steps over which the dense learning rate rises, by equal parts, to its full value; 0 = at once."""
    warm_up: Literal["start", "resume", "both"] = "start"
    """When it rises: in the first steps of the model, which a trainer that is killed goes on with where it
    was; from each checkpoint that training resumes from, where the stream may have moved meanwhile; or both.
    With resume and both, a run that was interrupted ends in another state than one that was not."""
    task_scaling: Literal["none", "by_positives"] = "none"
    """by_positives: divide each task's loss by its running rate of positives (trainer/task_scaling.py), on
    top of the schema's loss_weight: a rare task then weighs as much as a frequent one."""
    non_finite_share_max: float = 0.05
    """Of the newest non_finite_window impressions, how many may be in batches that were skipped as their loss
    or a gradient was not finite, before the run stops; 1 = never stop."""
    non_finite_window: int = 100_000
    """The newest impressions of all ranks that this share is of; what was not seen yet counts as good."""

    def __post_init__(self) -> None:
        self._check_at_least(
            1, "batch_size", "batch_wait_ms", "num_threads", "metrics_window", "non_finite_window"
        )
        self._check_at_most(BATCH_WAIT_MS_MAX, "batch_wait_ms")
        self._check_at_most(METRICS_WINDOW_MAX, "metrics_window")
        self._check_at_least(10, "rank_timeout_s")
        self._check_at_least(0, "warm_up_steps")
        if not 0 <= self.non_finite_share_max <= 1:
            raise ValueError(f"non_finite_share_max must be in 0..1, found {self.non_finite_share_max}")


class KafkaConfig(Section, frozen=True, kw_only=True):
    """Where impressions come from. Security settings come from the environment (docs/operations.md)."""

    bootstrap_servers: str = "127.0.0.1:9092"
    """host:port of one or more brokers, with commas between."""
    topic: str = "impressions"
    """What is trained; created where it is missing, unless the run has positions in it."""
    dead_letter_topic: str = "impressions-dead-letters"
    """What is refused or skipped, with the reason and its origin."""
    group: str = "freshet-trainer"
    """Committed offsets of this group are for lag displays and pacing; training never reads them."""
    num_partitions: int = 8
    """Used when the topic has to be created."""
    record_bytes_max: int = 1 << 20
    """A longer record is refused; also how much of a partition one fetch asks for."""
    fetch_bytes_max: int = 8 << 20
    """How much of all partitions together one fetch asks a broker for."""
    prefetch_impressions_max: int = 16_384
    """Decoded impressions waiting for training; the source stops fetching beyond it, but may always hold a
    whole batch."""
    start_timeout_s: int = 30
    """How long a process that starts waits for a broker's answer."""
    order: Literal["strict", "loose"] = "loose"
    """strict: each batch takes a fixed share of every partition, so batches depend on the stream alone and
    an idle partition holds training up. loose: a batch takes what is there, oldest first
    (trainer/stream/order.py)."""
    begin: Literal["oldest", "newest"] = "oldest"
    """Where a run without a checkpoint begins: at the oldest records that the topic holds, or behind the
    newest. There it saves a checkpoint at once, so that it goes on from there whatever happens; partitions
    that are added later are read from their oldest record."""
    bad_share_max: float = 0.1
    """Of the newest bad_window impressions, how many may be refused before the run stops; 1 = never stop."""
    bad_window: int = 10_000
    """The newest impressions of each rank that this share is of; what was not seen yet counts as good."""
    event_time_future_s_max: int = 3_600
    """An event later than this after its record's Kafka timestamp is refused: it would move the event
    clock."""
    event_time_past_s_max: int = 0
    """An event earlier than this before its record's Kafka timestamp is refused; 0 = none is, so that
    history can be replayed."""

    def __post_init__(self) -> None:
        for name in ("topic", "dead_letter_topic"):
            if not _TOPIC.fullmatch(getattr(self, name)):
                raise ValueError(
                    f"{name} must be 1..249 characters of A-Z a-z 0-9 . _ -, found '{getattr(self, name)}'"
                )
        if self.topic == self.dead_letter_topic:
            # One bad record would be read back and written again for ever.
            raise ValueError(f"topic and dead_letter_topic must differ, found '{self.topic}' twice")
        if not all(is_host_port(server.strip()) for server in self.bootstrap_servers.split(",")):
            raise ValueError(
                f"bootstrap_servers must be host:port[,host:port], found '{self.bootstrap_servers}'"
            )
        self._check_at_least(
            1,
            *("num_partitions", "record_bytes_max", "fetch_bytes_max"),
            *("prefetch_impressions_max", "start_timeout_s", "bad_window", "event_time_future_s_max"),
        )
        if not self.group:
            raise ValueError("group must not be empty: the embedded broker's producer waits for its commits")
        self._check_at_least(0, "event_time_past_s_max")
        self._check_at_most(KAFKA_BYTES_MAX, "record_bytes_max", "fetch_bytes_max")
        if not 0 <= self.bad_share_max <= 1:
            raise ValueError(f"bad_share_max must be in 0..1, found {self.bad_share_max}")


class PublishConfig(Section, frozen=True, kw_only=True):
    """When versions are made and which rows they carry."""

    interval_ms: int = 500
    """From one version's beginning to the next one's, at least."""
    idle_interval_ms: int = 10_000
    """While nothing is trained, if that is longer: such a version brings what the rules held back before, and
    says that the trainer lives."""
    full_every: int = 100
    """Each so many versions a full one is published; bounds the chain a new replica loads."""
    rules: RulesConfig = RulesConfig()
    segment_bytes_max: int = 4 << 20
    """The longest RowSegment of a version or a checkpoint: rows beyond it go into further ones."""
    request_timeout_s: int = 30
    """How long a shard may take to answer a request, a restart included."""
    gate_auc_drop_max: float = 0.0
    """The quality gate: a version is held while the windowed AUC is lower than the best of the last published
    ones by more than this; 0 = no gate. The AUC is that of `train.metrics_window`."""
    gate_task: str = ""
    """The task whose AUC is looked at; empty = the schema's positive task."""
    gate_window: int = 20
    """How many published versions the best is of."""
    gate_impressions_min: int = 10_000
    """With fewer labelled impressions in the window AUC is too uncertain: the version passes, and is not
    remembered."""
    auto_rollback: bool = False
    """When the gate holds a version, publish the best of the last published ones again, once."""

    def __post_init__(self) -> None:
        self._check_at_least(1, "interval_ms", "idle_interval_ms", "full_every", "request_timeout_s")
        self._check_at_least(1, "gate_window", "gate_impressions_min")
        if not 0 <= self.gate_auc_drop_max < 1:
            raise ValueError(
                f"gate_auc_drop_max must be at least 0 and below 1, found {self.gate_auc_drop_max}"
            )
        if self.auto_rollback and not self.gate_auc_drop_max:
            raise ValueError("auto_rollback needs a quality gate: gate_auc_drop_max above 0")
        if not 1 << 16 <= self.segment_bytes_max <= 4 << 20:
            raise ValueError(f"segment_bytes_max must be in 64 KiB..4 MiB, found {self.segment_bytes_max}")


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """Where and how often the whole state is saved."""

    directory: str = ""
    """A local path or any fsspec address, `s3://bucket/run` for one; empty = `checkpoints/` in the run
    directory."""
    interval_s: int = 15
    """From one save to the next."""
    keep: int = 3
    """The newest so many always stay."""
    keep_s: int = 0
    """Older ones stay while they are younger than this, ..."""
    keep_max: int = 100
    """... but never more than this many altogether: the directory is bounded."""
    lease_s: int = 0
    """Where the store has no locks: how long after a save the directory is taken; 0 = 4 intervals."""

    def __post_init__(self) -> None:
        self._check_at_least(1, "interval_s", "keep")
        self._check_at_least(0, "keep_s", "lease_s")
        self._check_at_least(self.keep, "keep_max")
        if 0 < self.lease_s < 2 * self.interval_s:
            # It is renewed by saving: one late save must not lose it.
            raise ValueError(
                f"lease_s must be 0 or at least twice interval_s ({self.interval_s}), found {self.lease_s}"
            )

    @property
    def lease_used_s(self) -> int:
        return self.lease_s or 4 * self.interval_s


class ServingConfig(Section, frozen=True, kw_only=True):
    """The processes that `python -m trainer run` starts around the trainer."""

    shard_address: str = "127.0.0.1:0"
    """Of every shard, shard 0 first, with commas between; port 0 = any free port; empty = a trainer that
    publishes nothing."""
    num_shards: int = 1
    """Shards of rows that `trainer run` starts on one log; a log keeps the number that it was made with."""
    tls_ca_file: str = ""
    """PEM of the authority whose certificate the shards must show; empty = no TLS, only on loopback."""
    tls_cert_file: str = ""
    """PEM of the trainer's certificate."""
    tls_key_file: str = ""
    """PEM of that certificate's key."""
    num_replicas: int = 2
    """Replicas that `trainer run` starts."""
    row_format: Literal["float32", "float16", "int8"] = "float32"
    """How versions carry a row's values; int8 adds a scale and a bias to each row."""
    keep_full: int = 2
    """Full versions kept in the log, with the deltas that follow the oldest of them."""

    def __post_init__(self) -> None:
        for address in self.shard_addresses:
            if not is_host_port(address):
                raise ValueError(f"shard_address must be host:port or empty, found '{address}'")
        given = [bool(name) for name in (self.tls_ca_file, self.tls_cert_file, self.tls_key_file)]
        if any(given) and not all(given):
            raise ValueError("TLS needs tls_ca_file, tls_cert_file and tls_key_file together")
        self._check_at_least(0, "num_replicas")
        self._check_at_least(1, "keep_full", "num_shards")
        found = len(self.shard_addresses)
        any_port = found == 1 and self.shard_addresses[0].endswith(":0")
        if found not in (0, self.num_shards) and not any_port:
            raise ValueError(
                f"shard_address must name num_shards ({self.num_shards}) addresses, or one with port 0, "
                f"found {found}"
            )

    @property
    def shard_addresses(self) -> tuple[str, ...]:
        """Shard 0 first; empty: nothing is published."""
        return tuple(one.strip() for one in self.shard_address.split(",")) if self.shard_address else ()


class ProduceConfig(Section, frozen=True, kw_only=True):
    """The synthetic stream and the pace of the producer."""

    impressions_per_s: int = 2_000
    """The producer's pace, also through a recording."""
    record_impressions: int = 64
    """Impressions of one record."""
    scale: float = 0.02
    """Share of PEPNet's Table 1 populations."""
    event_days: float = 12.0
    """Event time that the whole stream spans."""
    domain_conflict: float = 0.0
    """One less the correlation that two domains keep of tastes and effects (docs/data.md); 0 = all of it."""
    task_conflict: float = 0.0
    """One less the correlation that a task keeps with click."""
    taste_spread: float = 0.35
    """How differently domains and tasks weigh the dimensions of taste: deviation of a weight's logarithm."""
    taste_scale: float = 1.0
    """How strongly the product of a user's and an item's taste moves every logit; 0 = no such product."""
    group_taste_share: float = 0.75
    """Share of a user's taste that is the group's, a plain feature; 1 = nobody has a taste of their own."""
    group_effect_share: float = 0.4
    """The same of how freely a user clicks, likes, ..."""

    def __post_init__(self) -> None:
        for name in ("impressions_per_s", "record_impressions", "scale", "event_days"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("taste_spread", "taste_scale"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"{name} must be in 0..10, found {getattr(self, name)}")
        for name in ("domain_conflict", "task_conflict", "group_taste_share", "group_effect_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, found {getattr(self, name)}")
        self._check_at_most(IMPRESSIONS_PER_RECORD_MAX, "record_impressions")
        self._check_at_most(EVENT_DAYS_MAX, "event_days")


class Config(Section, frozen=True, kw_only=True):
    """One run, whole."""

    preset: str
    """The configuration's name; nothing depends on it."""
    seed: int = 1
    """Of first weights and rows, of admission by probability, and of the synthetic stream."""
    impressions: int = 200_000
    """Length of the synthetic stream; of a recording `run` plays no more either."""
    schema: SchemaConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    tables: tuple[TableConfig, ...]
    train: TrainConfig = TrainConfig()
    kafka: KafkaConfig = KafkaConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    serving: ServingConfig = ServingConfig()
    produce: ProduceConfig = ProduceConfig()

    def __post_init__(self) -> None:
        self._check_at_least(0, "seed")
        self._check_at_most(SEED_MAX, "seed")
        self._check_at_least(1, "impressions")
        budgeted = sorted(table.dim for table in self.tables)
        if budgeted != self.schema.dims:
            raise ValueError(
                f"tables: one table a dim is needed; features use dims {self.schema.dims}, "
                f"tables give dims {budgeted}"
            )
        if self.publish.gate_task not in ("", *self.schema.task_names):
            raise ValueError(
                f"publish: gate_task '{self.publish.gate_task}' is not one of {self.schema.task_names}"
            )
        self._check_rules()
        window, num_domains = self.train.metrics_window, len(self.schema.domains)
        if self.publish.gate_auc_drop_max and self.publish.gate_impressions_min > window * num_domains:
            # AUC would never be certain enough, and every version would pass.
            raise ValueError(
                "publish.gate_impressions_min must be at most what train.metrics_window holds "
                f"({window} of each of {num_domains} domains), found {self.publish.gate_impressions_min}"
            )

    def _check_rules(self) -> None:
        """Rules of a table or class without rows would be accepted and ignored."""
        rules = self.publish.rules
        class_ids = sorted({feature.class_id for feature in self.schema.features})
        for key, what, given, known in (
            ("by_table", "tables", rules.by_table, [table_name(dim) for dim in self.schema.dims]),
            ("by_class", "feature classes", rules.by_class, [str(class_id) for class_id in class_ids]),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(
                    f"publish.rules: {key} names {', '.join(unknown)}; the schema's {what} are "
                    f"{', '.join(known)}"
                )

    def hash(self) -> str:
        """A short digest of the whole configuration."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


def load_config(path: Path) -> Config:
    """Read a TOML file.

    Raises: ConfigError naming the file and the path of the wrong key.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8 text") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {explained(error, of=Config)}") from error


def to_toml(config: Config) -> str:
    """The configuration as TOML that load_config reads back to an equal value."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(config)))


def _without_none(value: Any) -> Any:
    """TOML has no null: an absent key means the default, which is None where None is allowed."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
