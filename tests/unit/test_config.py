from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Config, fingerprint
from agent.config_file import default_yaml, json_schema, load, load_text
from agent.errors import InvalidConfig

SECRET = "hunter2-hunter2"  # noqa: S105


def faults_of(text, environ=None):
    with pytest.raises(InvalidConfig) as caught:
        load_text(text, "a.yaml", environ or {})
    return caught.value.faults


def test_an_empty_file_is_the_default():
    assert load_text("", "a.yaml", {}) == Config()
    assert load_text("# nothing yet\n", "a.yaml", {}) == Config()


def test_a_section_without_keys_keeps_its_defaults():
    assert load_text("model:\n  # name: ViT-B-16\n", "a.yaml", {}) == Config()


def test_whole_numbers_are_numbers():
    config = load_text("batch: {max_wait_ms: 50}\nadapt: {budget: 1e-2}", "a.yaml", {})
    assert (config.batch.max_wait_ms, config.adapt.budget) == (50.0, 0.01)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("bach: {}", "a.yaml:1: bach: unknown key, did you mean batch?"),
        ("\nlabels: [a, b]", "a.yaml:2: labels: unknown key, did you mean model.labels?"),
        (
            "batch:\n  max_size: 0",
            "a.yaml:2: batch.max_size: expected a whole number > 0 and ≤ 4096, got 0",
        ),
        (
            "batch:\n  max_size: '8'",
            "a.yaml:2: batch.max_size: expected a whole number > 0 and ≤ 4096, got '8'",
        ),
        (
            "batch:\n  max_size: yes",
            "a.yaml:2: batch.max_size: expected a whole number > 0 and ≤ 4096, got yes",
        ),
        (
            "drift: {window: }",
            "a.yaml:1: drift.window: expected a whole number ≥ 32 and ≤ 8192, got nothing",
        ),
        (
            "log:\n\n  level: loud",
            "a.yaml:3: log.level: expected one of debug, info, warning, error, got 'loud'",
        ),
        (
            "model:\n  labels:\n  - cat\n  - no",
            "a.yaml:4: model.labels[1]: expected text, got no, "
            "which YAML reads as a boolean: put it in quotes",
        ),
        (
            "source: {camera: 12:30}",
            "a.yaml:1: source.camera: expected text, got 12:30, "
            "which YAML reads as a number: put it in quotes",
        ),
        (
            "model: {labels: [one]}",
            "a.yaml:1: model.labels: expected a list of ≥ 2, got a list of 1",
        ),
        ("batch: 7", "a.yaml:1: batch: expected a section with keys of its own, got a number"),
        ("log: {}\nlog: {}", "a.yaml:2: log: given twice, first on line 1"),
        (
            "!secret x",
            "a.yaml:1: expected sections such as 'model:', got a value with the tag !sec",
        ),
        ("- batch", "a.yaml:1: expected sections such as 'model:', got a list of 1"),
        ("log:\n  level: 'info", "a.yaml:2: not YAML: found unexpected end of stream"),
        ("log: !python/name:os.system x", "a.yaml:1: log: tags are not read: quote text"),
        ("log: &a {}\nood: *a", "a.yaml:1: anchors and aliases are not read: quote text"),
        ("[" * 5000, "a.yaml:1: nested deeper than 8 levels"),
    ],
)
def test_a_fault_says_where_and_what_was_expected(text, fault):
    assert faults_of(text)[0].startswith(fault)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nkafka: {security_protocol: SASL_SSL}", "a.yaml:2: kafka: security_protocol SASL_SSL"),
        ("kafka: {sasl_username: me}", "makes no use of sasl_username"),
        ("kafka: {security_protocol: SSL, ssl_key_file: k.pem}", "need each other"),
        ("kafka: {frames_topic: verdicts}", "frames_topic must differ"),
        ("kafka: {dead_letter_topic: verdicts}", "must differ"),
        ("source: {kind: video}", "kind video also needs path"),
        ("source: {path: frames}", "makes no use of path"),
        ("model: {name: ViT-B-16}", "random weights"),
        ("model: {pretrained: openai}", "remove pretrained"),
        ("model: {labels: [cat, cat]}", "label given twice: 'cat'"),
        ("model: {labels: [Sea gull, 'sea  gull']}", "label given twice: 'sea gull'"),
        ('model: {labels: [cat, "\\ud800"]}', "not Unicode text"),
        ("kafka: {bootstrap_servers: 'one:9092,'}", "expected host:port, got ''"),
        ("kafka: {bootstrap_servers: 'one:port'}", "expected host:port, got 'one:port'"),
        ("kafka: {frames_topic: ..}", "no topic of the name '..'"),
        ("kafka: {max_poll_interval_s: 10}", "at least session_timeout_s"),
        ("kafka: {session_timeout_s: 0.1}", "expected a number ≥ 1"),
        ("calibration: ''", "expected text"),
        ("model: {templates: [a photo]}", "exactly one {}"),
        ("novelty: {directory: a, topic: b}", "exclude each other"),
        ("novelty: {topic: verdicts}", "must differ from the topics of kafka"),
        ("novelty: {topic: ..}", "no topic of the name '..'"),
        ("novelty: {directory: ''}", "expected text"),
        ("novelty: {similarity: 0.5}", "expected a number > 0.5 and < 1"),
        ("novelty: {frames_per_hour: 0}", "≥ 1"),
        ("novelty: {max_bytes: 1000}", "≥ 1048576"),
        ("novelty: {max_age_days: 0}", "≥ 0.01"),
    ],
)
def test_contradictions_are_refused(text, words):
    (fault,) = faults_of(text)
    assert words in fault


