import math

import pytest
import torch

from agent.adapt.budget import BURST_S, Budget
from agent.adapt.continual import Continual
from agent.adapt.domains import Assignment, DomainConfig, DomainMemory, Opening
from agent.adapt.fit import Fit, FitConfig
from agent.adapt.frozen import Frozen
from agent.adapt.guard import Guard, GuardConfig
from agent.adapt.strategy import Outcome
from agent.adapt.style import StyleReference, style
from agent.drift.monitor import DriftMonitor, DriftPolicy
from agent.drift.statistics import DriftReference
from agent.metrics import Metrics
from agent.recognize import Clocks, Recognizer
from agent.score.confidence import Confidence, ConfidenceModel
from agent.score.judge import Judge
from agent.score.novelty import Normal
from agent.score.ood import ablated_energy as energy
from agent.score.threshold import Thresholds
from agent.testing import LABELS, FakeClock, pictures, record, tiny_encoder, tiny_zero_shot
from agent.types import Frame

ENCODER = tiny_encoder()
ZERO_SHOT = tiny_zero_shot(ENCODER)


class Known:
    """Domains that are told by the camera's name."""

    def __init__(self, opened=()):
        self.fresh = list(opened)
        self.split_off = []

    def split(self, camera, domain):
        self.split_off.append((camera, domain))
        return True

    def assign(self, cameras, styles):
        return [Assignment(int(camera), 0.5) for camera in cameras]

    @property
    def domains(self):
        return range(4)

    def opened(self):
        fresh, self.fresh = self.fresh, []
        return fresh


class Spy(Frozen):
    """Encodes otherwise in all domains but the source; remembers what it was shown."""

    def __init__(self, encoder, spoil=lambda features: -features, away=0.0):
        super().__init__(encoder)
        self.spoil, self.away = spoil, away
        self.seen, self.resets, self.begun, self.thrift = [], [], [], []

    def encode(self, pixels, domains):
        features = super().encode(pixels, domains)
        spoilt = self.spoil(features)
        return torch.where(torch.tensor(domains)[:, None] > 0, spoilt, features)

    def step(self, seen):
        self.seen.append(seen)
        return super().step(seen)

    def learn(self, thrifty=False):
        self.thrift.append(thrifty)
        return Outcome.STEPPED

    def encoding(self, domain):
        return int(domain > 0)

    def version(self, domain):
        return 7 if domain else 0

    def distance(self, domain):
        return 0.0 if domain in self.resets else self.away

    def begin(self, domain, kin):
        self.begun.append((domain, kin))

    def reset(self, domain=None):
        self.resets.append(domain)


def drift(reference):
    return DriftMonitor(
        DriftPolicy(window=32), reference, ZERO_SHOT.text_KD, torch.Generator().manual_seed(0)
    )


def judge(thresholds, sign=1):
    """Tells the unknown by their energy, or by its opposite."""
    return Judge(lambda features, logits: sign * energy(logits), thresholds)


def build(strategy=None, clock=None, **parts):
    clock = clock or FakeClock(1000.0)
    defaults = {
        "domains": Known(),
        "judge": judge(Thresholds(0.05, Normal.of(torch.tensor([math.inf])))),
        "confidence": Confidence(ConfidenceModel()),
        "drift": drift(None),
        "guard": Guard(GuardConfig(frames=8)),
        "fit": Fit(FitConfig(frames=8)),
        "budget": Budget(0.1, clock),
        "audit": 0.0,
        "metrics": Metrics(10),
        "clocks": Clocks(clock, clock),
    }
    return Recognizer(ENCODER, ZERO_SHOT, strategy or Frozen(ENCODER), **defaults | parts)


