"""Continual test-time adaptation: statistics alignment and prompt tuning, one state per domain.

The source domain is left alone. In every other domain

* the image tower is aligned to the domain's statistics (`alignment`), measured on admitted frames
  that differ from each other, and only while that makes its answers more informative;
* context vectors of the prompt are tuned on cached features against an exponential moving average
  of themselves, the weight-averaged teacher (Tarvainen & Valpola 2017; CoTTA, Wang et al. 2022).

Nothing here runs while a frame waits, but two matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agent.adapt.alignment import Alignment, Moments
from agent.adapt.domains import SOURCE
from agent.adapt.information import Answers
from agent.adapt.memory import FeatureMemory
from agent.adapt.prompt import Tunable, shifted, tunable
from agent.adapt.strategy import Observation, Outcome, ZeroShot, entropy
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class ContinualConfig:
    """Hyperparameters; one set for every stream and label set.

    Attributes:
        gallery: admitted frames on which the statistics are measured at a time.
        novelty: a frame enters the gallery if its cosine to each frame there is below this.
        margin: by how much more information the aligned answers must carry, so that chance does
            not decide: in nats, and relatively where there is more than one.
        settled: images after which older statistics fade as new ones come.
        batch: features in one prompt step; a step waits until as many new ones were admitted.
        learning_rate: of AdamW, relative to the root mean square of the source context.
        momentum: of the teacher's moving average.
        sharpening: temperature of the teacher's probabilities, below 1.
        centering: momentum of the running mean that is subtracted from the teacher's logits.
        diversity: weight of the marginal entropy, against collapse.
        anchor: weight of the squared distance to the source, relative to the source's norm.
        restore: probability that a step sets an entry of the context back to the source.
    """

    gallery: int = 16
    novelty: float = 0.99
    margin: float = 0.02
    settled: int = 512
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

    def __init__(self, source: Tensor, n_labels: int, learning_rate: float) -> None:
        self.theta = source.clone().requires_grad_(True)
        self.teacher = source.clone()
        self.centre_K = torch.zeros(n_labels, device=source.device)
        self.optimizer = torch.optim.AdamW([self.theta], lr=learning_rate, weight_decay=0.0)
        self.memory = FeatureMemory()
        self.fresh = 0
        self.gallery: list[tuple[Tensor, Tensor]] = []  # (pixels as uint8, feature)
        self.offered = 0
        self.moments: Moments | None = None
        self.measured = 0
        self.plain = Answers()
        self.corrected = Answers()
        self.aligned = False
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
        reference: Moments | None = None,
        seed: int = 0,
    ) -> None:
        """`reference` is what `calibrate` measured; without it nothing is aligned."""
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        self._alignment = Alignment(encoder.visual, reference)
        # The checkpoint's own statistics will not do: a camera that sees few kinds of things is far
        # from them on a clear day, and answers that alignment spreads over all labels pass for
        # informative. On eight scenes in fog it cost 42 points where a calibration won 19.
        self._aligns = reference is not None and self._alignment.available
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
        """Features with each frame aligned to its own domain's published statistics."""
        tables = [self._table(domain) for domain in domains]
        with self._alignment.applied(tables):
            return self._encoder.encode_image(pixels_BCHW)

    def step(self, seen: Observation) -> Tensor:
        """Logits against each domain's published text features; admitted frames are remembered."""
        logits_BK = seen.logits_BK.clone()
        for domain in set(seen.domains) - {SOURCE}:
            rows = torch.tensor(
                [i for i, d in enumerate(seen.domains) if d == domain], device=logits_BK.device
            )
            state = self._state(domain)
            if state.text_KD is not None:
                features = seen.features_BD[rows]
                logits_BK[rows] = self._zero_shot.scale * features @ state.text_KD.T
            self._remember(state, seen, rows)
        return logits_BK

    def _table(self, domain: int) -> Moments | None:
        state = self._domains.get(domain)
        return state.moments if state is not None and state.aligned else None

    def _remember(self, state: _Domain, seen: Observation, rows: Tensor) -> None:
        """Keep what the frozen gate passed: novel frames for statistics, sure ones for prompts."""
        probabilities = seen.logits_BK[rows].softmax(dim=-1)
        entropies = entropy(probabilities)
        for row, sureness, label in zip(
            rows.tolist(), entropies.tolist(), probabilities.argmax(dim=-1).tolist(), strict=True
        ):
            feature_D = seen.features_BD[row]
            if not bool(seen.admitted_B[row]) or not bool(torch.isfinite(feature_D).all()):
                continue
            if state.median_entropy != state.median_entropy:  # not yet a number
                state.median_entropy = sureness
            # Stochastic approximation of the median: a constant step up or down.
            state.median_entropy += 0.05 * (1 if sureness > state.median_entropy else -1)
            if self._wants(state):
                closest = max((float(f @ feature_D) for _, f in state.gallery), default=-1.0)
                if closest < self._config.novelty:
                    pixels = (seen.pixels_BCHW[row] * 255).round().to(torch.uint8)
                    state.gallery.append((pixels, feature_D))
            if sureness <= state.median_entropy and state.memory.add(feature_D, label):
                state.fresh += 1

    def _wants(self, state: _Domain) -> bool:
        """Whether the gallery looks at this frame; the more was measured, the fewer are needed."""
        if not self._aligns or len(state.gallery) >= self._config.gallery:
            return False
        state.offered += 1
        return state.offered % (1 + state.measured // 64) == 0

    # -- learning -------------------------------------------------------------------------------

    def learn(self) -> Outcome | None:
        """Align a domain whose gallery is full, else take one prompt step where enough is new."""
        for state in self._domains.values():
            if len(state.gallery) >= self._config.gallery:
                return self._align(state)
        for state in self._domains.values():
            if state.fresh >= self._config.batch:
                return self._tune(state)
        return None

    @torch.no_grad()
    def _align(self, state: _Domain) -> Outcome:
        """Judge the statistics so far on the gallery, which they do not know yet; then add it.

        They are published while, over the galleries so far, the zero-shot model's answers say
        more of the frames with them than without.
        """
        pixels = torch.stack([pixels for pixels, _ in state.gallery]).float().div_(255)
        state.gallery.clear()
        prior = state.moments
        was = state.aligned
        if prior is not None:
            state.plain.add(self._answers(self._encoder.encode_image(pixels)))
            with self._alignment.applied([prior] * len(pixels)):
                state.corrected.add(self._answers(self._encoder.encode_image(pixels)))
            plain = state.plain.information
            least = plain + self._config.margin * max(1.0, plain)
            state.aligned = state.corrected.information > least
            if prior.count > self._config.settled:
                prior = Moments(prior.mean, prior.variance, self._config.settled)
        with self._alignment.measured(prior) as measured:
            self._encoder.encode_image(pixels)
        moments = measured[0]
        if not bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.variance).all()):
            return Outcome.NON_FINITE
        state.moments = moments
        state.measured += len(pixels)
        if state.aligned or was:
            # Features kept so far were encoded otherwise.
            state.memory.clear()
            state.fresh = 0
            state.version += 1
        return Outcome.ALIGNED if state.aligned else Outcome.DECLINED

    def _answers(self, features_BD: Tensor) -> Tensor:
        return self._zero_shot.logits(features_BD).softmax(dim=-1)

    def _tune(self, state: _Domain) -> Outcome:
        """One AdamW step on symmetric cross-entropy to the centred, sharpened teacher."""
        config = self._config
        state.fresh = 0
        features_BD = state.memory.sample(config.batch, self._generator)
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

    def aligned(self, domain: int) -> bool:
        """Whether the domain's statistics are in use."""
        return self._table(domain) is not None

    def version(self, domain: int) -> int:
        """Published alignments and prompts of this domain since its last reset."""
        return self._domains[domain].version if domain in self._domains else 0

    def distance(self, domain: int) -> float:
        """Distance of the published context from the source, relative to the source's norm."""
        if domain not in self._domains:
            return 0.0
        return float((self._domains[domain].teacher - self._tunable.source).norm()) / self._unit

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
                "counters": torch.tensor(
                    [kept.version, kept.fresh, int(kept.aligned), kept.offered, kept.measured]
                ),
                "median_entropy": torch.tensor(kept.median_entropy),
            }
            if features is not None:
                own |= {"memory.labels": torch.tensor(labels), "memory.features": features}
            own |= kept.plain.state("plain") | kept.corrected.state("corrected")
            if kept.moments is not None:
                own |= {
                    "moments.mean": kept.moments.mean.clone(),
                    "moments.variance": kept.moments.variance.clone(),
                    "moments.count": torch.tensor(kept.moments.count),
                }
            for name, value in kept.optimizer.state.get(kept.theta, {}).items():
                own[f"optimizer.{name}"] = value.clone()
            state |= {f"{domain}/{name}": tensor for name, tensor in own.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Strategy.load_state_dict`. Nothing changes unless all of it can be taken over."""
        by_domain: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            domain, _, name = key.partition("/")
            if name:
                by_domain.setdefault(int(domain), {})[name] = tensor
        domains = {domain: self._restored(own) for domain, own in by_domain.items()}
        self._generator.set_state(state["generator"])
        self._domains = domains

    def _restored(self, own: dict[str, Tensor]) -> _Domain:
        kept = self._new_domain()
        with torch.no_grad():
            kept.theta.copy_(own["theta"])
        kept.teacher.copy_(own["teacher"])
        kept.centre_K.copy_(own["centre"])
        kept.version, kept.fresh, aligned, kept.offered, kept.measured = own["counters"].tolist()
        kept.aligned = bool(aligned)
        kept.plain.load_state(own, "plain")
        kept.corrected.load_state(own, "corrected")
        kept.median_entropy = float(own["median_entropy"])
        if "memory.labels" in own:
            for label, feature in zip(
                own["memory.labels"].tolist(), own["memory.features"], strict=True
            ):
                kept.memory.add(feature, label)
        if "moments.mean" in own:
            kept.moments = Moments(
                own["moments.mean"], own["moments.variance"], int(own["moments.count"])
            )
        inner = {
            name.removeprefix("optimizer."): tensor.clone()
            for name, tensor in own.items()
            if name.startswith("optimizer.")
        }
        if inner:
            kept.optimizer.state[kept.theta] = inner
            published = shifted(self._zero_shot.text_KD, self._delta(kept.teacher))
            kept.text_KD = published.detach()
        return kept

    def _state(self, domain: int) -> _Domain:
        if domain not in self._domains:
            self._domains[domain] = self._new_domain()
        return self._domains[domain]

    def _new_domain(self) -> _Domain:
        source = self._tunable.source
        rms = self._unit / source.numel() ** 0.5
        rate = self._config.learning_rate * rms
        return _Domain(source, len(self._zero_shot.labels), rate)
