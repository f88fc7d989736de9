"""Continual test-time adaptation: correction and prompt tuning, one state per domain.

The source domain is left alone. In every other domain

* pictures are repaired and the image tower is aligned (`correction`);
* what is left of the domain in all features alike is taken away (`centre`);
* context vectors of the prompt are tuned on cached features against an exponential moving average
  of themselves, the weight-averaged teacher (Tarvainen & Valpola 2017; CoTTA, Wang et al. 2022).

While a frame waits, nothing of this runs but the repair of its picture and a few matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.centre import CentreConfig, Centring, DomainCentre
from agent.adapt.correction import CorrectionConfig, Corrector, DomainCorrection
from agent.adapt.domains import SOURCE
from agent.adapt.memory import FeatureMemory
from agent.adapt.prompt import Tunable, shifted, tunable
from agent.adapt.reference import Reference
from agent.adapt.strategy import Observation, Outcome, ZeroShot, entropy
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class ContinualConfig:
    """Hyperparameters; one set for every stream and label set.

    Attributes:
        correction: of pictures and tower.
        centre: of features.
        batch: features in one prompt step; a step waits until as many new ones were admitted.
        learning_rate: of AdamW, relative to the root mean square of the source context.
        momentum: of the teacher's moving average.
        sharpening: temperature of the teacher's probabilities, below 1.
        centering: momentum of the running mean that is subtracted from the teacher's logits.
        diversity: weight of the marginal entropy, against collapse.
        anchor: weight of the squared distance to the source, relative to the source's norm.
        restore: probability that a step sets an entry of the context back to the source.
    """

    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    centre: CentreConfig = field(default_factory=CentreConfig)
    batch: int = 32
    learning_rate: float = 2e-2
    momentum: float = 0.98
    sharpening: float = 0.7
    centering: float = 0.95
    diversity: float = 0.5
    anchor: float = 0.1
    restore: float = 0.01


class _Domain:
    """Everything learned of one domain; `theta` is tuned, `teacher` is published."""

    def __init__(
        self,
        source: Tensor,
        n_labels: int,
        learning_rate: float,
        correction: DomainCorrection,
        centre: DomainCentre,
    ) -> None:
        self.correction = correction
        self.centre = centre
        self.theta = source.clone().requires_grad_(True)
        self.teacher = source.clone()
        self.centre_K = torch.zeros(n_labels, device=source.device)
        self.optimizer = torch.optim.AdamW([self.theta], lr=learning_rate, weight_decay=0.0)
        self.memory = FeatureMemory()
        self.fresh = 0
        self.median_entropy = float("nan")
        self.version = 0
        self.text_KD: Tensor | None = None  # published; None is the zero-shot ensemble


class Continual:
    """Alignment and prompt tuning per domain, learned off the hot path."""

    name: ClassVar[str] = "continual"

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        *,
        config: ContinualConfig = ContinualConfig(),
        reference: Reference | None = None,
        seed: int = 0,
    ) -> None:
        """`reference` is what `calibrate` measured; without it nothing is corrected."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        self._corrector = Corrector(encoder, zero_shot, reference, config.correction)
        self._centring = Centring(zero_shot, reference, config.centre)
        self._tunable: Tunable = tunable(encoder, zero_shot)
        with torch.no_grad():
            self._source_text_KD = self._tunable.text(self._tunable.source)
        # A residual starts at zero; there the unit is the length of a text feature.
        norm = float(self._tunable.source.norm())
        self._unit = norm if norm > 0 else len(zero_shot.labels) ** 0.5
        self._generator = torch.Generator().manual_seed(seed)
        self._domains: dict[int, _Domain] = {}

    # -- the hot path ---------------------------------------------------------------------------

    def encode(self, pixels_BCHW: Tensor, domains: Sequence[int]) -> Tensor:
        """Features with each frame corrected as its own domain needs it."""
        corrected = sorted({domain for domain in domains if self.encoding(domain)})
        if not corrected:
            return self._encoder.encode_image(pixels_BCHW)
        groups = [
            (domain, [i for i, d in enumerate(domains) if d == domain]) for domain in corrected
        ]
        others = [i for i, d in enumerate(domains) if d not in corrected]
        parts = [self._encode(self._domains[d], pixels_BCHW[rows]) for d, rows in groups]
        if others:
            parts.append(self._encoder.encode_image(pixels_BCHW[others]))
        order = torch.tensor([i for _, rows in groups for i in rows] + others).argsort()
        return torch.cat(parts)[order.to(pixels_BCHW.device)]

    def _encode(self, state: _Domain, pixels_BCHW: Tensor) -> Tensor:
        before = state.correction.chosen
        features_BD = self._corrector.encode(state.correction, pixels_BCHW)
        if state.correction.chosen is not before:
            self._forget_features(state)
        return features_BD

    def _forget_features(self, state: _Domain) -> None:
        """Features kept so far were encoded otherwise."""
        state.memory.clear()
        state.fresh = 0
        state.centre = self._centring.domain()
        state.version += 1

    def step(self, seen: Observation) -> Tensor:
        """Logits against each domain's published text features; admitted frames are remembered."""
        logits_BK = seen.logits_BK.clone()
        for domain in set(seen.domains) - {SOURCE}:
            rows = [i for i, d in enumerate(seen.domains) if d == domain]
            state = self._state(domain)
            novel = self._corrector.novel(state.correction, seen, rows)
            teaching = [seen.teaching[row] for row in rows]
            features = seen.features_BD[rows]
            differs = self._centring.learn(
                state.centre, features, seen.logits_BK[rows], teaching, novel
            )
            if state.text_KD is not None or state.centre.pays:
                text_KD = self._zero_shot.text_KD if state.text_KD is None else state.text_KD
                centred = self._centring.centred(state.centre, features)
                logits_BK[rows] = self._zero_shot.scale * centred @ text_KD.T
            differs |= self._corrector.remember(state.correction, seen, rows, novel)
            state.version += differs
            self._remember(state, seen, rows)
        return logits_BK

    def _remember(self, state: _Domain, seen: Observation, rows: list[int]) -> None:
        """Keep the features of frames that the frozen gate passed and the prompt is sure of."""
        labels = seen.logits_BK[rows].argmax(dim=-1).tolist()
        for row, label in zip(rows, labels, strict=True):
            if not seen.teaching[row]:
                continue
            sureness = seen.vagueness[row]
            if state.median_entropy != state.median_entropy:  # not yet a number
                state.median_entropy = sureness
            # Stochastic approximation of the median: a constant step up or down.
            state.median_entropy += 0.05 * (1 if sureness > state.median_entropy else -1)
            if sureness <= state.median_entropy and state.memory.add(seen.features_BD[row], label):
                state.fresh += 1

    # -- learning -------------------------------------------------------------------------------

    def learn(self, thrifty: bool = False) -> Outcome | None:
        """Correct a domain whose gallery is full, else take one prompt step where enough is new."""
        due = [s for s in self._domains.values() if self._corrector.is_due(s.correction)]
        newest = min(due, key=_seniority, default=None)
        if newest is not None and (newest.correction.rounds == 0 or not thrifty):
            return self._correct(newest)
        if thrifty:
            return None
        for state in self._domains.values():
            if state.fresh >= self._config.batch:
                return self._tune(state)
        return None

    def _correct(self, state: _Domain) -> Outcome:
        before = state.correction.chosen
        outcome = self._corrector.judge(state.correction)
        if state.correction.chosen is not before:
            self._forget_features(state)
        return outcome

    def _tune(self, state: _Domain) -> Outcome:
        """One AdamW step on symmetric cross-entropy to the centred, sharpened teacher."""
        config = self._config
        state.fresh = 0
        sampled_BD = state.memory.sample(config.batch, self._generator)
        features_BD = self._centring.centred(state.centre, sampled_BD)
        with torch.no_grad():
            teacher_BK, centred_K = self._teach(state, features_BD)
        text_KD = shifted(self._zero_shot.text_KD, self._delta(state.theta))
        log_student_BK = (self._zero_shot.scale * features_BD @ text_KD.T).log_softmax(dim=-1)
        student_BK = log_student_BK.exp()
        forward = -(teacher_BK * log_student_BK).sum(-1).mean()
        backward = -(student_BK * teacher_BK.clamp_min(1e-4).log()).sum(-1).mean()
        drift = (state.theta - self._tunable.source).square().sum() / self._unit**2
        loss = (
            0.5 * (forward + backward)
            - config.diversity * entropy(student_BK.mean(dim=0))
            + config.anchor * drift
        )
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = state.theta.grad
        if gradient is None or not bool(torch.isfinite(loss) & torch.isfinite(gradient).all()):
            return Outcome.NON_FINITE
        state.optimizer.step()
        with torch.no_grad():
            restored = (
                torch.rand(state.theta.shape, generator=self._generator) < config.restore
            ).to(state.theta.device)
            state.theta.copy_(torch.where(restored, self._tunable.source, state.theta))
            state.teacher.lerp_(state.theta, 1 - config.momentum)
            state.centre_K.lerp_(centred_K, 1 - config.centering)
        self._publish(state)
        return Outcome.STEPPED

    def _teach(self, state: _Domain, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's template-averaged probabilities (B, K) and its mean logits (K,)."""
        text_TKD = shifted(self._zero_shot.templates_TKD, self._delta(state.teacher))
        logits_TBK = self._zero_shot.scale * features_BD @ text_TKD.transpose(-1, -2)
        mean_K = logits_TBK.mean(dim=(0, 1))
        centred = logits_TBK - (state.centre_K - state.centre_K.mean())
        return (centred / self._config.sharpening).softmax(dim=-1).mean(dim=0), mean_K

    def _delta(self, theta: Tensor) -> Tensor:
        return self._tunable.text(theta) - self._source_text_KD

    @torch.no_grad()
    def _publish(self, state: _Domain) -> None:
        state.text_KD = shifted(self._zero_shot.text_KD, self._delta(state.teacher))
        state.version += 1

    # -- what the guard and the snapshots need --------------------------------------------------

    def encoding(self, domain: int) -> int:
        """The number of the domain's correction; doing nothing has 0."""
        return self._domains[domain].correction.encoding if domain in self._domains else 0

    def version(self, domain: int) -> int:
        """How many times this domain's answers changed since its last reset."""
        return self._domains[domain].version if domain in self._domains else 0

    def distance(self, domain: int) -> float:
        """Distance of the published context from the source, relative to the source's norm."""
        if domain not in self._domains:
            return 0.0
        return float((self._domains[domain].teacher - self._tunable.source).norm()) / self._unit

    def begin(self, domain: int, kin: int | None) -> None:
        """Correct a new domain as its kin is, until its own frames are judged."""
        self.reset(domain)
        if kin in self._domains:
            correction = self._corrector.inherited(self._domains[kin].correction)
            self._domains[domain] = self._new_domain(correction)

    def reset(self, domain: int | None = None) -> None:
        """Forget one domain, or all."""
        if domain is None:
            self._domains.clear()
        else:
            self._domains.pop(domain, None)

    def state_dict(self) -> dict[str, Tensor]:
        """All domains and the generator; pictures in the galleries are not kept."""
        state = {"generator": self._generator.get_state()}
        for domain, kept in self._domains.items():
            labels, features = kept.memory.state()
            own = {
                "theta": kept.theta.detach().clone(),
                "teacher": kept.teacher.clone(),
                "centre": kept.centre_K.clone(),
                "counters": torch.tensor([kept.version, kept.fresh]),
                "median_entropy": torch.tensor(kept.median_entropy, dtype=torch.float64),
            }
            if features is not None:
                own |= {"memory.labels": torch.tensor(labels), "memory.features": features}
            for name, tensor in kept.correction.state().items():
                own[f"correction.{name}"] = tensor
            for name, tensor in kept.centre.state().items():
                own[f"centre.{name}"] = tensor
            for name, value in kept.optimizer.state.get(kept.theta, {}).items():
                own[f"optimizer.{name}"] = value.clone()
            state |= {f"{domain}/{name}": tensor for name, tensor in own.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Strategy.load_state_dict`. Nothing changes unless all of it can be taken over."""
        by_domain: dict[int, dict[str, Tensor]] = {}
        try:
            for key, tensor in state.items():
                domain, _, name = key.partition("/")
                if name:
                    by_domain.setdefault(int(domain), {})[name] = tensor
            if SOURCE in by_domain:
                raise ValueError("the source domain is never adapted to")
            domains = {domain: self._restored(own) for domain, own in by_domain.items()}
            self._generator.set_state(state["generator"])
        except (ValueError, TypeError, IndexError) as error:
            raise RuntimeError(f"the state is not of this strategy: {error}") from error
        self._domains = domains

    def _restored(self, state: dict[str, Tensor]) -> _Domain:
        own = {name: tensor.to(self._encoder.device) for name, tensor in state.items()}
        kept = self._new_domain()
        with torch.no_grad():
            kept.theta.copy_(own["theta"])
        kept.teacher.copy_(own["teacher"])
        kept.centre_K.copy_(own["centre"])
        kept.version, kept.fresh = own["counters"].tolist()
        kept.correction.load(_under("correction.", own))
        kept.centre.load(_under("centre.", own))
        kept.median_entropy = float(own["median_entropy"])
        if "memory.labels" in own:
            for label, feature in zip(
                own["memory.labels"].tolist(), own["memory.features"], strict=True
            ):
                kept.memory.add(feature, label)
        inner = {name: tensor.clone() for name, tensor in _under("optimizer.", own).items()}
        if inner:
            kept.optimizer.state[kept.theta] = inner
            published = shifted(self._zero_shot.text_KD, self._delta(kept.teacher))
            kept.text_KD = published.detach()
        return kept

    def _state(self, domain: int) -> _Domain:
        if domain not in self._domains:
            self._domains[domain] = self._new_domain()
        return self._domains[domain]

    def _new_domain(self, correction: DomainCorrection | None = None) -> _Domain:
        source = self._tunable.source
        rms = self._unit / source.numel() ** 0.5
        rate = self._config.learning_rate * rms
        return _Domain(
            source,
            len(self._zero_shot.labels),
            rate,
            correction or self._corrector.domain(),
            self._centring.domain(),
        )


def _seniority(state: _Domain) -> tuple[int, bool]:
    """Domains that nothing is known of come first, then those that go on as another did."""
    return state.correction.rounds, state.correction.chosen is not None


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
