import json
import math
from dataclasses import replace

from agent.errors import CorruptImage
from agent.sinks import cloudevents
from agent.sinks.dead_letter import Letter, describe
from agent.types import FrameId, Record, Rejected, Scored, Verdict

VERDICT = Verdict(
    frame=FrameId("frames", 3, 1234),
    subject="north/7.jpg",
    camera="gate 3/ä",
    captured_at=1748779200.25,
    top=tuple(Scored(f"label {n}", 1 / 3) for n in range(5)),
    frozen=Scored("dog", 0.5),
    frozen_encoder="source",
    confidence=0.5,
    energy=-12.123456789,
    novelty=-12.0,
    threshold=-9.5,
    ood=False,
    domain=2,
    shift=1.25,
    strategy="continual",
    version=17,
    model="offline",
    age_s=0.123,
    stage_s={"decode": 0.01, "encode": 0.1},
)


def decoded(verdict):
    return json.loads(cloudevents.encode(verdict))


def rejected(key=b"cam", value=b"bytes", headers=(("a", b"1"), ("b", None))):
    record = Record(FrameId("frames", 3, 7), key, value, headers, 5.0)
    return Rejected(record, CorruptImage("gave up"))


def test_a_verdict_has_the_attributes_of_a_cloudevent():
    event = decoded(VERDICT)
    assert event.pop("data")
    assert event == {
        "specversion": "1.0",
        "id": "frames/3/1234",
        "source": "/cameras/gate%203%2F%C3%A4",
        "subject": "north/7.jpg",
        "type": "tta.verdict.v1",
        "time": "2025-06-01T12:00:00.250Z",
        "datacontenttype": "application/json",
    }


def test_the_data_holds_every_field_of_the_verdict():
    data = decoded(VERDICT)["data"]
    assert {*data, "subject"} == set(Verdict.__dataclass_fields__)
    assert data["frame"] == {"topic": "frames", "partition": 3, "offset": 1234}
    assert data["top"][0] == {"label": "label 0", "probability": 0.333333}
    assert (data["energy"], data["camera"]) == (-12.123457, "gate 3/ä")


def test_numbers_that_are_not_finite_become_null():
    data = decoded(replace(VERDICT, energy=math.nan, threshold=math.inf))["data"]
    assert data["energy"] is data["threshold"] is None


def test_a_verdict_stays_near_a_kilobyte():
    assert len(cloudevents.encode(VERDICT)) < 1200


def test_a_letter_keeps_the_record_and_adds_the_error():
    letter = Letter.of(rejected(), now=0.5)
    assert (letter.key, letter.value) == (b"cam", b"bytes")
    assert letter.headers == (
        ("a", b"1"),
        ("b", b""),
        ("tta.error.reason", b"corrupt"),
        ("tta.error.message", b"gave up"),
        ("tta.error.topic", b"frames"),
        ("tta.error.partition", b"3"),
        ("tta.error.offset", b"7"),
        ("tta.error.time", b"1970-01-01T00:00:00.500Z"),
    )


def test_a_letter_can_always_be_sent():
    assert Letter.of(rejected(key=None, value=None), 0).value == b""
    assert Letter.of(rejected(value=None), 0).value is None


def test_a_letter_without_its_value_says_so():
    letter = Letter.of(rejected(), 0).without_value()
    assert letter.value == b""
    assert ("tta.error.value", b"omitted") in letter.headers


def test_a_description_has_no_bytes_of_the_image():
    assert b"bytes" not in json.dumps(describe(rejected(), 0)).encode()
