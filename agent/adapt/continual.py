"""Continual test-time adaptation: statistics alignment and prompt tuning, one state per domain.

The source domain is left alone. In every other domain

* pictures are repaired (`restore`) and the image tower is aligned to the domain's statistics
  (`alignment`), both measured on admitted frames that differ from each other. Which of it is used,
  if any, is what makes the answers most informative;
* context vectors of the prompt are tuned on cached features against an exponential moving average
  of themselves, the weight-averaged teacher (Tarvainen & Valpola 2017; CoTTA, Wang et al. 2022).

While a frame waits, nothing of this runs but the repair of its picture and two matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from agent.adapt.alignment import Affine, Alignment, Moments
from agent.adapt.domains import SOURCE
from agent.adapt.information import Advantage, information
from agent.adapt.memory import FeatureMemory
from agent.adapt.prompt import Tunable, shifted, tunable
from agent.adapt.reference import Reference
from agent.adapt.restore import Restoration, Spectrum, equalise, median3
from agent.adapt.strategy import Observation, Outcome, ZeroShot, entropy
from agent.encode import Encoder


@dataclass(frozen=True, slots=True)
class ContinualConfig:
    """Hyperparameters; one set for every stream and label set.

    Attributes:
        gallery: admitted frames on which corrections are measured and judged at a time.
        novelty: a frame enters the gallery if its cosine to each frame there is below this.
        margin: the advantage that a correction must have to be used, so that chance does not
            decide.
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


_Measured = TypeVar("_Measured", Moments, Spectrum)


class Correction(NamedTuple):
    """What is done to a domain's pictures, and whether the tower is aligned to the result."""

    restoration: Restoration
    aligned: bool


