"""The demo: a broker, a drifting stream, the agent as an operator would run it, and the score.

The agent is a process of its own, steered by a YAML file that stays in the output folder; this
process plays the camera and keeps the score.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import NewTopic
from rich.console import Console

from agent.bench.live import LiveView, summary
from agent.bench.photos import DISTRACTORS, Photo, builtin_photos, known_labels, labelled_folder
from agent.bench.schedule import LabelledFrame, Phase, drifting, stream
from agent.bench.scoreboard import Scoreboard, said_in
from agent.bench.timeline import write_timeline
from agent.brokers import embedded_broker, free_port
from agent.config import KafkaConfig
from agent.errors import AgentError
from agent.produce import FrameProducer
from agent.types import FrameId

#: Frames on their way at a time: enough for full batches, too few for a long queue.
IN_FLIGHT = 64
#: Clear frames that say what is normal.
CALIBRATION_FRAMES = 192
#: Of the user's photographs, the share that is used for calibration and not for the stream.
CALIBRATION_SHARE = 0.25
#: Without a verdict for so long the agent is taken for dead.
SILENCE_S = 60.0
_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line can say."""

    out: Path
    images: Path | None = None
    frames: int = 900
    seed: int = 0
    strategy: str = "continual"


@dataclass(slots=True)
class _Flow:
    """What the camera thread and the scoring thread share."""

    credit: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(IN_FLIGHT))
    over: threading.Event = field(default_factory=threading.Event)
    failure: list[Exception] = field(default_factory=list)


