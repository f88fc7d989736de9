"""The default with one part taken away, or one hyperparameter changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.adapt.centre import CentreConfig
from agent.adapt.continual import ContinualConfig
from agent.adapt.correction import CorrectionConfig
from agent.adapt.domains import DomainConfig
from agent.adapt.fit import FitConfig
from agent.adapt.guard import GuardConfig
from agent.adapt.restore import Restoration
from agent.assemble import Parameters


@dataclass(frozen=True, slots=True)
class Ablation:
    """What differs from the default: hyperparameters, and settings by section."""

    parameters: Parameters = field(default_factory=Parameters)
    changes: Mapping[str, Any] = field(default_factory=dict)


def _correction(**changes: object) -> Ablation:
    correction = replace(CorrectionConfig(), **changes)  # type: ignore[arg-type]
    return Ablation(Parameters(continual=ContinualConfig(correction=correction)))


def _prompt(**changes: float) -> Ablation:
    return Ablation(Parameters(continual=replace(ContinualConfig(), **changes)))  # type: ignore[arg-type]


NOTHING = Ablation()
#: A part of the default each.
PARTS: dict[str, Ablation] = {
    "no-alignment": _correction(strength=0.0),
    "no-repair": _correction(repairs=(Restoration.NONE,)),
    "no-centring": Ablation(
        Parameters(continual=ContinualConfig(centre=CentreConfig(narrow=math.inf)))
    ),
    "no-judge": _correction(margin=-math.inf),
    "no-kin": Ablation(Parameters(domains=DomainConfig(kinship=0.0))),
    "no-steadiness": _correction(bar=math.inf),
    "no-prompt-tuning": _prompt(learning_rate=0.0),
    "no-teacher": _prompt(momentum=0.0),
    "no-restore": _prompt(restore=0.0),
    "no-diversity": _prompt(diversity=0.0),
    "no-anchor": _prompt(anchor=0.0),
    # All that is not the source is one domain, forgotten whenever a new one opens.
    "no-domain-memory": Ablation(changes={"adapt": {"max_domains": 2}}),
    "no-gate": Ablation(changes={"ood": {"false_alarm_rate": 1e-9}}),
    "no-fit": Ablation(Parameters(fit=FitConfig(drop=2.0))),
    "no-guard": Ablation(Parameters(guard=GuardConfig(64, -math.inf, -math.inf, math.inf))),
}
#: A hyperparameter each, below and above the default.
CHANGES: dict[str, Ablation] = {
    "strength=0.5": _correction(strength=0.5),
    "strength=1": _correction(strength=1.0),
    "gallery=8": _correction(gallery=8),
    "gallery=32": _correction(gallery=32),
    "margin=0": _correction(margin=0.0),
    "margin=0.05": _correction(margin=0.05),
    "measured=16": _correction(measured=16),
    "measured=128": _correction(measured=128),
    "learning_rate=0.005": _prompt(learning_rate=0.005),
    "learning_rate=0.08": _prompt(learning_rate=0.08),
    "patience=0.5": _correction(patience=0.5),
    "patience=2": _correction(patience=2.0),
    "drop=0.1": Ablation(Parameters(fit=FitConfig(drop=0.1))),
    "drop=0.4": Ablation(Parameters(fit=FitConfig(drop=0.4))),
    "radius=1.5": Ablation(Parameters(domains=DomainConfig(radius=1.5))),
    "radius=2": Ablation(Parameters(domains=DomainConfig(radius=2.0))),
}
ABLATIONS = PARTS | CHANGES
