"""The commands; the only place that assembles parts.

A command imports what it runs inside its function, so that `check` and `--help` need no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from agent import __version__
from agent.errors import AgentError, InvalidConfig, MissingAsset
from agent.types import FrameId

EXIT_INVALID_CONFIG = 1
EXIT_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The YAML file that steers the agent.")
]

# What benchmarks share.
Photographs = Annotated[
    Path,
    typer.Argument(
        exists=True, file_okay=False, help="Photographs, labelled by sub-folder or file name."
    ),
]
ModelName = Annotated[
    str, typer.Option(help="As model.name in the configuration; or local-dir:FOLDER.")
]
Pretrained = Annotated[
    str | None, typer.Option(help="As model.pretrained: a hub tag or a checkpoint file.")
]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Cache = Annotated[Path, typer.Option(help="Folder for corrupted images.")]


def main() -> None:
    """Run the command line; an error the agent raises on purpose is told without a traceback."""
    try:
        app()
    except InvalidConfig as error:
        print(*error.faults, sep="\n", file=sys.stderr)
        sys.exit(EXIT_INVALID_CONFIG)
    except AgentError as error:
        print(f"tta-agent: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _stop_on_signals(stop: Callable[[], None]) -> None:
    def handle(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tta-agent {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    """Classify camera frames from Kafka, and keep up with their domain without labels.

    The agent reads image frames from a topic, names what they show in your own labels with CLIP,
    adapts itself to fog, night or a worn lens as it goes, says which frames it does not know, and
    tells Prometheus how far the world has drifted. One YAML file steers it.

    **Examples**

    - `tta-agent demo` — see it work

    - `tta-agent defaults > agent.yaml` — a commented file to start from

    - `tta-agent check agent.yaml` — is it right?

    - `tta-agent calibrate agent.yaml normal-frames/` — what is normal here?

    - `tta-agent run agent.yaml` — do the job

    - `tta-agent review unknown/` — what has it not known?

    - `tta-agent schema > schema.json` — completion and hints in your editor

    **Exit codes**: 0 all went well; 1 the configuration has faults, each told with its line;
    2 wrong usage, or an error that the message explains.
    """


@app.command()
def run(file: ConfigFile) -> None:
    """Run the agent until SIGTERM or SIGINT, or until a folder or video ends.

    A signal lets it answer the frames it has fetched, commit and leave; a second one ends it at
    once. Probes and metrics are on http.port: /healthz, /readyz, /metrics.
    """
    from agent import log
    from agent.assemble import agent
    from agent.config_file import load

    config = load(file, os.environ)
    log.configure(config.log)
    with agent(config) as running:
        _stop_on_signals(running.pipeline.stop)
        logging.getLogger("agent").info(
            "running: strategy %s, %d labels, probes and metrics on %s port %d",
            config.adapt.strategy,
            len(config.model.labels),
            config.http.host,
            running.port,
            extra={"port": running.port},
        )
        running.pipeline.run()


@app.command()
def demo(
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Your own photographs, labelled by sub-folder or file name.",
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=60, help="Frames to play in all.")] = 900,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("demo-out"),
    strategy: Annotated[str, typer.Option(help="continual or frozen.")] = "continual",
    seed: Annotated[int, typer.Option(help="Seed of the stream and the strategy.")] = 0,
) -> None:
    """Watch the agent follow a drifting stream: clear, fog, night, noise, strangers, clear.

    Starts an embedded Kafka broker, plays photographs through it and shows accuracy, frozen
    against adapted, as the verdicts come back. Ends with a table and a picture of the timeline.
    """
    from rich.console import Console

    try:
        from agent.demo import DemoOptions, run_demo
    except ModuleNotFoundError as error:
        raise MissingAsset(
            f"the demo needs {error.name}: pip install 'streaming-tta-agent[demo]'"
        ) from error
    run_demo(DemoOptions(out, images, frames, seed, strategy), Console())


@app.command()
def bench(
    images: Photographs,
    suite: Annotated[
        list[str] | None, typer.Option(help="A stream; may be given again. [default: continual]")
    ] = None,
    competitor: Annotated[
        list[str] | None, typer.Option(help="Who runs; may be given again. [default: everyone]")
    ] = None,
    model: ModelName = "offline",
    pretrained: Pretrained = None,
    labels: Annotated[str, typer.Option(help="all, or fleet: 20 groups.")] = "all",
    frames: Annotated[
        int, typer.Option(min=0, help="Frames of each phase; 0 shows every photograph once.")
    ] = 0,
    precision: Precision = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of streams and competitors.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables.")] = Path("bench-out"),
    cache: Cache = Path("~/.cache/streaming-tta-agent"),
) -> None:
    """Compare the agent with doing nothing and with published methods, on corrupted streams.

    Suites: continual, gradual, recurring, mixed, correlated, imbalanced, open-25, open-50, single,
    lowres, long. Competitors: frozen, continual, single_prompt, bn, logit_centering, tda, tfup,
    tent, rdumb, roid, sar, tpt, vdp, cotta. All see the same frames, and none a label.

    The default with a part taken away competes when named: no-alignment, no-repair, no-centring,
    no-judge, no-kin, no-steadiness, no-prompt-tuning, no-teacher, no-restore, no-diversity,
    no-anchor, no-domain-memory, no-gate, no-fit, no-guard; or with another number: strength=1,
    gallery=8 and more, which a wrong name lists.
    """
    from rich.console import Console

    try:
        from agent.bench.run import BenchOptions, run_bench
    except ModuleNotFoundError as error:
        raise MissingAsset(
            f"the benchmark needs {error.name}: pip install 'streaming-tta-agent[bench]'"
        ) from error
    options = BenchOptions(
        images=images,
        model=model,
        pretrained=pretrained,
        suites=suite or ["continual"],
        competitors=competitor or [],
        label_set=labels,
        frames=frames,
        precision=precision,
        seed=seed,
        out=out,
        cache=cache.expanduser(),
    )
    run_bench(options, Console())


@app.command(name="bench-drift")
def bench_drift(
    images: Photographs,
    model: ModelName = "offline",
    pretrained: Pretrained = None,
    precision: Precision = "fp32",
    frames: Annotated[
        int, typer.Option(min=1000, help="Stationary frames in which false alarms are counted.")
    ] = 50_000,
    seed: Annotated[int, typer.Option(help="Seed of streams and of the agent.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")] = Path("bench-out"),
    cache: Cache = Path("~/.cache/streaming-tta-agent"),
) -> None:
    """Measure the drift metrics: delay after an onset, false alarms, severity and cost.

    Every corruption of ImageNet-C begins after a clear stretch, and waxes and wanes. The strategy
    frozen is measured on frames that are encoded once, continual on the agent as it runs.
    """
    from rich.console import Console

    try:
        from agent.bench.drift import DriftBenchOptions, run_bench_drift
    except ModuleNotFoundError as error:
        raise MissingAsset(
            f"the benchmark needs {error.name}: pip install 'streaming-tta-agent[bench]'"
        ) from error
    options = DriftBenchOptions(
        images=images,
        model=model,
        pretrained=pretrained,
        precision=precision,
        frames=frames,
        seed=seed,
        out=out,
        cache=cache.expanduser(),
    )
    run_bench_drift(options, Console())


@app.command()
def bench_unknown(
    images: Photographs,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="A stream; may be given again. [default: continual, mixed, correlated]"),
    ] = None,
    severity: Annotated[int, typer.Option(min=1, max=5, help="Of the corruptions.")] = 3,
    model: ModelName = "offline",
    pretrained: Pretrained = None,
    frames: Annotated[
        int, typer.Option(min=0, help="Frames of each phase; 0 shows every photograph once.")
    ] = 0,
    precision: Precision = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of streams and splits.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables.")] = Path("bench-out"),
    cache: Cache = Path("~/.cache/streaming-tta-agent"),
) -> None:
    """Measure how well the unknown is told, and what the agent's confidence is worth.

    Three tables with pictures. **Scores**: each of ood.score on the source model, for near unknowns
    (half of the labels held out), far ones (animals from things) and textures, clear and under each
    corruption; *unnamed* leaves words that may name the unknown out of the negative labels.
    **False alarms**: the agent in a storm in which a quarter of the frames is unknown, against a
    fixed threshold. **Confidence**: calibration error of softmax and confidence, and false alarms,
    on streams of known objects.
    """
    from rich.console import Console

    try:
        from agent.bench.unknown_run import UnknownOptions, run_unknown
    except ModuleNotFoundError as error:
        raise MissingAsset(
            f"the benchmark needs {error.name}: pip install 'streaming-tta-agent[bench]'"
        ) from error
    options = UnknownOptions(
        images=images,
        model=model,
        pretrained=pretrained,
        suites=suite or ["continual", "mixed", "correlated"],
        severity=severity,
        frames=frames,
        precision=precision,
        seed=seed,
        out=out,
        cache=cache.expanduser(),
    )
    run_unknown(options, Console())


@app.command()
def calibrate(
    file: ConfigFile,
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Normal frames; no labels needed.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.safetensors"),
) -> None:
    """Measure what is normal: temperature, threshold for the unknown, references for drift.

    Give it a few hundred frames of ordinary days from the cameras in question, then name the file
    it writes under `calibration` in the configuration. It belongs to the model, the labels and
    the templates of that configuration; when they change, calibrate again.
    """
    from agent import log
    from agent.calibrate_folder import calibrate_folder
    from agent.config_file import load

    config = load(file, os.environ)
    log.configure(config.log)
    calibrate_folder(config, folder, out)


@app.command()
def produce(
    file: ConfigFile,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Image files.")],
    camera: Annotated[str, typer.Option(help="Camera id, the records' key.")] = "camera-0",
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Frames a second; as fast as it goes if absent.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Times to play the folder.")] = 1,
) -> None:
    """Play a folder of images into the configuration's frames topic, as a camera would."""
    from rich.console import Console
    from rich.progress import track

    from agent.config_file import load
    from agent.produce import FrameProducer, images_under, paced

    config = load(file, os.environ)
    paths = images_under(folder) * repeat
    producer = FrameProducer(config.kafka)
    landed: list[FrameId] = []
    console = Console(stderr=True)
    for image in track(paced(paths, fps), "producing", len(paths), console=console):
        producer.send(image, camera, landed.append)
    producer.close()
    print(f"{len(landed)} of {len(paths)} frames are in {config.kafka.frames_topic}")
    if len(landed) < len(paths):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def review(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, file_okay=False, help="What novelty.directory names."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("sheet.html"),
    camera: Annotated[
        list[str] | None, typer.Option(help="Only this camera's frames; may be given again.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only frames captured since: 24h, 7d, 2026-11-23T09:00 (UTC)."),
    ] = None,
    similarity: Annotated[
        float,
        typer.Option(min=0, max=1, help="Cosine of embeddings above which frames form a group."),
    ] = 0.4,
) -> None:
    """Show the unknown frames that the agent kept, as one HTML page.

    Frames that look alike stand together, what is most novel or most frequent first, each with its
    camera, its time and what the labels made of it. The page holds its pictures: open it anywhere,
    mail it, keep it. Under each group are the ids of its frames.

    What to do with it: a group that matters is a label you lack, so add it to model.labels and
    calibrate again, or take its pictures from DIR as the start of a training set; a group of
    ordinary things shows what the calibration has not seen. In DIR each picture has a JSON file
    beside it with everything the agent said: grep -l 'frames/0/268' DIR/*.json finds a frame.

    If everything lands in one group, raise --similarity; if nothing finds together, lower it.
    """
    from agent.finds.command import write_sheet

    count = write_sheet(folder, out, camera or [], since, similarity)
    print(f"{count} frames are shown in {out}")


@app.command()
def check(file: ConfigFile) -> None:
    """Check a configuration, and do nothing else.

    Tells every fault with its line, its key and what was expected. Passwords may come from the
    environment: TTA_KAFKA_SASL_PASSWORD, TTA_KAFKA_SSL_KEY_PASSWORD.
    """
    from agent.config_file import load

    load(file, os.environ)
    print(f"{file}: ok")


@app.command()
def defaults() -> None:
    """Print a configuration that names every key, its default and its meaning."""
    from agent.config_file import default_yaml

    print(default_yaml(), end="")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from agent.config_file import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def metrics() -> None:
    """Print the reference of all metrics, as Markdown."""
    from agent.metrics import reference

    print(reference(), end="")