def run_demo(options: DemoOptions, console: Console) -> None:
    """Play the whole demo; leaves its configuration, verdicts, log and timeline in `out`.

    Raises:
        AgentError: a part is not installed, or the agent stopped answering.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    photos = _photos(options)
    normal, streamed = _split(photos, options)
    schedule = drifting(options.frames)
    with console.status("starting the broker …"), embedded_broker() as servers:
        config = _config(options, servers, photos)
        _create_topics(config["kafka"])
        file = options.out / "agent.yaml"
        file.write_text(_HEADER + yaml.safe_dump(config, sort_keys=False, width=100))
        console.print(f"broker at {servers}; the agent is steered by {file}")
        _calibrate(options, file, normal, schedule, console)
        board = Scoreboard()
        with _agent(options, file, console) as process:
            _await_ready(options, config["http"]["port"], process, console)
            _play(options, config, streamed, schedule, board, process, console)
    outcomes = board.outcomes()
    console.print(summary(outcomes))
    picture = options.out / "timeline.png"
    source = str(options.images or "photographs that ship in Python packages")
    write_timeline(outcomes, picture, f"tta-agent demo: {len(outcomes)} frames, {source}")
    console.print(f"timeline: {picture}")
    console.print(f"every verdict: {options.out / 'verdicts.jsonl'}")


_HEADER = "# Written by `tta-agent demo`; `tta-agent run` takes it as it is.\n"


def _photos(options: DemoOptions) -> list[Photo]:
    if options.images is not None:
        return labelled_folder(options.images, options.seed)
    return builtin_photos()


def _split(photos: list[Photo], options: DemoOptions) -> tuple[list[Photo], list[Photo]]:
    """Photographs to calibrate on, and those to stream; the same ones where there are few."""
    known = [photo for photo in photos if photo.known]
    if options.images is None or len(known) < CALIBRATION_FRAMES:
        return known, photos
    step = round(1 / CALIBRATION_SHARE)
    normal = known[::step]
    kept = {id(photo) for photo in normal}
    return normal, [photo for photo in photos if id(photo) not in kept]


def _config(options: DemoOptions, servers: str, photos: list[Photo]) -> dict[str, Any]:
    labels = known_labels(photos)
    if options.images is None:
        labels += list(DISTRACTORS)
    return {
        "kafka": {"bootstrap_servers": servers, "session_timeout_s": 6.0},
        "model": {"labels": labels},
        "calibration": str(options.out / "calibration.safetensors"),
        # The score compares with the model as it was loaded, so every frame is encoded by it too.
        "adapt": {"strategy": options.strategy, "audit": 1.0, "seed": options.seed},
        "http": {"port": free_port()},
    }


def _create_topics(kafka: dict[str, Any]) -> None:
    defaults = KafkaConfig()
    topics = (defaults.frames_topic, defaults.verdicts_topic, defaults.dead_letter_topic)
    admin = KafkaAdminClient(bootstrap_servers=kafka["bootstrap_servers"])
    try:
        admin.create_topics(
            [NewTopic(name=name, num_partitions=1, replication_factor=1) for name in topics]
        )
    finally:
        admin.close()


def _calibrate(
    options: DemoOptions,
    file: Path,
    photos: Sequence[Photo],
    schedule: Sequence[Phase],
    console: Console,
) -> None:
    """Run `tta-agent calibrate` on clear frames that the stream does not hold."""
    folder = options.out / "normal"
    folder.mkdir(exist_ok=True)
    clear = Phase(schedule[0].name, None, 1, CALIBRATION_FRAMES, unknown_share=0.0)
    with console.status("calibrating on clear frames …"):
        for frame in stream(photos, [clear], options.seed + 1):
            (folder / f"{frame.index:04d}.jpg").write_bytes(frame.jpeg)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "agent", "calibrate", str(file), str(folder)),
                *("--out", str(options.out / "calibration.safetensors")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise AgentError(f"calibration failed:\n{done.stderr[-2000:]}")
    console.print(done.stdout.strip(), highlight=False)


@contextmanager
def _agent(options: DemoOptions, file: Path, console: Console) -> Iterator[subprocess.Popen[bytes]]:
    """Run the agent on the file; on exit it drains and commits, as on any SIGTERM."""
    with (options.out / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "run", str(file)],
            stderr=log,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                console.print("the agent did not stop in time and is killed")
                process.kill()
                process.wait()


def _await_ready(
    options: DemoOptions, port: int, process: subprocess.Popen[bytes], console: Console
) -> None:
    """Ask /readyz, as an orchestrator would, until the agent may be sent frames.

    Raises:
        AgentError: it ended, or took too long.
    """
    page = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + SILENCE_S
    with console.status("loading the model and joining the consumer group …"):
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(URLError), urlopen(f"{page}/readyz", timeout=5):  # noqa: S310 - loopback
                console.print(f"the agent is ready; while it runs: {page}/metrics")
                return
            time.sleep(0.2)
    raise _ended(options, "did not become ready")


def _ended(options: DemoOptions, what: str) -> AgentError:
    log = (options.out / "agent.log").read_text(errors="replace")
    return AgentError(f"the agent {what}; its log ends:\n{log[-1500:]}")


def _play(
    options: DemoOptions,
    config: dict[str, Any],
    photos: Sequence[Photo],
    schedule: Sequence[Phase],
    board: Scoreboard,
    process: subprocess.Popen[bytes],
    console: Console,
) -> None:
    kafka = KafkaConfig.model_validate(config["kafka"])
    flow = _Flow()
    frames = stream(photos, schedule, options.seed)
    camera = threading.Thread(
        target=_send, args=(kafka, frames, board, flow), name="camera", daemon=True
    )
    verdicts = KafkaConsumer(
        kafka.verdicts_topic,
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    view = LiveView(console, schedule, "offline", options.strategy)
    camera.start()
    try:
        with view, (options.out / "verdicts.jsonl").open("w") as journal:
            _score(options, verdicts, board, flow, view, process, journal)
    finally:
        flow.over.set()
        flow.credit.release(IN_FLIGHT)
        verdicts.close()
        camera.join(_STOP_S)


def _send(
    kafka: KafkaConfig, frames: Iterator[LabelledFrame], board: Scoreboard, flow: _Flow
) -> None:
    """The camera thread: as fast as verdicts come back."""
    try:
        producer = FrameProducer(kafka)
        for frame in frames:
            flow.credit.acquire()
            if flow.over.is_set():
                break

            def landed(frame_id: FrameId, frame: LabelledFrame = frame) -> None:
                board.sent(frame_id, frame)

            producer.send(frame.jpeg, frame.camera, landed)
        producer.close()
    except AgentError as error:
        flow.failure.append(error)


def _score(
    options: DemoOptions,
    verdicts: KafkaConsumer,
    board: Scoreboard,
    flow: _Flow,
    view: LiveView,
    process: subprocess.Popen[bytes],
    journal: Any,
) -> None:
    """Read verdicts back until every frame has one.

    Raises:
        AgentError: they stopped coming.
    """
    heard_at = time.monotonic()
    while board.scored < options.frames:
        polled = verdicts.poll(timeout_ms=200)
        for record in (record for batch in polled.values() for record in batch):
            journal.write(record.value.decode() + "\n")
            board.heard(said_in(json.loads(record.value)["data"]))
            flow.credit.release()
            heard_at = time.monotonic()
        snapshot = board.now()
        if snapshot is not None:
            view.show(snapshot)
        if flow.failure:
            raise flow.failure[0]
        silent = time.monotonic() - heard_at > SILENCE_S
        if process.poll() is not None or silent:
            raise _ended(options, "stopped answering")
