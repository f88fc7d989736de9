"""From a batch of frames to their verdicts: encode, score, adapt, watch. One thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from agent.adapt.budget import Budget
from agent.adapt.domains import Assignment, DomainMemory
from agent.adapt.fit import Fit
from agent.adapt.guard import Guard, Reason
from agent.adapt.strategy import Observation, Strategy, ZeroShot, normalised_entropy
from agent.adapt.style import style
from agent.drift.monitor import DriftMonitor
from agent.drift.reading import publish
from agent.drift.seen import Seen
from agent.encode import Encoder
from agent.finds.find import Find
from agent.finds.keeper import Keeper
from agent.metrics import Metrics
from agent.score.confidence import Confidence
from agent.score.judge import Judge, Judgement
from agent.types import Frame, Scored, Verdict

#: Labels in a verdict.
TOP = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clocks:
    """`monotonic` measures how long things take, `wall` how old a frame is; both in seconds."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]


class Recognizer:
    """The model, what adapts it, and what it is watched by."""

    def __init__(
        self,
        encoder: Encoder,
        zero_shot: ZeroShot,
        strategy: Strategy,
        *,
        domains: DomainMemory,
        judge: Judge,
        confidence: Confidence,
        drift: DriftMonitor,
        guard: Guard,
        fit: Fit,
        budget: Budget,
        audit: float,
        metrics: Metrics,
        clocks: Clocks,
        keeper: Keeper | None = None,
    ) -> None:
        """`audit` is the share of aligned batches that are encoded by the source model as well.

        `keeper` keeps unknown frames for people to look at; None keeps none.
        """
        self._encoder = encoder
        self._zero_shot = zero_shot
        self._strategy = strategy
        self._domains = domains
        self._judge = judge
        self._confidence = confidence
        self._drift = drift
        self._guard = guard
        self._fit = fit
        self._budget = budget
        self._audit = audit
        self._audit_due = 0.0
        self._encodings: dict[int, int] = {}
        self._metrics = metrics
        self._clocks = clocks
        self._keeper = keeper

    @torch.no_grad()
    def recognize(self, frames: Sequence[Frame]) -> list[Verdict]:
        """A verdict for each frame, in order."""
        if not frames:
            return []
        stages: dict[str, float] = {}
        cameras = tuple(frame.camera for frame in frames)
        start = self._clocks.monotonic()
        with self._stage("prepare", stages):
            pixels_BCHW = self._encoder.to_device([frame.pixels for frame in frames])
            styles_BS = style(pixels_BCHW)
            assigned = self._domains.assign(cameras, styles_BS)
            self._retire()
        domains = [each.domain for each in assigned]
        with self._stage("encode", stages):
            features_BD = self._strategy.encode(pixels_BCHW, domains)
            finite_B = torch.isfinite(features_BD).all(dim=-1)
            features_BD = torch.nan_to_num(features_BD)
        with self._stage("score", stages):
            frozen_BK = self._zero_shot.logits(features_BD)
            judged = self._judge.judge(domains, features_BD, frozen_BK, finite_B)
            sound = finite_B.nonzero().flatten().tolist()
        with self._stage("adapt", stages):
            admitted_B = ~judged.unknown_B.to(features_BD.device)
            seen = Observation(pixels_BCHW, features_BD, frozen_BK, domains, admitted_B)
            adapted_BK = self._strategy.step(seen)
            probabilities_BK = torch.nan_to_num(adapted_BK).softmax(dim=-1)
        aligned = [row for row, d in enumerate(domains) if self._strategy.encoding(d) != 0]
        answered = sorted(set(aligned) & set(sound))
        self._fit.observe(
            [cameras[row] for row in answered],
            [domains[row] for row in answered],
            probabilities_BK[answered],
        )
        source_BK, audited = self._audited(
            pixels_BCHW, frozen_BK, cameras, domains, aligned, stages
        )
        with self._stage("watch", stages):
            both = [row for row in answered if audited[row]]
            ruined = self._ruined(cameras, domains, both, probabilities_BK, source_BK)
            probabilities_BK[ruined] = source_BK[ruined].softmax(dim=-1)
            zero_shot_BK = frozen_BK.softmax(dim=-1)
            fair = sorted(set(range(len(frames))) - set(ruined))
            self._guard.observe(
                [domains[row] for row in fair], probabilities_BK[fair], zero_shot_BK[fair]
            )
            confidence = self._confidence.observe(domains, probabilities_BK, admitted_B.tolist())
            self._watch(frames, assigned, judged, probabilities_BK)
            self._watch_scores(domains, judged, confidence)
            self._protect(dict(zip(domains, judged.thresholds_B.tolist(), strict=True)))
        with self._stage("drift", stages):
            readings = self._drift.observe(
                [cameras[row] for row in sound],
                Seen(features_BD, zero_shot_BK, probabilities_BK, styles_BS, judged.energies_B).of(
                    sound
                ),
            )
            publish(readings, self._metrics)
        self._budget.earn(self._clocks.monotonic() - start)

        verdicts = self._verdicts(
            frames, assigned, judged, confidence, probabilities_BK, source_BK, audited, stages
        )
        self._offer(frames, verdicts, features_BD, finite_B)
        return verdicts

    def learn(self) -> None:
        """One unit of adaptation, if the budget allows one; and of keeping unknown frames."""
        if self._keeper is not None:
            self._keeper.settle()
        if not self._budget.allows:
            return
        with self._budget.spending():
            outcome = self._strategy.learn(thrifty=not self._budget.is_ample)
        if outcome is not None:
            self._metrics.adapter_updates.labels(outcome).inc()
        self._metrics.adapter_budget_used.set(self._budget.used)

    def _verdicts(
        self,
        frames: Sequence[Frame],
        assigned: Sequence[Assignment],
        judged: Judgement,
        confidence: Sequence[float],
        probabilities_BK: Tensor,
        source_BK: Tensor,
        audited: Sequence[bool],
        stages: dict[str, float],
    ) -> list[Verdict]:
        now = self._clocks.wall()
        top = probabilities_BK.topk(min(TOP, probabilities_BK.shape[-1]), dim=-1)
        top_labels, top_probabilities = top.indices.tolist(), top.values.tolist()
        frozen = source_BK.softmax(dim=-1).max(dim=-1)
        frozen_labels, frozen_probabilities = frozen.indices.tolist(), frozen.values.tolist()
        energies, novelty = judged.energies_B.tolist(), judged.novelty_B.tolist()
        thresholds, unknown = judged.thresholds_B.tolist(), judged.unknown_B.tolist()
        labels = self._zero_shot.labels
        return [
            Verdict(
                frame=frame.record.id,
                subject=frame.record.subject,
                camera=frame.camera,
                captured_at=frame.captured_at,
                top=tuple(
                    Scored(labels[k], p)
                    for k, p in zip(top_labels[row], top_probabilities[row], strict=True)
                ),
                frozen=Scored(labels[frozen_labels[row]], frozen_probabilities[row]),
                frozen_encoder="source" if audited[row] else "aligned",
                confidence=confidence[row],
                energy=energies[row],
                novelty=novelty[row],
                threshold=thresholds[row],
                ood=unknown[row],
                domain=where.domain,
                shift=where.shift,
                strategy=self._strategy.name,
                version=self._strategy.version(where.domain),
                model=self._encoder.name,
                age_s=max(0.0, now - frame.captured_at),
                stage_s=dict(stages),
            )
            for row, (frame, where) in enumerate(zip(frames, assigned, strict=True))
        ]

    def _offer(
        self,
        frames: Sequence[Frame],
        verdicts: Sequence[Verdict],
        features_BD: Tensor,
        finite_B: Tensor,
    ) -> None:
        flagged = [row for row, verdict in enumerate(verdicts) if verdict.ood]
        if self._keeper is None or not flagged:
            return
        # Zero stands for a feature that is not finite: there is nothing to compare it by.
        embeddings = (features_BD[flagged] * finite_B[flagged, None]).float().cpu().numpy()
        self._keeper.offer(
            [
                Find.of(frames[row], verdicts[row], embedding_D)
                for row, embedding_D in zip(flagged, embeddings, strict=True)
            ]
        )

    def _audited(
        self,
        pixels_BCHW: Tensor,
        frozen_BK: Tensor,
        cameras: Sequence[str],
        domains: Sequence[int],
        aligned: Sequence[int],
        stages: dict[str, float],
    ) -> tuple[Tensor, list[bool]]:
        """Zero-shot logits by the source encoder where that is known; and where it is.

        `aligned` are the rows that were encoded otherwise. All of them are audited at times, and
        always those of cameras that may be in a domain not theirs.
        """
        known = [True] * len(cameras)
        if not aligned:
            return frozen_BK, known
        self._audit_due += self._audit
        rows = [row for row in aligned if self._fit.is_suspect(cameras[row], domains[row])]
        if self._audit_due >= 1:
            self._audit_due -= 1
            rows = list(aligned)
        for row in set(aligned) - set(rows):
            known[row] = False
        if not rows:
            return frozen_BK, known
        with self._stage("audit", stages):
            source_BD = torch.nan_to_num(self._encoder.encode_image(pixels_BCHW[rows]))
            source_BK = frozen_BK.clone()
            source_BK[rows] = self._zero_shot.logits(source_BD)
        return source_BK, known

    def _ruined(
        self,
        cameras: Sequence[str],
        domains: Sequence[int],
        both: Sequence[int],
        probabilities_BK: Tensor,
        source_BK: Tensor,
    ) -> list[int]:
        """Rows that another domain's correction ruined; their cameras get domains of their own.

        `both` are the rows that were answered both ways.
        """
        if not both:
            return []
        found = self._fit.compare(
            [cameras[row] for row in both],
            [domains[row] for row in both],
            probabilities_BK[both],
            source_BK[both].softmax(dim=-1),
        )
        for camera, domain in found.items():
            if not self._domains.split(camera, domain):
                continue
            self._metrics.domain_splits.labels(self._metrics.camera_label(camera)).inc()
            _log.info(
                "the correction of domain %d does not fit the camera's frames: it gets a new one",
                domain,
                extra={"camera": camera},
            )
        return [row for row in both if found.get(cameras[row]) == domains[row]]

    def _retire(self) -> None:
        """Forget what is void.

        That is all of a domain whose id is used anew, and the answers of one that is encoded
        otherwise than before.
        """
        for opening in self._domains.opened():
            domain = opening.domain
            if self._strategy.version(domain) > 0:
                self._metrics.adapter_resets.labels(Reason.EVICTED).inc()
            self._strategy.begin(domain, opening.kin)
            self._guard.forget(domain)
            self._forget(domain)
        for domain in self._domains.domains:
            encoding = self._strategy.encoding(domain)
            if encoding != self._encodings.get(domain, 0):
                self._forget(domain)
            self._encodings[domain] = encoding

    def _forget(self, domain: int) -> None:
        self._judge.thresholds.forget(domain)
        self._confidence.forget(domain)
        self._fit.forget(domain)

    def _protect(self, thresholds: Mapping[int, float]) -> None:
        """`thresholds` are those of the domains that were seen."""
        for domain, threshold in thresholds.items():
            reason = self._guard.verdict(domain, self._strategy.distance(domain))
            if reason is not None:
                _log.warning(
                    "domain %d is reset to the source: %s", domain, reason, extra={"domain": domain}
                )
                self._strategy.reset(domain)
                self._guard.forget(domain)
                self._metrics.adapter_resets.labels(reason).inc()
            self._metrics.adapter_distance.labels(domain).set(self._strategy.distance(domain))
            self._metrics.adapter_agreement.labels(domain).set(self._guard.agreement(domain))
            height = self._judge.thresholds.standard(threshold)
            self._metrics.novelty_threshold.labels(domain).set(height)
            self._metrics.expected_accuracy.labels(domain).set(self._confidence.usual(domain))

    def _watch(
        self,
        frames: Sequence[Frame],
        assigned: Sequence[Assignment],
        judged: Judgement,
        probabilities_BK: Tensor,
    ) -> None:
        metrics = self._metrics
        entropies = normalised_entropy(probabilities_BK).tolist()
        for frame, where, value, unknown, spread in zip(
            frames,
            assigned,
            judged.energies_B.tolist(),
            judged.unknown_B.tolist(),
            entropies,
            strict=True,
        ):
            camera = metrics.camera_label(frame.camera)
            metrics.energy.labels(where.domain).observe(value)
            metrics.entropy.labels(where.domain).observe(spread)
            # Also where it is none: the series must exist for its first event to be seen.
            metrics.ood_flagged.labels(camera).inc(unknown)
            metrics.domain_switches.labels(camera).inc(where.switched)
            if where.switched:
                _log.info(
                    "the camera is now in domain %d",
                    where.domain,
                    extra={"camera": frame.camera, "frame": str(frame.record.id)},
                )
            metrics.domain_active.labels(camera).set(where.domain)

    def _watch_scores(
        self, domains: Sequence[int], judged: Judgement, confidence: Sequence[float]
    ) -> None:
        novelty = judged.novelty_B.tolist()
        for domain, value, right in zip(domains, novelty, confidence, strict=True):
            self._metrics.novelty.labels(domain).observe(self._judge.thresholds.standard(value))
            self._metrics.confidence.labels(domain).observe(right)

    @contextmanager
    def _stage(self, name: str, stages: dict[str, float]) -> Iterator[None]:
        start = self._clocks.monotonic()
        yield
        elapsed = self._clocks.monotonic() - start
        stages[name] = elapsed
        self._metrics.stage.labels(name).observe(elapsed)
