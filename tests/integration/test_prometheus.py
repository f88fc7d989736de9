"""A real Prometheus scrapes the agent's port, and its own linter reads the exposition."""

import subprocess
import time

import pytest
from prometheus_client import generate_latest

from agent.config import HttpConfig
from agent.health import Health, StatusApp, serve
from agent.metrics import Metrics
from tests.integration.prometheus import query, running_prometheus, tool

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def metrics():
    metrics = Metrics(max_cameras=2)
    metrics.frames.labels("gate", "verdict").inc(41)
    metrics.energy.labels(0).observe(-21.5)
    metrics.drift_score.labels("gate", "frechet").set(0.25)
    metrics.config_info.info({"fingerprint": "0a1b", "strategy": "frozen", "model": "offline"})
    return metrics


@pytest.fixture(scope="module")
def scraped(metrics):
    server = serve(StatusApp(Health(time.monotonic, 60), metrics.registry), HttpConfig(port=0))
    yield f"127.0.0.1:{server.port}"
    server.close()


@pytest.fixture(scope="module")
def prometheus(scraped, tmp_path_factory):
    with running_prometheus(scraped, tmp_path_factory.mktemp("prometheus")) as address:
        yield address


def test_a_counter_arrives_with_its_labels(prometheus):
    ((labels, value),) = query(prometheus, "tta_frames_total")
    assert (labels["camera"], labels["outcome"], value) == ("gate", "verdict", "41")


def test_energy_can_be_asked_for_quantiles(prometheus):
    expression = "histogram_quantile(0.5, sum by (le) (tta_energy_logits_bucket))"
    ((_, value),) = query(prometheus, expression)
    assert -22 < float(value) < -21


def test_the_configuration_in_force_can_be_read(prometheus):
    ((labels, _),) = query(prometheus, "tta_config_info")
    assert (labels["strategy"], labels["model"]) == ("frozen", "offline")


def test_the_target_is_up(prometheus):
    ((_, value),) = query(prometheus, 'up{job="tta"} == 1')
    assert value == "1"


def test_the_linter_finds_nothing(metrics):
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=generate_latest(metrics.registry),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
