"""Brokers for the integration tests, and the few things that tests do to topics."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from agent.brokers import await_broker, embedded_broker, free_port, stop
from agent.errors import MissingAsset

APACHE = "Apache Kafka"
EMBEDDED = "embedded broker"
EXTERNAL = "KAFKA_BOOTSTRAP_SERVERS"

POM = Path(__file__).parent / "kafka" / "pom.xml"
CACHE = Path(__file__).parents[2] / ".cache" / "kafka"

JAVA_OPTIONS = (
    *("-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

PROPERTIES = """
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={data}
offsets.topic.num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""


class UnavailableError(Exception):
    """This kind of broker cannot be had here; the message says why."""


class ApacheKafka:
    """One process of Apache Kafka in KRaft mode. Stopped and started, it keeps port and data."""

    def __init__(self, folder: Path, jars: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.servers = f"127.0.0.1:{self.port}"
        self._classpath = f"{jars}/*"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "broker.log").read_text(errors="replace")

    def format(self) -> None:
        properties = PROPERTIES.format(
            port=self.port, controller=free_port(), data=self.folder / "data"
        )
        (self.folder / "server.properties").write_text(properties)
        command = self._java("kafka.tools.StorageTool", "format", "-t", "dHRhLXRlc3QtYnJva2VyMQ")
        subprocess.run([*command, "-c", self._properties], check=True, capture_output=True)

    def start(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", self._properties), stdout=log, stderr=log
            )
        if not await_broker(self._process, self.servers, timeout_s=90):
            self.stop()
            raise UnavailableError(f"Apache Kafka did not start: {self.log[-1000:]}")

    def stop(self) -> None:
        """End it in order; `start` may follow."""
        if self._process is not None:
            stop(self._process)

    def kill(self) -> None:
        """End it as a power cut would; `start` may follow."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _properties(self) -> str:
        return str(self.folder / "server.properties")

    def _java(self, *arguments: str) -> list[str]:
        return ["java", *JAVA_OPTIONS, "-cp", self._classpath, *arguments]


@dataclass(frozen=True)
class Broker:
    """A running broker. `kafka` is there when tests may stop and start it."""

    kind: str
    servers: str
    kafka: ApacheKafka | None = None


@contextmanager
def running_broker() -> Iterator[Broker]:
    """The best broker that can be had here; in CI nothing but Apache Kafka."""
    try:
        jars = apache_jars()
    except UnavailableError as error:
        if os.environ.get("CI") == "true":
            raise
        with _substitute(str(error)) as broker:
            yield broker
        return
    with tempfile.TemporaryDirectory(prefix="tta-kafka-") as folder:
        kafka = ApacheKafka(Path(folder), jars)
        kafka.format()
        kafka.start()
        try:
            yield Broker(APACHE, kafka.servers, kafka)
        finally:
            kafka.stop()


@contextmanager
def _substitute(reason: str) -> Iterator[Broker]:
    try:
        with embedded_broker() as servers:
            yield Broker(f"{EMBEDDED} ({reason})", servers)
    except MissingAsset as error:
        servers = os.environ.get(EXTERNAL, "")
        if not servers:
            raise UnavailableError(f"{reason}; {error}; {EXTERNAL} is not set") from error
        yield Broker(f"{EXTERNAL}={servers} ({reason})", servers)


def apache_jars() -> Path:
    """The folder of Apache Kafka's jars, fetched once for each version of the POM."""
    if java_version() < 17 or shutil.which("mvn") is None:
        raise UnavailableError("no Apache Kafka: it needs Java 17 or later and Maven")
    jars = CACHE / hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    if not jars.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fetched = Path(folder) / "jars"
            command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
            run = subprocess.run(
                [*command, f"-DoutputDirectory={fetched}"],
                check=False,
                capture_output=True,
                text=True,
            )
            if run.returncode != 0:
                raise UnavailableError(f"no Apache Kafka: Maven failed: {run.stdout[-500:]}")
            if not jars.is_dir():  # another test process may have been first
                fetched.rename(jars)
    return jars


def java_version() -> int:
    """The major version of `java`, 0 if there is none."""
    if shutil.which("java") is None:
        return 0
    run = subprocess.run(["java", "-version"], check=False, capture_output=True, text=True)
    match = re.search(r'version "(\d+)', run.stderr)
    return int(match.group(1)) if match else 0


def create_topic(servers, name, partitions=1, **configs):
    """Create a topic and wait until it has a leader."""
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        options = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        admin.create_topics({name: options}, wait_for_metadata=True)
    finally:
        admin.close()


def produce(servers, topic, records, partitions=None):
    """Send (key, value) or (key, value, headers) and wait for every acknowledgement.

    The key decides on the partition, unless records shall go by turns to `partitions` of them.
    """
    producer = KafkaProducer(bootstrap_servers=servers, acks="all")
    try:
        futures = [
            producer.send(
                topic,
                key=key,
                value=value,
                headers=list(*headers),
                partition=number % partitions if partitions else None,
            )
            for number, (key, value, *headers) in enumerate(records)
        ]
        return [future.get(30) for future in futures]
    finally:
        producer.close()


def read_all(servers, topic):
    """Every record that the topic holds now, by partition and offset."""
    consumer = KafkaConsumer(
        bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    try:
        partitions = [TopicPartition(topic, n) for n in consumer.partitions_for_topic(topic)]
        ends = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        records = []
        while any(consumer.position(p) < ends[p] for p in partitions):
            for batch in consumer.poll(timeout_ms=500).values():
                records += batch
        return sorted(records, key=lambda record: (record.partition, record.offset))
    finally:
        consumer.close()
