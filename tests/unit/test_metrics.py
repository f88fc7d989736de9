import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from agent import __version__
from agent.errors import CorruptImage
from agent.metrics import OTHER, Metrics, reference

LABELS = {"camera", "site", "domain", "stage", "reason", "detector", "outcome"}


@pytest.fixture
def metrics():
    return Metrics(max_cameras=2)


def test_the_first_cameras_have_series_and_the_rest_share_one(metrics):
    assert [metrics.camera_label(camera) for camera in "abcad"] == ["a", "b", OTHER, "a", OTHER]


def test_what_is_counted_can_be_read(metrics):
    metrics.frames.labels("gate", "verdict").inc(3)
    labels = {"camera": "gate", "outcome": "verdict"}
    assert metrics.registry.get_sample_value("tta_frames_total", labels) == 3


def test_known_reasons_start_at_zero(metrics):
    value = metrics.registry.get_sample_value(
        "tta_dead_letters_total", {"reason": CorruptImage.reason}
    )
    assert value == 0


def test_build_info_names_the_version(metrics):
    assert f'version="{__version__}"' in generate_latest(metrics.registry).decode()


def test_energy_below_zero_falls_into_a_bucket_of_its_own(metrics):
    metrics.energy.labels(3).observe(-22.5)
    below, above = ({"domain": "3", "le": le} for le in ("-23.0", "-22.0"))
    assert metrics.registry.get_sample_value("tta_energy_logits_bucket", below) == 0
    assert metrics.registry.get_sample_value("tta_energy_logits_bucket", above) == 1


def test_names_and_labels_follow_the_rules(metrics):
    for metric in metrics.described:
        assert re.fullmatch(r"tta_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.kind == "info" or set(metric.labels) <= LABELS


def test_every_exported_family_is_described(metrics):
    exported = {family.name for family in metrics.registry.collect() if "tta_" in family.name}
    described = {re.sub("_(total|info)$", "", metric.name) for metric in metrics.described}
    assert exported == described
    assert b"_created" not in generate_latest(metrics.registry)


def test_the_exposition_is_valid_openmetrics(metrics):
    metrics.config_info.info({"fingerprint": "0a1b", "strategy": "frozen", "model": "offline"})
    text = generate_openmetrics(metrics.registry).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"tta_frames", "tta_config", "tta_stage_seconds"} <= names


def test_two_agents_in_a_process_do_not_share_series(metrics):
    metrics.pauses.inc()
    assert Metrics(max_cameras=2).registry.get_sample_value("tta_pauses_total") == 0


def test_the_reference_is_up_to_date():
    written = Path(__file__).parents[2] / "deploy" / "METRICS.md"
    assert written.read_text() == reference(), "run: tta-agent metrics > deploy/METRICS.md"
