"""Whether the agent lives and may be sent work, and the port that tells: probes and metrics."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from agent.config import HttpConfig
from agent.errors import AgentError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger(__name__)

_INDEX = """\
streaming-tta-agent
/healthz: does the loop make progress; /readyz: may frames be sent; /metrics: for Prometheus
"""


class Probe(NamedTuple):
    """The answer of a probe: the verdict and the reasons for it."""

    ok: bool
    detail: dict[str, object]


@dataclass
class Health:
    """What the loop says of itself, and what probes make of that.

    Attributes:
        clock: monotonic, in seconds.
        stalled_after_s: the loop counts as stalled when it has not beaten for so long.
        model_loaded: set when the model can run.
        source_assigned: set while the source has partitions to read.
    """

    clock: Callable[[], float]
    stalled_after_s: float
    model_loaded: bool = False
    source_assigned: bool = False
    _last_beat: float | None = field(default=None, init=False)
    _last_batch: float | None = field(default=None, init=False)

    def beat(self) -> None:
        """The loop made progress, if only by finding nothing to do."""
        self._last_beat = self.clock()

    def batch_done(self) -> None:
        """The outputs of a batch were acknowledged; this is progress too."""
        self._last_beat = self._last_batch = self.clock()

    def live(self) -> Probe:
        """Whether the loop made progress within `stalled_after_s`."""
        quiet_s = self._age(self._last_beat)
        ages: dict[str, object] = {
            "last_progress_s": quiet_s,
            "last_batch_s": self._age(self._last_batch),
        }
        if quiet_s is None:
            return Probe(False, {"reason": "the loop has not started", **ages})
        if quiet_s > self.stalled_after_s:
            return Probe(False, {"reason": "the loop stands still", **ages})
        return Probe(True, ages)

    def ready(self) -> Probe:
        """Whether the model is loaded and the source assigned."""
        flags: dict[str, object] = {
            "model_loaded": self.model_loaded,
            "source_assigned": self.source_assigned,
        }
        if not self.model_loaded:
            return Probe(False, {"reason": "the model is not loaded", **flags})
        if not self.source_assigned:
            return Probe(False, {"reason": "the source is not assigned", **flags})
        return Probe(True, flags)

    def _age(self, moment: float | None) -> float | None:
        return None if moment is None else round(self.clock() - moment, 3)


class Response(NamedTuple):
    """What goes back over HTTP."""

    status: str
    content_type: str
    body: bytes


@dataclass(frozen=True)
class StatusApp:
    """The WSGI application behind the port. It only reads."""

    health: Health
    registry: CollectorRegistry

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer one request, as WSGI wants it."""
        method = environ["REQUEST_METHOD"]
        if method in ("GET", "HEAD"):
            response = self.answer(environ.get("PATH_INFO", "/"), environ.get("HTTP_ACCEPT", ""))
        else:
            response = Response("405 Method Not Allowed", "text/plain", b"GET or HEAD only\n")
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Cache-Control", "no-store"),
        ]
        if response.status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        start(response.status, headers)
        return [] if method == "HEAD" else [response.body]

    def answer(self, path: str, accept: str) -> Response:
        """What stands at `path`, in the format that `accept` prefers."""
        match path:
            case "/":
                return Response("200 OK", "text/plain; charset=utf-8", _INDEX.encode())
            case "/healthz":
                return _told(self.health.live())
            case "/readyz":
                return _told(self.health.ready())
            case "/metrics":
                encode, content_type = choose_encoder(accept)
                return Response("200 OK", content_type, encode(self.registry))
            case _:
                return Response("404 Not Found", "text/plain; charset=utf-8", b"no such page\n")


def _told(probe: Probe) -> Response:
    body = json.dumps({"ok": probe.ok, **probe.detail}) + "\n"
    status = "200 OK" if probe.ok else "503 Service Unavailable"
    return Response(status, "application/json", body.encode())


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds a client may dawdle before its thread is given up

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_port = False  # a second agent on the same port must hear of it

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        # The base class would look its own name up, which can hang where there is no DNS.
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a client went away", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class StatusServer:
    """Serves a `StatusApp` from threads that never keep the process alive."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server

    @property
    def port(self) -> int:
        """The port that is bound; the configured one may have been 0."""
        return self._server.server_port

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()


def serve(app: StatusApp, config: HttpConfig) -> StatusServer:
    """Answer requests for `app` in the background, until `close`.

    Raises:
        AgentError: the address cannot be bound, most often because the port is taken.
    """
    kind = _Server6 if ":" in config.host else _Server
    try:
        server = kind((config.host, config.port), _Handler)
    except OSError as error:
        where = f"http.host {config.host}, http.port {config.port}"
        raise AgentError(f"cannot listen on {where}: {error.strerror}") from error
    server.set_app(app)
    loop = partial(server.serve_forever, poll_interval=0.1)  # seconds that `close` may wait
    threading.Thread(target=loop, name="status", daemon=True).start()
    return StatusServer(server)
