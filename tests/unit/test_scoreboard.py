import math
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from agent.bench.live import LiveView, sparkline, summary
from agent.bench.schedule import LabelledFrame, Phase
from agent.bench.scoreboard import WINDOW, Said, Scoreboard, by_phase, said_in
from agent.errors import AgentError
from agent.sinks.cloudevents import to_event
from agent.types import FrameId, Scored, Verdict

VERDICT = {
    "frame": {"topic": "frames", "partition": 1, "offset": 7},
    "top": [{"label": "cat", "probability": 0.9}, {"label": "dog", "probability": 0.1}],
    "frozen": {"label": "dog", "probability": 0.6},
    "energy": -9.5,
    "threshold": None,
    "ood": False,
    "domain": 2,
    "shift": 3.5,
    "age_s": 0.25,
}
SAID = Said(FrameId("frames", 0, 0), "cat", "dog", -9.0, -7.0, False, 0, 0.5, 0.1)


def frame(index, phase="clear", label="cat", known=True):
    return LabelledFrame(index, phase, label, known, b"", "camera-north")


def at(offset, **changes):
    return replace(SAID, frame=FrameId("frames", 0, offset), **changes)


def board(*pairs, clock=lambda: 0.0):
    scoreboard = Scoreboard(clock)
    for sent, heard in pairs:
        scoreboard.sent(heard.frame, sent)
        scoreboard.heard(heard)
    return scoreboard


@pytest.fixture
def mixed():
    """Fog: two known frames, adapted right once, frozen never. Clear: an unknown and a known."""
    return board(
        (frame(0, "fog"), at(0)),
        (frame(1, "fog", "dog"), at(1, adapted="fox", frozen="cat", ood=True)),
        (frame(2, "clear", "coin", known=False), at(2, ood=True, domain=1)),
        (frame(3, "clear"), at(3, frozen="cat", domain=1)),
    )


def test_a_verdict_event_is_read():
    said = said_in(VERDICT)
    assert said.frame == FrameId("frames", 1, 7)
    assert (said.adapted, said.frozen, said.domain) == ("cat", "dog", 2)
    assert math.isnan(said.threshold)


def test_what_the_agent_publishes_is_read():
    frame_id = FrameId("frames", 1, 7)
    verdict = Verdict(
        frame=frame_id,
        subject=None,
        camera="camera-north",
        captured_at=0.0,
        top=(Scored("cat", 0.9),),
        frozen=Scored("dog", 0.6),
        frozen_encoder="source",
        energy=-9.5,
        novelty=-9.5,
        threshold=-7.0,
        ood=True,
        domain=2,
        shift=3.5,
        strategy="continual",
        version=4,
        model="offline",
        age_s=0.25,
        stage_s={},
    )
    expected = Said(frame_id, "cat", "dog", -9.5, -7.0, True, 2, 3.5, 0.25)
    assert said_in(to_event(verdict)["data"]) == expected


@pytest.mark.parametrize("field", ["frame", "top", "frozen", "energy"])
def test_what_is_no_verdict_is_refused(field):
    with pytest.raises(AgentError, match="not a verdict"):
        said_in({key: value for key, value in VERDICT.items() if key != field})


def test_a_verdict_may_come_before_its_truth_is_known():
    scoreboard = Scoreboard()
    scoreboard.heard(at(4))
    assert scoreboard.scored == 0
    scoreboard.sent(FrameId("frames", 0, 4), frame(0))
    assert [o.adapted_right for o in scoreboard.outcomes()] == [True]


def test_a_repeated_verdict_counts_once():
    scoreboard = board((frame(0), at(0)))
    scoreboard.heard(at(0, adapted="dog"))
    assert [o.said.adapted for o in scoreboard.outcomes()] == ["cat"]


def test_a_verdict_of_another_stream_is_not_scored():
    scoreboard = board((frame(0), at(0)))
    scoreboard.heard(replace(SAID, frame=FrameId("others", 0, 0)))
    assert scoreboard.scored == 1


