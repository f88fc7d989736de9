"""The whole agent as a process of its own, on a real broker, treated as the world treats it."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import numpy as np
import pytest
import yaml

from agent.testing import jpeg, picture
from tests.integration.brokers import produce, read_all
from tests.integration.prometheus import query, running_prometheus

pytestmark = pytest.mark.integration

PARTITIONS = 2
#: Every so many frames one is corrupt.
CORRUPT_EVERY = 20


class Agent:
    """`tta-agent run` on a configuration file."""

    def __init__(self, file, log):
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", str(file)], stderr=stderr
            )

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def address(self):
        port = next(line["port"] for line in self.lines() if "port" in line)
        return f"127.0.0.1:{port}"

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as answer:
            return answer.read().decode()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start(kafka_config, tmp_path):
    """Starts members of one group; ends those that the test left running."""
    agents = []
    file = tmp_path / "agent.yaml"
    kafka = kafka_config.model_dump(exclude_none=True, exclude_defaults=True)
    file.write_text(yaml.safe_dump({"kafka": kafka, "http": {"port": 0}, "batch": {"max_size": 8}}))

    def one():
        agents.append(Agent(file, tmp_path / f"agent-{len(agents)}.log"))
        return agents[-1]

    yield one
    for agent in agents:
        if agent.process.poll() is None:
            agent.process.kill()
        agent.process.wait()


def frames(count, seed=0):
    """(camera, bytes) of small JPEGs, one in `CORRUPT_EVERY` of them cut short."""
    rng = np.random.default_rng(seed)
    images = [jpeg(picture(rng)) for _ in range(count)]
    return [
        (b"cam-%d" % (n % 3), image[:40] if n % CORRUPT_EVERY == 7 else image)
        for n, image in enumerate(images)
    ]


def send(config, records):
    """Produce by turns to all partitions; the ids of good and of corrupt frames."""
    produce(config.bootstrap_servers, config.frames_topic, records, partitions=PARTITIONS)


def answers(config):
    """How often each frame id was answered: by verdicts, and by dead letters."""
    verdicts = Counter(
        json.loads(record.value)["id"]
        for record in read_all(config.bootstrap_servers, config.verdicts_topic)
    )
    letters = Counter()
    for record in read_all(config.bootstrap_servers, config.dead_letter_topic):
        headers = dict(record.headers)
        place = [headers[f"tta.error.{part}"].decode() for part in ("topic", "partition", "offset")]
        letters["/".join(place)] += 1
    return verdicts, letters


def expected(config):
    """Ids of good and of corrupt frames, as they stand in the topic."""
    good, bad = set(), set()
    for record in read_all(config.bootstrap_servers, config.frames_topic):
        kind = bad if len(record.value) == 40 else good
        kind.add(f"{record.topic}/{record.partition}/{record.offset}")
    return good, bad


def await_answers(config, timeout_s=120):
    """Wait until every frame in the topic has an answer; then everything."""
    good, bad = expected(config)
    deadline = time.monotonic() + timeout_s
    while True:
        verdicts, letters = answers(config)
        if (verdicts.keys() == good and letters.keys() == bad) or time.monotonic() > deadline:
            return good, bad, verdicts, letters
        time.sleep(0.5)


def await_some(config, count, timeout_s=90):
    """Wait for the first `count` verdicts."""
    deadline = time.monotonic() + timeout_s
    while len(answers(config)[0]) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(answers(config)[0]) >= count


def test_each_good_frame_gets_a_verdict_and_each_bad_one_a_dead_letter(kafka_config, start):
    send(kafka_config, frames(80))
    agent = start()
    good, bad, verdicts, letters = await_answers(kafka_config)
    assert verdicts == Counter(good)
    assert letters == Counter(bad)
    assert agent.stop() == 0


def test_a_dead_letter_holds_the_original_bytes_and_the_reason(kafka_config, start):
    send(kafka_config, [(b"cam", b"\xff\xd8\xff not a picture")])
    start()
    deadline = time.monotonic() + 60
    while not (letters := read_all(kafka_config.bootstrap_servers, kafka_config.dead_letter_topic)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert letters[0].value == b"\xff\xd8\xff not a picture"
    assert dict(letters[0].headers)["tta.error.reason"] == b"corrupt"


def test_sigterm_amid_the_stream_repeats_nothing_after_a_restart(kafka_config, start):
    send(kafka_config, frames(400))
    first = start()
    await_some(kafka_config, 20)
    assert first.stop() == 0
    done = len(answers(kafka_config)[0])
    assert done < 380, "the agent had finished before it was stopped"
    start()
    good, bad, verdicts, letters = await_answers(kafka_config)
    assert verdicts == Counter(good)
    assert letters == Counter(bad)


def test_kill_loses_nothing(kafka_config, start):
    send(kafka_config, frames(200))
    for _ in range(2):
        agent = start()
        before = len(answers(kafka_config)[0])
        await_some(kafka_config, before + 10)
        agent.process.kill()
        agent.process.wait()
    start()
    good, bad, verdicts, letters = await_answers(kafka_config)
    assert verdicts.keys() == good
    assert letters.keys() == bad
    # No more is repeated than one batch per kill.
    assert sum((verdicts - Counter(good)).values()) <= 2 * 8


def test_two_members_share_the_partitions_and_survive_each_other(kafka_config, start):
    first = start()
    second = start()
    deadline = time.monotonic() + 60
    while not all(
        any("assigned" in line["message"] and "[]" not in line["message"] for line in agent.lines())
        for agent in (first, second)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    send(kafka_config, frames(60))
    await_some(kafka_config, 20)
    assert first.stop() == 0
    send(kafka_config, frames(40, seed=1))
    good, bad, verdicts, letters = await_answers(kafka_config)
    assert verdicts.keys() == good
    assert letters.keys() == bad
    assert second.stop() == 0


def test_probes_and_metrics_tell_what_happened(kafka_config, start):
    send(kafka_config, frames(40))
    agent = start()
    await_answers(kafka_config)
    assert json.loads(agent.get("/healthz"))["ok"]
    assert json.loads(agent.get("/readyz"))["ok"]
    metrics = agent.get("/metrics")
    assert 'tta_dead_letters_total{reason="corrupt"} 2.0' in metrics
    verdicts = sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("tta_frames_total") and 'outcome="verdict"' in line
    )
    assert verdicts == 38


def test_a_real_prometheus_scrapes_the_running_agent(kafka_config, start, tmp_path):
    send(kafka_config, frames(40))
    agent = start()
    await_answers(kafka_config)
    with running_prometheus(agent.address, tmp_path) as prometheus:
        answer = query(prometheus, "sum by (outcome) (tta_frames_total) > 0")
    counts = {labels["outcome"]: value for labels, value in answer}
    assert counts == {"verdict": "38", "dead_letter": "2"}
