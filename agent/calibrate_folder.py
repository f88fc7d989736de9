"""The command `calibrate`: a folder of normal frames in, a calibration file out."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from agent import encode
from agent.assemble import zero_shot
from agent.calibration import calibrate, subject_of, word_features
from agent.config import Config
from agent.decode import decode
from agent.errors import InvalidFrame
from agent.produce import images_under
from agent.score.novelty import Score
from agent.types import FrameId, Record

_log = logging.getLogger(__name__)


def calibrate_folder(config: Config, folder: Path, out: Path) -> None:
    """Measure every readable image under `folder` and write `out`.

    Raises:
        AgentError: there is no model, or there are too few readable images.
    """
    paths = images_under(folder)
    encoder = encode.load(config.model)
    labels = zero_shot(encoder, config.model)
    preprocess = encoder.preprocess
    images = []
    with Progress(console=Console(stderr=True)) as progress:
        reading = progress.add_task("reading", total=len(paths))
        for index, path in enumerate(paths):
            try:
                value = path.read_bytes()
                record = Record(FrameId(folder.name, 0, index), None, value, (), 0.0)
                frame = decode(record, config.decode, preprocess.size, preprocess.crop_ratio)
            except (InvalidFrame, OSError) as error:
                _log.warning("%s is left out: %s", path, error)
            else:
                images.append(frame.pixels)
            progress.advance(reading)
        naming = progress.add_task("naming what labels leave out", total=None)
        words_VD = word_features(
            encoder,
            config.model.templates[0],
            lambda done, total: progress.update(naming, completed=done, total=total),
        )
        measuring = progress.add_task("measuring", total=len(images))
        measured = calibrate(
            encoder,
            labels,
            images,
            words_VD,
            subject_of(encoder, config.model),
            lambda done, total: progress.update(measuring, completed=done, total=total),
        )
    measured.save(out)
    rate, score = config.ood.false_alarm_rate, Score(config.ood.score)
    print(
        f"calibrated on {measured.frames} of {len(paths)} images: temperature "
        f"{measured.temperature:.3g}, {score} threshold "
        f"{measured.normal[score].threshold(rate):.3f} at a false-alarm rate of {rate:.0%}\n"
        f"written to {out}; name it under 'calibration' in the configuration"
    )