def test_outcomes_stand_in_the_order_of_sending():
    scoreboard = board((frame(1), at(1)), (frame(0), at(0)))
    assert [o.index for o in scoreboard.outcomes()] == [0, 1]


def test_phases_are_scored_apart(mixed):
    fog, clear = by_phase(mixed.outcomes())
    assert (fog.name, fog.frames, fog.adapted, fog.frozen) == ("fog", 2, 0.5, 0.0)
    assert (clear.name, clear.adapted, clear.frozen) == ("clear", 1.0, 1.0)
    assert (fog.domains, clear.domains) == ((0,), (1,))


def test_unknown_frames_count_for_recall_and_known_ones_for_false_alarms(mixed):
    fog, clear = by_phase(mixed.outcomes())
    assert (clear.flagged, clear.recall, clear.false_alarms) == (0.5, 1.0, 0.0)
    assert fog.false_alarms == 0.5
    assert math.isnan(fog.recall)


def test_of_late_forgets_what_is_older_than_the_window():
    wrong_first = [(frame(0, label="dog"), at(0))]
    right_since = [(frame(i), at(i)) for i in range(1, WINDOW + 1)]
    now = board(*wrong_first, *right_since).now()
    assert (now.late.frames, now.late.adapted) == (WINDOW, 1.0)
    assert len(now.history) == now.scored == WINDOW + 1


def test_before_the_first_verdict_there_is_nothing_to_show():
    assert Scoreboard().now() is None


def test_the_rate_is_of_the_last_seconds():
    times = iter([0.0, 100.0, 101.0, 102.0])
    now = board(*((frame(i), at(i)) for i in range(3)), clock=lambda: next(times)).now()
    assert now.frames_per_s == pytest.approx(1.0)


def test_ages_are_quantiles():
    now = board(*((frame(i), at(i, age_s=i / 10)) for i in range(11))).now()
    assert now.age_p50_s == pytest.approx(0.5)
    assert now.age_p99_s == pytest.approx(0.99)


def shown(scoreboard, times, **console):
    out = StringIO()
    view = LiveView(
        Console(file=out, width=100, **console),
        [Phase("clear", None, 1, 4, 0.0)],
        "offline",
        "continual",
        clock=iter(times).__next__,
    )
    with view:
        for _ in range(2):
            view.show(scoreboard.now())
    return out.getvalue()


def test_without_a_terminal_lines_are_few_and_plain(mixed):
    often = shown(mixed, [10.0, 10.0, 11.0])
    seldom = shown(mixed, [10.0, 10.0, 20.0, 20.0])
    assert len(often.splitlines()) == 1
    assert len(seldom.splitlines()) == 2
    assert "frozen 33.3%  adapted 66.7%" in often
    assert "\x1b" not in often


def test_on_a_terminal_the_state_is_drawn(mixed):
    screen = shown(mixed, [], force_terminal=True, color_system=None)
    assert "adapted" in screen
    assert "66.7%" in screen
    assert "4/4 frames" in screen


def test_the_summary_has_a_row_for_each_phase_and_the_totals(mixed):
    out = StringIO()
    Console(file=out, width=80).print(summary(mixed.outcomes()))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    rows = {first: rest for first, *rest in lines}
    assert rows["fog"][:4] == ["2", "0.0%", "50.0%", "+50.0"]
    assert rows["all"][:4] == ["4", "33.3%", "66.7%", "+33.3"]


@pytest.mark.parametrize(
    ("shares", "drawn"),
    [([], ""), ([0.0, 1.0], "▁█"), ([0.0, 0.0, 1.0, 1.0, 0.5, 0.5], "▁█▅"), ([math.nan, 1.0], "█")],
)
def test_a_sparkline_is_at_most_as_wide_as_asked(shares, drawn):
    assert sparkline(shares, 3) == drawn
