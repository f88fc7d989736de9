"""A real Prometheus for the tests: started on a target, asked through its HTTP API."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

from agent.brokers import free_port

START_S = 60


def tool(name):
    path = shutil.which(name)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is missing: install the Debian package prometheus")
    if path is None:
        pytest.skip(f"{name} is missing: install the Debian package prometheus")
    return path


@contextmanager
def running_prometheus(target, folder):
    """The address of a Prometheus that scrapes `target`, host:port, every 200 ms."""
    job = {"job_name": "tta", "static_configs": [{"targets": [target]}]}
    settings = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
    (folder / "prometheus.yml").write_text(json.dumps({**settings, "scrape_configs": [job]}))
    address = f"127.0.0.1:{free_port()}"
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield f"http://{address}"
        finally:
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
