"""A real Prometheus scrapes the agent's port, and its own linter reads the exposition."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from prometheus_client import generate_latest

from agent.config import HttpConfig
from agent.health import Health, StatusApp, serve
from agent.metrics import Metrics

pytestmark = pytest.mark.integration

START_S = 60


def tool(name):
    path = shutil.which(name)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is missing: install the Debian package prometheus")
    if path is None:
        pytest.skip(f"{name} is missing: install the Debian package prometheus")
    return path


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
    """The address of a Prometheus that scrapes every 200 ms."""
    folder = tmp_path_factory.mktemp("prometheus")
    job = {"job_name": "tta", "static_configs": [{"targets": [scraped]}]}
    settings = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
    (folder / "prometheus.yml").write_text(json.dumps({**settings, "scrape_configs": [job]}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        yield f"http://{address}"
        process.terminate()
        process.wait(timeout=30)


def query(prometheus, expression):
    """The samples that answer an instant query, once there are any."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310
                answer = json.load(reply)
        except (urllib.error.URLError, ConnectionError):
            answer = {"data": {"result": []}}  # still starting
        if answer["data"]["result"]:
            return [(sample["metric"], sample["value"][1]) for sample in answer["data"]["result"]]
        time.sleep(0.1)
    return []


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
