"""What is done to a domain's frames before they are answered: repair and alignment.

Pictures are repaired (`restore`) and the tower is aligned to the result (`alignment`). Which repair
is worth a trial is told by how normal the repaired pictures look; whether anything is done at all,
by what makes the answers most informative on the domain's own frames. The tower is measured while
it answers, so that learning what a domain looks like costs next to nothing.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from agent.adapt.alignment import STRENGTH, Affine, Alignment
from agent.adapt.information import NARROW, Advantage, information, variety
from agent.adapt.moments import Moments, Sample
from agent.adapt.reference import Reference
from agent.adapt.restore import Restoration, Spectrum, equalise, median3
from agent.adapt.steadiness import Steadiness
from agent.adapt.strategy import Observation, Outcome, ZeroShot, entropy
from agent.adapt.style import style
from agent.encode import Encoder

#: In the order in which snapshots number them; 0 is nothing.
_RESTORATIONS = tuple(Restoration)
#: Of as many frames the next gallery takes one, however old a domain is.
_LONGEST_PAUSE = 512
_Measured = TypeVar("_Measured", Moments, Spectrum)


@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """How domains are corrected.

    Attributes:
        repairs: what may be tried; the first is doing nothing but align.
        strength: share of a departure of the tower's statistics that is undone.
        gallery: frames on which corrections are judged at a time.
        novelty: a frame counts as another if its cosine to each recent one is below this.
        recent: frames that a new one is compared with.
        narrow: a gallery with less than this share of the variety of normal answers is thinned, and
            filled up with frames from further apart.
        thinnings: of a gallery at most. One that is narrow still, and answered as surely as normal
            frames are, counts only for corrections that also make answers surer.
        margin: the advantage that a correction must have to be used, beyond what it would seem to
            have on normal frames.
        patience: the next gallery is spread over so many times the frames that were seen so far,
            where the last verdict was a close one.
        plain: an advantage this far from the one that is needed makes the pause twice as long, and
            8 times as long at most.
        measured: images that the tower is measured on while it answers, once a correction is
            chosen; half as many when it is confirmed, since the domain may have changed.
        together: frames in a batch that are measured so; of fewer, too little is known. Where
            batches stay smaller, galleries are measured instead.
        settled: images after which older statistics fade as new ones come.
        window: frames in which it is looked at whether answers are still as sure as before.
        bar: standard errors by which they must differ for the correction to be judged anew.
    """

    repairs: tuple[Restoration, ...] = tuple(Restoration)
    strength: float = STRENGTH
    gallery: int = 16
    novelty: float = 0.99
    recent: int = 32
    narrow: float = NARROW
    thinnings: int = 2
    margin: float = 0.02
    patience: float = 1.0
    plain: float = 0.02
    measured: int = 32
    together: int = 8
    settled: int = 512
    window: int = 32
    bar: float = 3.0


class DomainCorrection:
    """What is known of one domain and done about it; `chosen` is None for nothing."""

    def __init__(self, config: CorrectionConfig) -> None:
        self.chosen: Restoration | None = None
        self.rounds = 0  # galleries judged
        self.unmeasured = 0  # images that are still to be measured
        self.offered = 0  # frames that a gallery might have taken
        self.every = 1  # of how many of them the gallery takes one
        self.thinned = 0  # how many times the gallery was
        self.recent: deque[Tensor] = deque(maxlen=config.recent)  # features
        self.gallery: list[tuple[Tensor, Tensor]] = []  # (pixels as uint8, feature)
        self.spectra: dict[bool, Spectrum] = {}  # of the pictures: as they come, and filtered
        self.moments: dict[Restoration, Moments] = {}
        self.advantages: dict[Restoration, Advantage] = {}
        self.affine: Affine | None = None  # of the chosen one's moments; None if they have changed
        self.sample: Sample | None = None  # of the batch that is being answered
        self.steadiness = Steadiness(config.window, config.bar)  # of answers since it was judged

    @property
    def encoding(self) -> int:
        """Number of what is done; nothing has 0."""
        return 0 if self.chosen is None else 1 + _RESTORATIONS.index(self.chosen)

    def withdraw(self) -> None:
        """Do nothing from now on; what was kept was encoded otherwise."""
        self.chosen = self.affine = self.sample = None
        self.gallery.clear()
        self.thinned = 0

    def drop(self, how: Restoration) -> None:
        """Forget what is known of a correction that broke features; it may be tried again."""
        self.moments.pop(how, None)
        self.advantages.pop(how, None)
        if how is self.chosen:
            self.withdraw()

    def unsettle(self, config: CorrectionConfig) -> None:
        """Go on as before, but measured, until judged anew; what is known counts for a gallery."""
        weight = config.gallery
        self.rounds = self.offered = self.thinned = 0
        self.every = 1
        self.unmeasured = config.measured
        self.affine = None
        self.gallery.clear()
        self.advantages.clear()
        self.spectra = {how: _light(each, weight) for how, each in self.spectra.items()}
        self.moments = {how: _light(each, weight) for how, each in self.moments.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything but the gallery, as tensors by name."""
        counters = [self.encoding, self.rounds, self.offered, self.every, self.unmeasured]
        own = {"counters": torch.tensor(counters), "steadiness": self.steadiness.state()}
        if self.recent:
            own["recent"] = torch.stack(list(self.recent))
        for filtered, spectrum in self.spectra.items():
            place = f"spectrum.{int(filtered)}"
            own[f"{place}.energy"] = spectrum.energy_OA.clone()
            own[f"{place}.level"] = spectrum.level_A.clone()
            own[f"{place}.count"] = torch.tensor(spectrum.count)
        for how, moments in self.moments.items():
            place = f"moments.{_RESTORATIONS.index(how)}"
            own |= {f"{place}.{name}": tensor.clone() for name, tensor in moments.tensors().items()}
            own[f"{place}.count"] = torch.tensor(moments.count)
        for how, advantage in self.advantages.items():
            own[f"advantage.{_RESTORATIONS.index(how)}"] = advantage.state()
        return own

    def load(self, own: dict[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            KeyError: a part is missing.
        """
        counters = own["counters"].tolist()
        chosen, self.rounds, self.offered, self.every, self.unmeasured = counters
        self.chosen = _RESTORATIONS[chosen - 1] if chosen else None
        self.steadiness.load(own["steadiness"])
        self.recent.extend(own.get("recent", ()))
        for filtered in (False, True):
            place = f"spectrum.{int(filtered)}"
            if f"{place}.count" in own:
                self.spectra[filtered] = Spectrum(
                    own[f"{place}.energy"], own[f"{place}.level"], int(own[f"{place}.count"])
                )
        for index, how in enumerate(_RESTORATIONS):
            if f"advantage.{index}" in own:
                self.advantages[how] = Advantage(*own[f"advantage.{index}"].tolist())
            place = f"moments.{index}"
            if f"{place}.count" in own:
                count = int(own[f"{place}.count"])
                self.moments[how] = Moments.named(own, f"{place}.", count)
        if self.chosen is not None:
            if self.chosen not in self.moments:
                raise KeyError("the moments of the domain's correction")
            if self.chosen.equalises and self.chosen.filters not in self.spectra:
                raise KeyError("the spectrum of the domain's correction")


class Corrector:
    """Corrects domains, and learns how from their frames."""

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        reference: Reference | None,
        config: CorrectionConfig,
    ) -> None:
        """Without a `reference` nothing is corrected.

        The checkpoint's own statistics will not do: a camera that sees few kinds of things is far
        from them on a clear day, and answers that alignment spreads over all labels pass for
        informative. On eight scenes in fog it cost 42 points where a calibration won 19.
        """
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._config = config
        self._reference = None if reference is None else reference.to(encoder.device)
        self._alignment = Alignment(
            encoder.visual, reference.moments if reference else None, strength=config.strength
        )

    def domain(self) -> DomainCorrection:
        """Of a domain that nothing is known of yet."""
        return DomainCorrection(self._config)

    def inherited(self, kin: DomainCorrection) -> DomainCorrection:
        """Of a domain that looks like a change of a known one: corrected like it, but not for long.

        Frames are measured while answering at once, and the first gallery judges.
        """
        state = self.domain()
        if kin.chosen is not None:
            state.chosen = kin.chosen
            state.moments = {kin.chosen: kin.moments[kin.chosen]}
            state.spectra = kin.spectra
            state.unsettle(self._config)
        return state

    # -- the hot path ---------------------------------------------------------------------------

    def encode(self, state: DomainCorrection, pixels_BCHW: Tensor) -> Tensor:
        """Features (B, D) under the domain's correction; a young one is measured on the way."""
        state.sample = None
        if state.chosen is None:
            return self._encoder.encode_image(pixels_BCHW)
        restored = self._restored(state, state.chosen, pixels_BCHW)
        moments = state.moments[state.chosen]
        if state.unmeasured > 0 and len(restored) >= self._config.together:
            with self._alignment.measured(moments) as sample:
                features_BD = self._encoder.encode_image(restored)
            state.sample = sample[0]
        else:
            with self._alignment.applied(self._affine(state, moments)):
                features_BD = self._encoder.encode_image(restored)
        if bool(torch.isfinite(features_BD).all()):
            return features_BD
        # Frames without features teach nothing, so that the domain would stay broken.
        state.drop(state.chosen)
        return self._encoder.encode_image(pixels_BCHW)

    def _affine(self, state: DomainCorrection, moments: Moments) -> Affine:
        if state.affine is None:
            state.affine = self._alignment.affine(moments)
        return state.affine

    def _restored(self, state: DomainCorrection, how: Restoration, pixels_BCHW: Tensor) -> Tensor:
        if how.filters:
            pixels_BCHW = median3(pixels_BCHW)
        if how.equalises and self._reference is not None:
            spectrum = state.spectra[how.filters]
            pixels_BCHW = equalise(pixels_BCHW, spectrum, self._reference.spectrum)
        return pixels_BCHW

    def novel(self, state: DomainCorrection, seen: Observation, rows: list[int]) -> list[bool]:
        """Which of the domain's `rows` were admitted and look like none of the last ones."""
        return [self._is_novel(state, seen, row) for row in rows]

    def remember(
        self, state: DomainCorrection, seen: Observation, rows: list[int], novel: list[bool]
    ) -> bool:
        """Learn from the domain's `rows` that are new; whether it is now corrected otherwise."""
        if self._reference is None:
            return False
        fresh = [row for row, new in zip(rows, novel, strict=True) if new]
        if state.steadiness.add([seen.vagueness[row] for row in fresh]) and state.rounds:
            state.unsettle(self._config)
        for row in fresh:
            if self._wants(state):
                pixels = (seen.pixels_BCHW[row] * 255).round().to(torch.uint8)
                state.gallery.append((pixels, seen.features_BD[row].clone()))
                self._thin(state)
        sample, state.sample = state.sample, None
        if state.chosen is None or sample is None or not any(novel):
            return False
        moments = sample.moments(torch.tensor(novel, device=seen.features_BD.device))
        if not _is_finite(moments):
            return False
        state.moments[state.chosen] = self._aged(state.moments[state.chosen]).merged(moments)
        state.unmeasured -= moments.count
        state.affine = None
        return True

    def _is_novel(self, state: DomainCorrection, seen: Observation, row: int) -> bool:
        if self._reference is None or not seen.teaching[row]:
            return False
        feature_D = seen.features_BD[row]
        if state.recent:
            closest = float((torch.stack(list(state.recent)) @ feature_D).max())
            if closest >= self._config.novelty:
                return False
        state.recent.append(feature_D.clone())  # of a row, which would keep its whole batch
        return True

    def _wants(self, state: DomainCorrection) -> bool:
        """Whether the gallery looks at this frame."""
        if len(state.gallery) >= self._config.gallery:
            return False
        state.offered += 1
        return state.offered % (state.every << state.thinned) == 0

    def _thin(self, state: DomainCorrection) -> None:
        """Of a full gallery that shows few labels, keep every other frame."""
        if not self.is_due(state) or state.thinned >= self._config.thinnings:
            return
        if self._is_narrow(torch.stack([feature for _, feature in state.gallery])):
            del state.gallery[::2]
            state.thinned += 1

    def _is_narrow(self, features_BD: Tensor) -> bool:
        if self._reference is None:
            return False
        labels = self._zero_shot.logits(features_BD).argmax(dim=-1).tolist()
        usual = min(self._reference.variety, len(labels))
        return variety(labels) < self._config.narrow * usual

    # -- off the hot path -----------------------------------------------------------------------

    def is_due(self, state: DomainCorrection) -> bool:
        """Whether there is a gallery to judge."""
        return len(state.gallery) >= self._config.gallery

    @torch.no_grad()
    def judge(self, state: DomainCorrection) -> Outcome:
        """Compare corrections on the gallery, and choose.

        The first gallery tries the repair that makes pictures look most normal, the second
        alignment alone, later ones the best that is not in use. What is in use has been tried by
        answering, except where it could not be measured meanwhile.
        """
        pixels = torch.stack([pixels for pixels, _ in state.gallery])
        pixels = pixels.float().div_(255).contiguous(memory_format=torch.channels_last)
        served = torch.stack([feature for _, feature in state.gallery])
        state.gallery.clear()
        state.thinned = 0
        narrow = self._is_narrow(served)
        tried = state.advantages if state.rounds else self._config.repairs
        for filtered in sorted({how.filters for how in tried}):
            here = Spectrum.of(median3(pixels) if filtered else pixels)
            if not bool(torch.isfinite(here.energy_OA).all()):
                return Outcome.NON_FINITE
            known = state.spectra.get(filtered)
            state.spectra[filtered] = here if known is None else self._aged(known).merged(here)

        said = {state.chosen: self._says(served)}
        if state.chosen is not None:
            said[None] = self._says(self._encoder.encode_image(pixels))
        for how in self._trials(state, pixels):
            prior = state.moments.get(how)
            prior = None if prior is None else self._aged(prior)
            with self._alignment.measured(prior) as sample:
                features_BD = self._encoder.encode_image(self._restored(state, how, pixels))
            moments = sample[0].moments()
            if not _is_finite(moments):
                state.drop(how)
                return Outcome.NON_FINITE
            state.moments[how] = moments if prior is None else prior.merged(moments)
            said[how] = self._says(features_BD)
        plain, plain_vagueness = said[None]
        usual = math.inf if self._reference is None else self._reference.vagueness
        one_thing = narrow and plain_vagueness <= usual
        for what, (nats, vagueness) in said.items():
            if what is not None:
                worth = min(nats, plain) if one_thing and vagueness > plain_vagueness else nats
                state.advantages.setdefault(what, Advantage()).add(worth, plain)
        state.rounds += 1
        state.every = self._pause(state)
        self._choose(state)
        state.steadiness.restart()
        return Outcome.DECLINED if state.chosen is None else Outcome.ALIGNED

    def _trials(self, state: DomainCorrection, pixels: Tensor) -> list[Restoration]:
        """What is worth a look."""
        chosen, means = state.chosen, {h: a.mean for h, a in state.advantages.items()}
        trials = [chosen] if chosen is not None and state.rounds and state.unmeasured > 0 else []
        known = {*means, chosen}
        if not state.rounds and (likely := self._likely(state, pixels)) not in known:
            return [*trials, likely]
        if Restoration.NONE not in known:
            return [*trials, Restoration.NONE]
        best = max((how for how in means if how is not chosen), key=means.__getitem__, default=None)
        if best is not None and (chosen is None or means[best] >= means[chosen] / 2):
            trials.append(best)
        return trials

    def _likely(self, state: DomainCorrection, pixels: Tensor) -> Restoration:
        """The repair that makes pictures look most normal; every other will do to tell."""
        some = pixels[::2]
        return min(self._config.repairs, key=lambda how: self._strangeness(state, how, some))

    def _strangeness(self, state: DomainCorrection, how: Restoration, pixels: Tensor) -> float:
        """How far the repaired pictures' mean style is from normal."""
        if self._reference is None:
            return math.inf
        restored = self._restored(state, how, pixels)
        return float(self._reference.style.whitened(style(restored)).mean(dim=0).norm())

    def _choose(self, state: DomainCorrection) -> None:
        """Use the simplest that is within the margin of the best; nothing is simplest."""
        best = self._best(state)
        if best.mean <= self._needed(best):
            state.withdraw()
            return
        before = state.chosen
        enough = best.mean - max(0.0, self._config.margin)
        state.chosen = next(
            how
            for how in Restoration
            if how in state.advantages and state.advantages[how].mean >= enough
        )
        state.affine = None
        state.unmeasured = self._config.measured // (2 if state.chosen is before else 1)

    def _pause(self, state: DomainCorrection) -> int:
        """Of how many frames the next gallery takes one: the older a domain, the fewer are needed.

        The plainer the verdict, too.
        """
        best = self._best(state)
        plainness = min(8.0, 1 + abs(best.mean - self._needed(best)) / self._config.plain)
        pause = self._config.patience * plainness * state.offered / self._config.gallery
        return max(1, min(_LONGEST_PAUSE, int(pause)))

    def _best(self, state: DomainCorrection) -> Advantage:
        return max(state.advantages.values(), key=lambda advantage: advantage.mean)

    def _needed(self, best: Advantage) -> float:
        """The advantage from which on a correction is used, after so many galleries."""
        if self._reference is None:
            return self._config.margin
        chance = self._reference.false_advantage.bound(best.weight)
        return self._config.margin + max(0.0, chance)

    def _aged(self, measured: _Measured) -> _Measured:
        return _light(measured, self._config.settled)

    def _says(self, features_BD: Tensor) -> tuple[float, float]:
        """Information and mean entropy of answers, in nats; of broken features, nothing at all."""
        answers_BK = self._zero_shot.logits(features_BD).softmax(dim=-1)
        nats, vagueness = information(answers_BK), float(entropy(answers_BK).mean())
        return (nats, vagueness) if math.isfinite(nats) else (0.0, math.inf)


def _light(measured: _Measured, weight: int) -> _Measured:
    return replace(measured, count=min(measured.count, weight))


def _is_finite(moments: Moments) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in moments.tensors().values())