def frames(n, seed=0, camera="0"):
    pixels = (pictures(n, seed).permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
    return [Frame(record(b"", i, camera), camera, 990.0, each) for i, each in enumerate(pixels)]


def source_logits(some):
    return ZERO_SHOT.logits(ENCODER.encode_image(ENCODER.to_device([f.pixels for f in some])))


def sample(recognizer, name, **labels):
    return recognizer._metrics.registry.get_sample_value(name, labels)


def test_a_verdict_says_what_the_model_said():
    [some] = [frames(3)]
    verdicts = build().recognize(some)
    probabilities = source_logits(some).softmax(-1)
    for verdict, frame, expected in zip(verdicts, some, probabilities, strict=True):
        assert verdict.frame == frame.record.id
        assert dict(verdict.top) == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)))
        assert verdict.top == tuple(sorted(verdict.top, key=lambda s: -s.probability))
        assert (verdict.model, verdict.strategy, verdict.version) == (
            "tiny-batch_norm",
            "frozen",
            0,
        )
        assert (verdict.domain, verdict.shift, verdict.age_s) == (0, 0.5, 10.0)


def test_novelty_and_threshold_decide_what_is_unknown():
    some = frames(8)
    score = energy(source_logits(some)).neg()
    normal = Normal.of(score.median()[None])
    verdicts = build(judge=judge(Thresholds(0.05, normal), sign=-1)).recognize(some)
    assert [v.novelty for v in verdicts] == pytest.approx(score.tolist(), abs=1e-4)
    assert [v.energy for v in verdicts] == pytest.approx((-score).tolist(), abs=1e-4)
    assert [v.ood for v in verdicts] == [v.novelty > v.threshold for v in verdicts]
    assert {v.ood for v in verdicts} == {True, False}


def test_no_frames_no_verdicts():
    assert build().recognize([]) == []


def test_a_frame_from_the_future_has_no_age():
    assert build(clock=FakeClock(5.0)).recognize(frames(1))[0].age_s == 0.0


def test_frozen_is_the_zero_shot_prompt():
    some = frames(16)
    verdicts = build().recognize(some)
    best = source_logits(some).argmax(-1).tolist()
    assert [v.frozen.label for v in verdicts] == [LABELS[k] for k in best]
    assert all(v.top[0] == v.frozen for v in verdicts)
    assert {v.frozen_encoder for v in verdicts} == {"source"}


def test_some_aligned_batches_are_encoded_by_the_source_model_too():
    recognizer = build(Spy(ENCODER), audit=0.5)
    batches = [recognizer.recognize(frames(2, camera="1")) for _ in range(4)]
    told = [verdicts[0].frozen_encoder for verdicts in batches]
    assert told == ["aligned", "source", "aligned", "source"]


def test_an_audited_frame_has_the_label_of_the_source_model():
    some = [*frames(4, camera="1"), *frames(2, seed=1)]
    best = [LABELS[k] for k in source_logits(some).argmax(-1).tolist()]
    aligned = build(Spy(ENCODER)).recognize(some)
    audited = build(Spy(ENCODER), audit=1.0).recognize(some)
    assert [v.frozen.label for v in audited] == best
    assert {v.frozen_encoder for v in audited} == {"source"}
    assert [v.frozen_encoder for v in aligned] == ["aligned"] * 4 + ["source"] * 2
    assert [v.frozen.label for v in aligned[:4]] != best[:4]
    assert [v.frozen.label for v in aligned[4:]] == best[4:]


def test_a_camera_whose_correction_says_less_than_none_gets_a_domain_of_its_own():
    domains = Known()
    mute = Spy(ENCODER, spoil=lambda features: 0 * features)
    recognizer = build(mute, domains=domains, audit=1.0)
    some = frames(8, camera="1")
    verdicts = recognizer.recognize(some)
    best = [LABELS[k] for k in source_logits(some).argmax(-1).tolist()]
    assert [verdict.top[0].label for verdict in verdicts] == best  # at once
    assert domains.split_off == [("1", 1)]
    assert sample(recognizer, "tta_domain_splits_total", camera="1") == 1.0


def test_a_suspect_is_audited_and_others_are_not():
    recognizer = build(Spy(ENCODER))
    some = [*frames(2, camera="1"), *frames(2, seed=1, camera="2")]
    recognizer._fit.is_suspect = lambda camera, domain: camera == "2"
    told = [verdict.frozen_encoder for verdict in recognizer.recognize(some)]
    assert told == ["aligned", "aligned", "source", "source"]


