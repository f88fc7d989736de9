"""What the one YAML file that steers the agent may say; `config_file.load` reads it.

Every section is frozen, every key has a default that works, and a key the schema does not know is
refused. The sentence under a key is its description in editors and in `configs/default.yaml`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

#: Environment variables that fill secrets; they win over the file so that files can be shared.
SECRETS = {
    "TTA_KAFKA_SASL_PASSWORD": ("kafka", "sasl_password"),
    "TTA_KAFKA_SSL_KEY_PASSWORD": ("kafka", "ssl_key_password"),
}

#: In front of a folder that open_clip loads by itself, as open_clip has it.
LOCAL_DIR = "local-dir:"

#: Host and port; an IPv6 address stands in brackets.
_ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Topic = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
Timeout = Annotated[float, Field(ge=1, le=3600)]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it might be a secret
        use_attribute_docstrings=True,
    )


def _refuse(contradictions: Iterable[str]) -> None:
    found = list(contradictions)
    if found:
        raise ValueError("\n".join(found))  # one fault a line


def _refuse_folder(topic: str) -> str:
    if topic in (".", ".."):
        raise ValueError(f"Kafka keeps no topic of the name {topic!r}")
    return topic


class KafkaConfig(Section):
    """How to reach Kafka, and the topics."""

    bootstrap_servers: Text = "localhost:9092"
    """Brokers to ask for the cluster, as host:port with commas between."""
    group_id: Text = "tta-agent"
    """Consumer group; agents of one group share the partitions."""
    frames_topic: Topic = "frames"
    """Topic that frames are read from."""
    verdicts_topic: Topic = "verdicts"
    """Topic that verdicts are written to."""
    dead_letter_topic: Topic = "frames.dead-letter"
    """Topic that frames which cannot be read are written to, with the reason in headers."""
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    """Where a group without committed offsets begins."""
    session_timeout_s: Timeout = 45.0
    """Seconds without a heartbeat after which the broker gives our partitions to others."""
    max_poll_interval_s: Timeout = 300.0
    """Seconds a batch may take before the agent counts as stuck and leaves the group."""
    delivery_timeout_s: Timeout = 30.0
    """Seconds to wait until the broker acknowledges what was sent."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the connection is encrypted (SSL) and authenticated (SASL)."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """How the password is presented; needed with SASL."""
    sasl_username: str | None = None
    """User name; needed with SASL."""
    sasl_password: SecretStr | None = None
    """Needed with SASL; better set by the environment variable TTA_KAFKA_SASL_PASSWORD."""
    ssl_ca_file: str | None = None
    """Certificate authorities to trust, as PEM; null trusts those of the system."""
    ssl_certificate_file: str | None = None
    """The agent's own certificate, as PEM, where brokers ask for one."""
    ssl_key_file: str | None = None
    """The private key of that certificate, as PEM."""
    ssl_key_password: SecretStr | None = None
    """What unlocks the key; better set by the environment variable TTA_KAFKA_SSL_KEY_PASSWORD."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _addresses(cls, servers: str) -> str:
        _refuse(
            f"expected host:port, got {server.strip()!r}"
            for server in servers.split(",")
            if not _ADDRESS.fullmatch(server.strip())
        )
        return servers

    @field_validator("frames_topic", "verdicts_topic", "dead_letter_topic")
    @classmethod
    def _no_folder(cls, topic: str) -> str:
        return _refuse_folder(topic)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse(self._contradictions())
        return self

    def _contradictions(self) -> Iterable[str]:
        protocol = self.security_protocol
        sasl = ("sasl_mechanism", "sasl_username", "sasl_password")
        missing = [key for key in sasl if getattr(self, key) is None]
        if protocol.startswith("SASL") and missing:
            yield f"security_protocol {protocol} also needs {', '.join(missing)}"
        # Secrets are left out: a variable that is set for every agent contradicts nobody.
        unused = [] if protocol.startswith("SASL") else ["sasl_mechanism", "sasl_username"]
        if not protocol.endswith("SSL"):
            unused += ["ssl_ca_file", "ssl_certificate_file", "ssl_key_file"]
        for key in unused:
            if getattr(self, key) is not None:
                yield f"security_protocol {protocol} makes no use of {key}"
        if (self.ssl_certificate_file is None) != (self.ssl_key_file is None):
            yield "ssl_certificate_file and ssl_key_file need each other"
        if self.frames_topic in (self.verdicts_topic, self.dead_letter_topic):
            yield "frames_topic must differ from the topics that are written to"
        if self.verdicts_topic == self.dead_letter_topic:
            yield "verdicts_topic and dead_letter_topic must differ"
        if self.max_poll_interval_s < self.session_timeout_s:
            yield "max_poll_interval_s must be at least session_timeout_s"


class SourceConfig(Section):
    """Where frames come from."""

    kind: Literal["kafka", "directory", "video"] = "kafka"
    """Kafka, a folder of images, or a video file."""
    path: Text | None = None
    """Folder of images or video file; needed for those two."""
    camera: Text = "camera-0"
    """Camera id of frames from a folder or a video."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "kafka" and self.path is None:
            raise ValueError(f"kind {self.kind} also needs path")
        if self.kind == "kafka" and self.path is not None:
            raise ValueError("kind kafka makes no use of path")
        return self


