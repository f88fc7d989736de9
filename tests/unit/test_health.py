import json
import urllib.error
import urllib.request

import pytest

from agent.config import HttpConfig
from agent.errors import AgentError
from agent.health import Health, StatusApp, serve
from agent.metrics import Metrics


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return Health(clock, stalled_after_s=60)


@pytest.fixture
def app(health):
    return StatusApp(health, Metrics(max_cameras=2).registry)


@pytest.fixture
def server(app):
    server = serve(app, HttpConfig(port=0))
    yield server
    server.close()


def ask(server, path, method="GET", **headers):
    url = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_a_loop_that_never_began_is_not_live(health):
    assert health.live().detail["reason"] == "the loop has not started"


def test_a_loop_is_live_until_it_stands_still(health, clock):
    health.beat()
    clock.now += 60
    assert health.live().ok
    clock.now += 0.5
    assert health.live() == (
        False,
        {"reason": "the loop stands still", "last_progress_s": 60.5, "last_batch_s": None},
    )


def test_a_batch_is_progress_and_its_age_is_told(health, clock):
    health.batch_done()
    clock.now += 2
    health.beat()
    assert health.live() == (True, {"last_progress_s": 0, "last_batch_s": 2})


def test_ready_needs_the_model_and_the_source(health):
    assert "model" in health.ready().detail["reason"]
    health.model_loaded = True
    assert "source" in health.ready().detail["reason"]
    health.source_assigned = True
    assert health.ready().ok


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_failing_probe_is_503_with_a_reason(server, path):
    status, headers, body = ask(server, path)
    assert (status, headers["Content-Type"]) == (503, "application/json")
    assert json.loads(body)["reason"]


def test_a_passing_probe_is_200(server, health):
    health.beat()
    status, _, body = ask(server, "/healthz")
    assert (status, json.loads(body)["ok"]) == (200, True)


def test_metrics_are_text_unless_openmetrics_is_asked_for(server):
    _, plain, text = ask(server, "/metrics")
    _, modern, _ = ask(server, "/metrics", Accept="application/openmetrics-text;version=1.0.0")
    assert plain["Content-Type"].startswith("text/plain")
    assert b"tta_build_info" in text
    assert modern["Content-Type"].startswith("application/openmetrics-text")


def test_the_index_names_the_pages(server):
    status, _, body = ask(server, "/")
    assert status == 200
    assert body.count(b"\n") == 2


def test_an_unknown_page_is_404(server):
    assert ask(server, "/admin")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(server, method):
    status, headers, _ = ask(server, "/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(server):
    status, headers, body = ask(server, "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_a_taken_port_is_named(server, app):
    with pytest.raises(AgentError, match=rf"http\.port {server.port}: Address already in use"):
        serve(app, HttpConfig(port=server.port))


def test_a_closed_server_frees_its_port(app):
    first = serve(app, HttpConfig(port=0))
    first.close()
    second = serve(app, HttpConfig(port=first.port))
    second.close()
    assert second.port == first.port


def test_requests_leave_standard_error_alone(server, capfd):
    ask(server, "/metrics")
    ask(server, "/none")
    assert capfd.readouterr().err == ""