def test_unknown_frames_are_not_admitted():
    spy = Spy(ENCODER)
    reference = Normal.of(energy(source_logits(frames(8))).median()[None])
    verdicts = build(spy, judge=judge(Thresholds(0.05, reference))).recognize(frames(8))
    assert spy.seen[0].admitted_B.tolist() == [not v.ood for v in verdicts]


def test_features_that_are_not_finite_are_unknown_and_teach_nothing():
    spy = Spy(ENCODER, spoil=lambda features: features * math.nan)
    thresholds = Thresholds(0.05, Normal.of(torch.tensor([-20.0, math.inf])))
    recognizer = build(spy, judge=judge(thresholds))
    verdicts = recognizer.recognize([*frames(2), *frames(2, camera="1")])
    assert [v.ood for v in verdicts] == [False, False, True, True]
    assert spy.seen[0].admitted_B.tolist() == [True, True, False, False]
    assert all(math.isfinite(s.probability) for v in verdicts for s in (*v.top, v.frozen))
    assert thresholds.of(1) == thresholds.of(0)


def test_features_that_are_not_finite_do_not_set_the_first_threshold():
    spy = Spy(ENCODER, spoil=lambda features: features * math.nan)
    thresholds = Thresholds(0.05)
    build(spy, judge=judge(thresholds)).recognize(frames(64, camera="1"))
    assert thresholds.of(1) == math.inf


def test_a_domain_is_followed_in_metrics():
    recognizer = build(Spy(ENCODER))
    recognizer.recognize([*frames(3, camera="0"), *frames(2, camera="1")])
    assert sample(recognizer, "tta_energy_logits_count", domain="0") == 3
    assert sample(recognizer, "tta_energy_logits_count", domain="1") == 2
    assert sample(recognizer, "tta_domain_active", camera="1") == 1
    assert sample(recognizer, "tta_adapter_agreement_ratio", domain="1") == 1


def test_flags_are_counted_by_camera():
    thresholds = Thresholds(0.05, Normal.of(torch.tensor([-1e3])))
    recognizer = build(judge=judge(thresholds))
    recognizer.recognize(frames(5))
    assert sample(recognizer, "tta_ood_flagged_total", camera="0") == 5


def test_the_guard_takes_a_domain_back():
    spy = Spy(ENCODER, away=9.0)
    recognizer = build(spy)
    recognizer.recognize(frames(8, camera="1"))
    assert spy.resets == [1]
    assert sample(recognizer, "tta_adapter_resets_total", reason="distance") == 1
    assert sample(recognizer, "tta_adapter_distance", domain="1") == 0


def test_a_new_domain_inherits_from_its_kin_and_nothing_from_its_id():
    spy = Spy(ENCODER)
    thresholds = Thresholds(0.05, Normal.of(torch.tensor([-20.0])))
    thresholds.observe([1] * 50, torch.full((50,), 100.0))
    recognizer = build(spy, judge=judge(thresholds), domains=Known(opened=[Opening(1, 3)]))
    fresh = build(Spy(ENCODER), judge=judge(Thresholds(0.05, thresholds.normal)))
    expected = fresh.recognize(frames(1, camera="1"))[0].threshold
    assert recognizer.recognize(frames(1, camera="1"))[0].threshold == expected
    assert spy.begun == [(1, 3)]
    assert sample(recognizer, "tta_adapter_resets_total", reason="evicted") == 1


def test_learning_stops_when_the_budget_is_spent():
    recognizer = build(Spy(ENCODER), budget=Budget(0.0, FakeClock()))
    recognizer.learn()
    assert sample(recognizer, "tta_adapter_updates_total", outcome="stepped") == 0
    recognizer = build(Spy(ENCODER))
    recognizer.learn()
    assert sample(recognizer, "tta_adapter_updates_total", outcome="stepped") == 1