def test_all_faults_are_told_at_once_in_the_order_of_the_file():
    text = "log: {level: loud}\nkafka: {nope: 1, nope: 2, sasl_username: a}\nmodel: {labels: [a]}"
    lines = [fault.split(":")[1] for fault in faults_of(text)]
    assert lines == ["1", "2", "2", "3"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidConfig, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml", {})


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InvalidConfig, match="UTF-8"):
        load(path, {})


def test_secrets_of_the_environment_win():
    text = "kafka: {security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: me,\n"
    text += "  sasl_password: from-the-file}"
    config = load_text(text, "a.yaml", {"TTA_KAFKA_SASL_PASSWORD": SECRET})
    assert config.kafka.sasl_password.get_secret_value() == SECRET
    assert SECRET not in repr(config)


def test_an_empty_variable_counts_as_unset():
    config = load_text("", "a.yaml", {"TTA_KAFKA_SASL_PASSWORD": ""})
    assert config.kafka.sasl_password is None


@pytest.mark.parametrize(
    "kafka",
    [
        f"{{sasl_password: {{{SECRET}: 1, {SECRET}: 2}}}}",
        f"{{sasl_password: [{SECRET}]}}",
        f"{{sasl_pasword: {SECRET}}}",
        f"{{sasl_password: !{SECRET} x}}",
        f"{{sasl_password: !{SECRET}!x y}}",
        f"{{sasl_password: *{SECRET}}}",
        f"{{sasl_password: &{SECRET}}}",
        f"{{sasl_password: '{SECRET}",
        f"\n  sasl_password:{SECRET}",
        f"{{sasl_password={SECRET}: }}",
    ],
)
def test_no_fault_tells_a_secret(kafka):
    assert SECRET not in "\n".join(faults_of(f"kafka: {kafka}"))


def test_a_password_of_digits_is_not_told():
    (fault,) = faults_of("kafka: {sasl_password: 271828}")
    assert fault.endswith("sasl_password: expected text, got a number: put it in quotes")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from(
    [*Config.model_fields, "labels", "max_size", "sasl_password", "templates", "budget"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_mapping_loads_or_is_refused(data):
    try:
        load_text(yaml.safe_dump(data), "a.yaml", {})
    except InvalidConfig as error:
        assert all(fault.startswith("a.yaml:") for fault in error.faults)


@given(st.text(st.characters() | st.sampled_from("{}[]:-&*!|>'\"\n ?%@#<"), max_size=40))
def test_any_text_loads_or_is_refused(text):
    try:
        load_text(text, "a.yaml", {})
    except InvalidConfig as error:
        assert all("\n" not in fault for fault in error.faults)


@pytest.mark.parametrize("written", ["!!int ''", "!!bool maybe", "0b_", "9" * 5000, "!!float x"])
def test_scalars_that_yaml_itself_trips_over_are_faults(written):
    assert "a.yaml:1: adapt.seed:" in faults_of(f"adapt: {{seed: {written}}}")[0]


def test_fingerprint_follows_what_matters_and_no_secret():
    default = fingerprint(Config())
    secret = load_text("kafka: {sasl_password: x}", "a.yaml", {})
    assert fingerprint(secret) == default
    assert fingerprint(load_text("batch: {max_size: 31}", "a.yaml", {})) != default


CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_default_file_is_the_default_and_names_every_key():
    text = (CONFIGS / "default.yaml").read_text()
    assert yaml.safe_load(text) == Config().model_dump(mode="json")
    assert load_text(text, "default.yaml", {}) == Config()
    assert text == default_yaml(), "run: tta-agent defaults > configs/default.yaml"


def test_the_schema_file_is_up_to_date():
    written = yaml.safe_load((CONFIGS / "schema.json").read_text())
    assert written == json_schema(), "run: tta-agent schema > configs/schema.json"


def test_every_key_has_a_description():
    schema = json_schema()
    sections = [part["properties"] for part in (schema, *schema["$defs"].values())]
    parts = [part for section in sections for part in section.values()]
    assert all("description" in part or "$ref" in part for part in parts)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_each_profile_loads_and_points_editors_at_the_schema(path):
    load(path, {})
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