class SinkConfig(Section):
    """Where verdicts and dead letters go."""

    kind: Literal["kafka", "jsonl"] = "kafka"
    """Kafka, or one JSON object a line on standard output."""


class DecodeConfig(Section):
    """Bounds on a frame, checked before its pixels are allocated."""

    max_bytes: Annotated[int, Field(gt=0, le=2**30)] = 8 * 1024 * 1024
    """Bytes of an encoded frame; larger ones are dead-lettered."""
    max_pixels: Annotated[int, Field(gt=0, le=10**9)] = 40_000_000
    """Pixels of a frame; larger ones are dead-lettered."""
    workers: Annotated[int, Field(gt=0, le=256)] = 2
    """Threads that decode."""


class BatchConfig(Section):
    """How many frames are encoded together, and how long the first of them waits."""

    max_size: Annotated[int, Field(gt=0, le=4096)] = 32
    """Frames in a batch, at most."""
    max_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = 50.0
    """Milliseconds the first frame of a batch waits for others."""


class ModelConfig(Section):
    """The open_clip model, the operator's labels and the prompts."""

    name: Text = "offline"
    """'offline' for the checkpoint that is shipped, any open_clip architecture such as ViT-B-16,
    or local-dir:FOLDER for a folder with open_clip_config.json and weights."""
    pretrained: str | None = None
    """Hub tag such as 'openai', or a checkpoint file; null where the weights come with the name."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the image encoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes CUDA where there is one."""
    labels: Annotated[list[str], Field(min_length=2)] = [
        "person",
        "dog",
        "cat",
        "bird",
        "bicycle",
        "car",
        "truck",
        "bus",
        "boat",
        "airplane",
    ]
    """The operator's own labels, two or more."""
    templates: Annotated[list[str], Field(min_length=1)] = [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ]
    """Prompts whose text features are averaged; '{}' stands for the label."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        # As the tokenizer reads them: it folds case and runs of space.
        read = Counter(" ".join(label.lower().split()) for label in labels)
        if "" in read:
            raise ValueError("a label is empty")
        _refuse(f"label given twice: {label!r}" for label, count in read.items() if count > 1)
        _refuse(
            f"label is not Unicode text: {label!r}"
            for label in labels
            if any("\ud800" <= character <= "\udfff" for character in label)
        )
        return labels

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        _refuse(
            f"a template needs exactly one {{}}: {template!r}"
            for template in templates
            if template.count("{}") != 1 or template.replace("{}", "").count("{")
        )
        return templates

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        has_weights = self.name == "offline" or self.name.startswith(LOCAL_DIR)
        if has_weights and self.pretrained is not None:
            raise ValueError(f"{self.name!r} has its own weights: remove pretrained")
        if not has_weights and self.pretrained is None:
            raise ValueError(
                f"{self.name!r} without pretrained would run random weights: "
                "name a hub tag or a checkpoint file"
            )
        return self


class AdaptConfig(Section):
    """Which strategy adapts, and what it may spend."""

    strategy: Literal["continual", "frozen"] = "continual"
    """How the model follows its domain; frozen does not, and is the baseline."""
    budget: Fraction = 0.10
    """Adaptation time as a share of inference time."""
    audit: Fraction = 0.02
    """Share of batches also encoded without alignment, to watch the adapter; frames that seem to be
    in a domain not theirs always are."""
    max_domains: Annotated[int, Field(gt=0, le=64)] = 32
    """Domains that are remembered; each has an adapter of its own."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""


