"""The one YAML file that steers the agent: its schema, its reader and its faults.

Every section is frozen, every key has a default that works, and a key the schema does not know is
refused. `load` reports each fault with file, line, key and what was expected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from agent.errors import InvalidConfig

#: Environment variables that fill secrets; they win over the file so that files can be shared.
SECRETS = {
    "TTA_KAFKA_SASL_PASSWORD": ("kafka", "sasl_password"),
    "TTA_KAFKA_SSL_KEY_PASSWORD": ("kafka", "ssl_key_password"),
}

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KafkaConfig(Section):
    """How to reach Kafka, and the topics."""

    bootstrap_servers: Annotated[str, Field(min_length=1)] = "localhost:9092"
    group_id: Annotated[str, Field(min_length=1)] = "tta-agent"
    frames_topic: str = "frames"
    verdicts_topic: str = "verdicts"
    dead_letter_topic: str = "frames.dead-letter"
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    session_timeout_s: Seconds = 45.0
    max_poll_interval_s: Seconds = 300.0
    delivery_timeout_s: Seconds = 30.0
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_ca_file: str | None = None
    ssl_certificate_file: str | None = None
    ssl_key_file: str | None = None
    ssl_key_password: SecretStr | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.security_protocol.startswith("SASL"):
            missing = [
                key
                for key in ("sasl_mechanism", "sasl_username", "sasl_password")
                if getattr(self, key) is None
            ]
            if missing:
                raise ValueError(
                    f"security_protocol {self.security_protocol} also needs {', '.join(missing)}"
                )
        if self.frames_topic in (self.verdicts_topic, self.dead_letter_topic):
            raise ValueError("frames_topic must differ from the topics that are written to")
        return self


class SourceConfig(Section):
    """Where frames come from."""

    kind: Literal["kafka", "directory", "video"] = "kafka"
    path: Annotated[str | None, Field(description="Folder of images or video file.")] = None
    camera: Annotated[str, Field(description="Camera id for directory and video.")] = "camera-0"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "kafka" and self.path is None:
            raise ValueError(f"kind {self.kind} also needs path")
        return self


class SinkConfig(Section):
    """Where verdicts and dead letters go."""

    kind: Literal["kafka", "jsonl"] = "kafka"


class DecodeConfig(Section):
    """Bounds on a frame, checked before its pixels are allocated."""

    max_bytes: Positive = 8 * 1024 * 1024
    max_pixels: Positive = 40_000_000
    workers: Positive = 2


class BatchConfig(Section):
    """How many frames are encoded together, and how long the first of them waits."""

    max_size: Positive = 32
    max_wait_ms: Annotated[float, Field(ge=0)] = 50.0


class ModelConfig(Section):
    """The open_clip model, the operator's labels and the prompts."""

    name: Annotated[
        str, Field(description="'offline', or any open_clip architecture such as ViT-B-16.")
    ] = "offline"
    pretrained: Annotated[
        str | None, Field(description="Hub tag such as 'openai', or a checkpoint file.")
    ] = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    labels: Annotated[
        list[str], Field(min_length=2, description="The operator's own labels, two or more.")
    ] = ["person", "dog", "cat", "bird", "bicycle", "car", "truck", "bus", "boat", "airplane"]
    templates: Annotated[
        list[str], Field(min_length=1, description="Prompts; '{}' stands for the label.")
    ] = [
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ]

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        blank = [label for label in labels if not label.strip()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if blank:
            raise ValueError("a label is empty")
        if twice:
            raise ValueError(f"labels given twice: {', '.join(twice)}")
        return labels

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1 or template.replace("{}", "").count("{"):
                raise ValueError(f"a template needs exactly one {{}}: {template!r}")
        return templates

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name == "offline" and self.pretrained is not None:
            raise ValueError("the offline checkpoint has its own weights: remove pretrained")
        if self.name != "offline" and self.pretrained is None:
            raise ValueError(
                f"{self.name} without pretrained would run random weights: "
                "name a hub tag or a checkpoint file"
            )
        return self


class AdaptConfig(Section):
    """Which strategy adapts, and what it may spend."""

    strategy: Literal["continual", "frozen"] = "continual"
    budget: Annotated[
        float, Field(ge=0, le=1, description="Adaptation time as a share of inference time.")
    ] = 0.10
    audit: Annotated[
        Fraction,
        Field(description="Share of batches also encoded without alignment, to watch the adapter."),
    ] = 0.05
    max_domains: Positive = 16
    seed: int = 0


class OodConfig(Section):
    """When a frame counts as unknown."""

    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05


class DriftConfig(Section):
    """How drift is measured."""

    window: Annotated[int, Field(ge=32)] = 256


class HttpConfig(Section):
    """The port of /metrics, /healthz and /readyz."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9108
    stalled_after_s: Annotated[
        Seconds, Field(description="/healthz fails when the loop stands still for so long.")
    ] = 60.0
    max_cameras: Annotated[
        Positive, Field(description="Cameras with series of their own; the rest share 'other'.")
    ] = 200


class LogConfig(Section):
    """What is logged to standard error, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class Config(Section):
    """The whole file."""

    source: SourceConfig = SourceConfig()
    kafka: KafkaConfig = KafkaConfig()
    sink: SinkConfig = SinkConfig()
    decode: DecodeConfig = DecodeConfig()
    batch: BatchConfig = BatchConfig()
    model: ModelConfig = ModelConfig()
    calibration: Annotated[
        str | None, Field(description="The file that 'tta-agent calibrate' wrote.")
    ] = None
    adapt: AdaptConfig = AdaptConfig()
    ood: OodConfig = OodConfig()
    drift: DriftConfig = DriftConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