def test_what_can_wait_waits_when_the_purse_is_half_empty():
    clock = FakeClock()
    spy, budget = Spy(ENCODER), Budget(0.1, clock)
    recognizer = build(spy, budget=budget)
    recognizer.learn()
    with budget.spending():
        clock.advance(BURST_S / 2)
    recognizer.learn()
    assert spy.thrift == [False, True]


class Keeping:
    def __init__(self):
        self.offered, self.settled = [], 0

    def offer(self, finds):
        self.offered.append(finds)

    def settle(self):
        self.settled += 1


def test_flagged_frames_are_offered_with_their_features_and_no_others():
    some = frames(8)
    reference = Normal.of(energy(source_logits(some)).median()[None])
    keeper = Keeping()
    recognizer = build(judge=judge(Thresholds(0.05, reference)), keeper=keeper)
    flagged = [verdict for verdict in recognizer.recognize(some) if verdict.ood]
    [finds] = keeper.offered
    assert [find.verdict for find in finds] == flagged
    assert all(find.margin == find.verdict.novelty - find.verdict.threshold for find in finds)
    norms = [float((find.embedding_D**2).sum()) for find in finds]
    assert norms == pytest.approx([1.0] * len(finds))
    recognizer.learn()
    assert keeper.settled == 1


def test_nothing_is_offered_while_nothing_is_strange():
    keeper = Keeping()
    build(keeper=keeper).recognize(frames(4))
    assert keeper.offered == []


def test_a_feature_that_is_not_finite_is_offered_as_none():
    keeper = Keeping()
    spy = Spy(ENCODER, spoil=lambda features: features * math.nan)
    build(spy, keeper=keeper).recognize(frames(2, camera="1"))
    assert [find.embedding_D.any() or find.margin for find in keeper.offered[0]] == [0.0, 0.0]


def test_drift_is_read_against_normal_frames():
    normal = pictures(64, 5)
    features = ENCODER.encode_image(normal)
    logits = ZERO_SHOT.logits(features)
    reference = DriftReference(features, logits.softmax(-1), style(normal), energy(logits))
    torch.manual_seed(0)
    far_away = lambda f: torch.nn.functional.normalize(1 + torch.randn_like(f))  # noqa: E731
    elsewhere = Spy(ENCODER, spoil=far_away)
    recognizer = build(elsewhere, drift=drift(reference))
    for seed in range(5):
        recognizer.recognize(frames(32, seed, camera="1"))
    assert sample(recognizer, "tta_drift_events_total", camera="1", detector="frechet") == 1
    assert sample(recognizer, "tta_drift_threshold", detector="frechet") > 0
    assert sample(recognizer, "tta_drift_events_total", camera="1", detector="style") == 0
    assert sample(recognizer, "tta_site_drift_events_total", site="default", detector="style") == 0


def test_drift_needs_features():
    recognizer = build(Spy(ENCODER, spoil=lambda features: features * math.nan))
    recognizer.recognize(frames(8, camera="1"))
    assert sample(recognizer, "tta_drift_score", camera="1", detector="mmd") is None


def test_the_parts_work_together_from_normal_to_noise_and_back():
    reference = StyleReference.of(style(pictures(64, 3)))
    strategy = Continual(ENCODER, ZERO_SHOT)
    recognizer = build(strategy, domains=DomainMemory(DomainConfig(), reference))
    normal = frames(16)
    before = recognizer.recognize(normal)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        noise = torch.randint(0, 256, (16, 32, 32, 3), generator=generator, dtype=torch.uint8)
        odd = [Frame(record(b"", i, "0"), "0", 0.0, p.numpy()) for i, p in enumerate(noise)]
        noisy = recognizer.recognize(odd)
        recognizer.learn()
    again = [recognizer.recognize(normal) for _ in range(2)][-1]
    assert noisy[-1].domain == 1
    assert [v.domain for v in again] == [0] * 16
    assert [v.top for v in again] == [v.top for v in before]
    assert sample(recognizer, "tta_domain_switches_total", camera="0") == 2