PLAIN = Correction(Restoration.NONE, aligned=False)
#: What a new domain is tried on without alignment; doing nothing needs no trial.
_REPAIRS = tuple(Correction(each, aligned=False) for each in Restoration if each is not PLAIN[0])
#: In the order in which snapshots number them.
_RESTORATIONS = tuple(Restoration)
_CORRECTIONS = tuple(Correction(how, aligned) for how in Restoration for aligned in (False, True))
_index = _CORRECTIONS.index


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
        self.rounds = 0  # galleries judged
        self.spectra: dict[bool, Spectrum] = {}  # of the pictures: as they come, and filtered
        self.advantages: dict[Correction, Advantage] = {}
        self.moments: dict[Restoration, Moments] = {}
        self.correction = PLAIN
        self.affine: Affine | None = None  # published with the correction
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
        self._reference = None if reference is None else reference.to(encoder.device)
        self._alignment = Alignment(encoder.visual, reference.moments if reference else None)
        # The checkpoint's own statistics will not do: a camera that sees few kinds of things is far
        # from them on a clear day, and answers that alignment spreads over all labels pass for
        # informative. On eight scenes in fog it cost 42 points where a calibration won 19.
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
        """Features under the domain's published correction."""
        restored = self._restore(state, state.correction.restoration, pixels_BCHW)
        with self._alignment.applied(state.affine):
            features_BD = self._encoder.encode_image(restored)
        if bool(torch.isfinite(features_BD).all()):
            return features_BD
        # Frames without features teach nothing, so that the domain would stay broken.
        state.correction, state.affine = PLAIN, None
        return self._encoder.encode_image(pixels_BCHW)

    def _restore(self, state: _Domain, how: Restoration, pixels_BCHW: Tensor) -> Tensor:
        if how.filters:
            pixels_BCHW = median3(pixels_BCHW)
        if how.equalises and self._reference is not None:
            spectrum = state.spectra[how.filters]
            pixels_BCHW = equalise(pixels_BCHW, spectrum, self._reference.spectrum)
        return pixels_BCHW

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
        """Whether the gallery looks at this frame; the more were judged, the fewer are needed."""
        if self._reference is None or len(state.gallery) >= self._config.gallery:
            return False
        state.offered += 1
        # Two at once, since the second judges what the first measured; then rarely.
        every: int = 4 ** min(max(0, state.rounds - 1), 3)
        return state.offered % every == 0

    # -- learning -------------------------------------------------------------------------------

    def learn(self) -> Outcome | None:
        """Correct a domain whose gallery is full, else take one prompt step where enough is new."""
        full = [s for s in self._domains.values() if len(s.gallery) >= self._config.gallery]
        if full:
            return self._correct(min(full, key=lambda state: state.rounds))
        for state in self._domains.values():
            if state.fresh >= self._config.batch:
                return self._tune(state)
        return None

    @torch.no_grad()
    def _correct(self, state: _Domain) -> Outcome:
        """Judge corrections on the gallery, which alignment does not know yet; then learn from it.

        The spectrum, whose few numbers cannot flatter themselves, has seen it. The first gallery
        tries every repair. Later ones try what is in use, the best that is not, alignment on top of
        the best repair, and doing nothing, against which all are measured.
        """
        pixels = torch.stack([pixels for pixels, _ in state.gallery]).float().div_(255)
        served = torch.stack([feature for _, feature in state.gallery])
        state.gallery.clear()
        for filtered in (False, True):
            seen = Spectrum.of(median3(pixels) if filtered else pixels)
            known = state.spectra.get(filtered)
            if not bool(torch.isfinite(seen.energy_OA).all()):
                return Outcome.NON_FINITE
            state.spectra[filtered] = seen if known is None else self._aged(known).merged(seen)

        said = {state.correction: self._information(served)}
        if PLAIN not in said:
            said[PLAIN] = self._information(self._encoder.encode_image(pixels))
        for repair in self._trials(state):
            alone = Correction(Restoration.MEDIAN, aligned=False)
            if repair.restoration is Restoration.MEDIAN_EQUALISED and (
                said.get(alone, math.inf) <= said[PLAIN]
            ):
                continue  # where the median is of no use, it is of none in company
            restored = self._restore(state, repair.restoration, pixels)
            with self._alignment.applied(self._affine(state, repair)):
                said[repair] = self._information(self._encoder.encode_image(restored))
        for correction, nats in said.items():
            state.advantages.setdefault(correction, Advantage()).add(nats, said[PLAIN])
        if not self._align(state, pixels, said):
            return Outcome.NON_FINITE
        state.rounds += 1
        self._choose(state)
        return Outcome.ALIGNED if state.correction != PLAIN else Outcome.DECLINED

    def _trials(self, state: _Domain) -> list[Correction]:
        """What is not in use and worth a look."""
        if not state.rounds:
            return list(_REPAIRS)
        idle = [each for each in state.advantages if each not in (PLAIN, state.correction)]
        return sorted(idle, key=lambda each: state.advantages[each].mean)[-1:]

    def _align(self, state: _Domain, pixels: Tensor, said: dict[Correction, float]) -> bool:
        """Measure the tower on the gallery under the best repair; whether that went well."""
        if not self._alignment.available:
            return True
        best = max(
            (each for each in state.advantages if not each.aligned),
            key=lambda each: state.advantages[each].mean,
        )
        how = best.restoration
        prior = state.moments.get(how)
        aligned = Correction(how, aligned=True)
        restored = self._restore(state, how, pixels)
        if prior is not None and aligned not in said:
            with self._alignment.applied(self._affine(state, aligned)):
                nats = self._information(self._encoder.encode_image(restored))
            state.advantages.setdefault(aligned, Advantage()).add(nats, said[PLAIN])
        with self._alignment.measured(None if prior is None else self._aged(prior)) as measured:
            self._encoder.encode_image(restored)
        moments = measured[0]
        if not all(bool(torch.isfinite(each).all()) for each in moments.tensors().values()):
            return False
        state.moments[how] = moments
        return True

    def _choose(self, state: _Domain) -> None:
        """Publish the correction with the greatest advantage, if it is one."""
        best = max(state.advantages, key=lambda each: state.advantages[each].mean)
        if state.advantages[best].mean <= self._config.margin:
            best = PLAIN
        if best != PLAIN or state.correction != PLAIN:
            # Features kept so far were encoded otherwise.
            state.memory.clear()
            state.fresh = 0
            state.version += 1
        state.correction, state.affine = best, self._affine(state, best)

    def _affine(self, state: _Domain, correction: Correction) -> Affine | None:
        if not correction.aligned:
            return None
        return self._alignment.affine(state.moments[correction.restoration])

    def _aged(self, measured: _Measured) -> _Measured:
        """Beyond `settled` images, older ones fade as new ones come."""
        return replace(measured, count=min(measured.count, self._config.settled))

    def _information(self, features_BD: Tensor) -> float:
        """In nats; features that are not finite say nothing."""
        nats = information(self._zero_shot.logits(features_BD).softmax(dim=-1))
        return nats if math.isfinite(nats) else 0.0

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

    def encoding(self, domain: int) -> int:
        """The number of the domain's correction; doing nothing has 0."""
        return _index(self._domains[domain].correction) if domain in self._domains else 0

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
                    [kept.version, kept.fresh, kept.offered, kept.rounds, _index(kept.correction)]
                ),
                "median_entropy": torch.tensor(kept.median_entropy, dtype=torch.float64),
            }
            if features is not None:
                own |= {"memory.labels": torch.tensor(labels), "memory.features": features}
            for correction, advantage in kept.advantages.items():
                own[f"advantage.{_index(correction)}"] = advantage.state()
            for filtered, spectrum in kept.spectra.items():
                own[f"spectrum.{int(filtered)}.energy"] = spectrum.energy_OA.clone()
                own[f"spectrum.{int(filtered)}.level"] = spectrum.level_A.clone()
                own[f"spectrum.{int(filtered)}.count"] = torch.tensor(spectrum.count)
            for how, moments in kept.moments.items():
                place = f"moments.{_RESTORATIONS.index(how)}"
                for name, tensor in moments.tensors().items():
                    own[f"{place}.{name}"] = tensor.clone()
                own[f"{place}.count"] = torch.tensor(moments.count)
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
        try:
            domains = {domain: self._restored(own) for domain, own in by_domain.items()}
        except (ValueError, TypeError, IndexError) as error:
            raise RuntimeError(f"the state is not of this strategy: {error}") from error
        self._generator.set_state(state["generator"])
        self._domains = domains

    def _restored(self, state: dict[str, Tensor]) -> _Domain:
        own = {name: tensor.to(self._encoder.device) for name, tensor in state.items()}
        kept = self._new_domain()
        with torch.no_grad():
            kept.theta.copy_(own["theta"])
        kept.teacher.copy_(own["teacher"])
        kept.centre_K.copy_(own["centre"])
        counters = own["counters"].tolist()
        kept.version, kept.fresh, kept.offered, kept.rounds, correction = counters
        self._restore_corrections(kept, own, _CORRECTIONS[correction])
        kept.median_entropy = float(own["median_entropy"])
        if "memory.labels" in own:
            for label, feature in zip(
                own["memory.labels"].tolist(), own["memory.features"], strict=True
            ):
                kept.memory.add(feature, label)
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

    def _restore_corrections(
        self, kept: _Domain, own: dict[str, Tensor], correction: Correction
    ) -> None:
        for index, each in enumerate(_CORRECTIONS):
            if f"advantage.{index}" in own:
                kept.advantages[each] = Advantage(*own[f"advantage.{index}"].tolist())
        for filtered in (False, True):
            place = f"spectrum.{int(filtered)}"
            if f"{place}.count" in own:
                kept.spectra[filtered] = Spectrum(
                    own[f"{place}.energy"], own[f"{place}.level"], int(own[f"{place}.count"])
                )
        for index, how in enumerate(_RESTORATIONS):
            place = f"moments.{index}"
            if f"{place}.count" in own:
                kept.moments[how] = Moments(
                    own[f"{place}.mean"],
                    own[f"{place}.variance"],
                    own[f"{place}.mean_spread"],
                    own[f"{place}.variance_spread"],
                    int(own[f"{place}.count"]),
                )
        how = correction.restoration
        if how.equalises and how.filters not in kept.spectra:
            raise KeyError("the spectrum of the domain's correction")
        kept.correction, kept.affine = correction, self._affine(kept, correction)

    def _state(self, domain: int) -> _Domain:
        if domain not in self._domains:
            self._domains[domain] = self._new_domain()
        return self._domains[domain]

    def _new_domain(self) -> _Domain:
        source = self._tunable.source
        rms = self._unit / source.numel() ** 0.5
        rate = self._config.learning_rate * rms
        return _Domain(source, len(self._zero_shot.labels), rate)
