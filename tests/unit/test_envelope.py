import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.envelope import Envelope, unwrap
from agent.errors import InvalidFrame, OversizedFrame, UnreadableEnvelope
from agent.types import FrameId, Record

NOON = 1748779200.0  # 2025-06-01T12:00:00Z


def record(value=b"image", key=b"gate-3", headers=(), timestamp=5.0):
    return Record(FrameId("frames", 0, 7), key, value, tuple(headers), timestamp)


def envelope(**fields):
    return json.dumps({"image": base64.b64encode(b"image").decode(), **fields}).encode()


def test_a_plain_record_is_named_by_its_key_and_stamped_by_the_broker():
    assert unwrap(record(), 100) == Envelope("gate-3", 5.0, b"image")


@pytest.mark.parametrize(("stamped", "kept"), [(-0.001, 0.0), (1.7e12, 253402300799.0)])
def test_a_record_time_that_no_clock_shows_does_not_cost_the_frame(stamped, kept):
    assert unwrap(record(timestamp=stamped), 100).captured_at == kept


def test_cloudevents_headers_win_over_key_and_timestamp():
    headers = [
        ("ce_id", b"1"),
        ("ce_source", b"dock"),
        ("ce_time", b"2025-06-01T14:00:00.000000001+02:00"),
        ("content-type", b"image/jpeg"),
    ]
    assert unwrap(record(headers=headers), 100) == Envelope("dock", NOON, b"image")


@pytest.mark.parametrize("when", ["2025-06-01T12:00:00Z", NOON, int(NOON)])
def test_json_carries_camera_time_and_image(when):
    value = envelope(camera="roof", timestamp=when)
    assert unwrap(record(value), 100) == Envelope("roof", NOON, b"image")


def test_json_falls_back_to_the_record():
    assert unwrap(record(envelope()), 100) == Envelope("gate-3", 5.0, b"image")


def test_json_is_told_by_its_content_type_too():
    headers = [("Content-Type", b"application/json; charset=utf-8")]
    assert unwrap(record(b" " + envelope(), headers=headers), 100).image == b"image"


@pytest.mark.parametrize("key", [None, b""])
def test_a_record_without_a_camera_is_unknown(key):
    assert unwrap(record(key=key), 100).camera == "unknown"


@pytest.mark.parametrize(
    ("value", "key", "headers"),
    [
        (None, b"a", ()),
        (b"", b"a", ()),
        (b"image", b"\xff", ()),
        (b"image", b"a" * 257, ()),
        (b"image", b"a", [("ce_source", b"\xff")]),
        (b"image", b"a", [("ce_time", b"yesterday")]),
        (b"image", b"a", [("ce_time", b"2025-06-01T12:00:00")]),
        (b"{", b"a", ()),
        (b"{" + b'"a":[' * 60_000, b"a", ()),
        (b"[1]", b"a", [("content-type", b"application/json")]),
        (b'{"image": 7}', b"a", ()),
        (b'{"image": "a*b="}', b"a", ()),
        (b'{"camera": "x"}', b"a", ()),
        (envelope(camera=7), b"a", ()),
        (envelope(camera="\ud800"), b"a", ()),
        (envelope(timestamp=True), b"a", ()),
        (envelope(timestamp=float("nan")), b"a", ()),
        (envelope(timestamp=10**400), b"a", ()),
        (envelope(timestamp=-1), b"a", ()),
        (envelope(timestamp=None), b"a", ()),
    ],
)
def test_malformed_records_are_unreadable(value, key, headers):
    with pytest.raises(UnreadableEnvelope):
        unwrap(record(value, key, headers), 1_000_000)


def test_the_limit_counts_the_bytes_of_the_image():
    assert unwrap(record(b"12345"), 5).image == b"12345"
    assert unwrap(record(envelope()), 5).image == b"image"
    for value in (b"123456", envelope(image=base64.b64encode(b"123456").decode())):
        with pytest.raises(OversizedFrame):
            unwrap(record(value), 5)


def test_a_huge_json_document_is_refused_unparsed():
    with pytest.raises(OversizedFrame):
        unwrap(record(b"{" + b" " * 100_000), 5)


headers = st.lists(
    st.tuples(
        st.sampled_from(["ce_source", "ce_time", "content-type", "x"]),
        st.none() | st.binary(max_size=30) | st.just(b"application/json"),
    ),
    max_size=4,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
documents = st.dictionaries(st.sampled_from(["camera", "timestamp", "image"]), json_values)


@settings(deadline=None)
@given(
    value=st.none() | st.binary() | documents.map(lambda fields: json.dumps(fields).encode()),
    key=st.none() | st.binary(),
    headers=headers,
)
def test_nothing_but_invalid_frames_comes_out(value, key, headers):
    try:
        opened = unwrap(record(value, key, headers), 1000)
    except InvalidFrame as error:
        assert len(str(error)) < 300
    else:
        assert len(opened.camera.encode()) <= 256