class OodConfig(Section):
    """When a frame counts as unknown."""

    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of normal frames that may be flagged as unknown."""
    score: Literal["ensemble", "neglabel", "energy", "ablated_energy", "max_logit", "mcm"] = (
        "ensemble"
    )
    """What tells the unknown: negative labels and the energy together, or one of them, the energy
    without its leading temperature, the largest logit, or maximum concept matching. Negative labels
    need a calibration; without one, ablated_energy takes the place of neglabel and ensemble."""


class DriftConfig(Section):
    """How drift is measured."""

    window: Annotated[int, Field(ge=32, le=8192)] = 64
    """Frames of a camera that are compared with the calibration; of a site four times as many."""
    false_alarm_every: Annotated[int, Field(ge=10_000, le=10**12)] = 1_000_000
    """Frames that pass between two false alarms, for each detector and camera."""
    site: Text = "default"
    """Site of cameras whose id names none; 'plant-3/gate' is of the site 'plant-3'."""


class HttpConfig(Section):
    """The port of /metrics, /healthz and /readyz."""

    host: Text = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9108
    """Port to listen on; 0 takes any that is free."""
    stalled_after_s: Seconds = 60.0
    """/healthz fails when the loop stands still for so many seconds."""
    max_cameras: Positive = 200
    """Cameras with series of their own in /metrics; the rest share 'other'."""


class NoveltyConfig(Section):
    """Where unknown frames are kept for people to look at: a folder, a topic, or nowhere."""

    directory: Text | None = None
    """Folder that gets a picture and a JSON file for each kept frame; 'tta-agent review' shows
    it. One agent writes to a folder."""
    topic: Topic | None = None
    """Kafka topic that gets a CloudEvent with the picture for each kept frame, in place of a
    folder."""
    similarity: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    """Cosine of two embeddings above which frames show the same, of which one is kept; measured
    with the offline model, and other models may need more."""
    frames_per_hour: Annotated[int, Field(ge=1, le=3600)] = 12
    """Frames kept of a camera in an hour, the strangest first; an hour's worth may come at once."""
    max_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 512 * 1024 * 1024
    """Bytes that the folder may take up; beyond, old and less novel frames are deleted."""
    max_age_days: Annotated[float, Field(ge=0.01, le=3650)] = 30.0
    """Days that the folder keeps a frame, and that what it shows counts as seen before."""

    @field_validator("topic")
    @classmethod
    def _no_folder(cls, topic: str | None) -> str | None:
        return topic if topic is None else _refuse_folder(topic)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.directory is not None and self.topic is not None:
            raise ValueError("directory and topic exclude each other")
        return self


class LogConfig(Section):
    """What is logged to standard error, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    format: Literal["json", "text"] = "json"
    """One JSON object a line for machines, or text for people."""


class Config(Section):
    """Configuration of the streaming test-time adaptation agent."""

    source: SourceConfig = SourceConfig()
    kafka: KafkaConfig = KafkaConfig()
    sink: SinkConfig = SinkConfig()
    decode: DecodeConfig = DecodeConfig()
    batch: BatchConfig = BatchConfig()
    model: ModelConfig = ModelConfig()
    calibration: Text | None = None
    """The file that 'tta-agent calibrate' wrote; null learns the threshold on the way."""
    adapt: AdaptConfig = AdaptConfig()
    ood: OodConfig = OodConfig()
    drift: DriftConfig = DriftConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _topics_differ(self) -> Self:
        kafka = self.kafka
        taken = (kafka.frames_topic, kafka.verdicts_topic, kafka.dead_letter_topic)
        if self.novelty.topic in taken:
            raise ValueError("novelty.topic must differ from the topics of kafka")
        return self


def fingerprint(config: Config) -> str:
    """Twelve hex digits that differ when anything but a secret differs."""
    dump = config.model_dump(mode="json")
    for section, key in SECRETS.values():
        del dump[section][key]
    return hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest()[:12]
