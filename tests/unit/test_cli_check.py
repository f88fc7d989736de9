import json
import subprocess
import sys

import pytest

from agent import __version__, cli
from agent.config_file import json_schema
from agent.errors import AgentError


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process and gives exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tta-agent", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return exited.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_text("batch:\n  max_size: 8\n")
    return path


def test_a_good_file_is_ok(run, written):
    assert run("check", written) == (0, f"{written}: ok\n", "")


def test_all_faults_go_to_standard_error(run, written):
    written.write_text("batch:\n  max_size: none\nlog: 3\n")
    code, out, err = run("check", written)
    assert (code, out) == (1, "")
    assert [line.split(":")[1] for line in err.splitlines()] == ["2", "3"]


def test_a_missing_file_is_a_fault(run, tmp_path):
    code, _, err = run("check", tmp_path / "none.yaml")
    assert (code, err) == (
        1,
        f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n",
    )


def test_secrets_come_from_the_environment(run, written, monkeypatch):
    text = "kafka: {security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: me}"
    written.write_text(text)
    assert run("check", written)[0] == 1
    monkeypatch.setenv("TTA_KAFKA_SASL_PASSWORD", "x")
    assert run("check", written)[0] == 0


def test_other_errors_are_one_message(run, written, monkeypatch):
    def fail(*_):
        raise AgentError("the port is taken")

    monkeypatch.setattr("agent.config_file.load", fail)
    assert run("check", written) == (2, "", "tta-agent: the port is taken\n")


def test_wrong_usage_is_2(run):
    assert run("chek")[0] == 2


def test_the_schema_is_json(run):
    _, out, _ = run("schema")
    assert json.loads(out) == json_schema()


def test_the_defaults_pass_the_check(run, written):
    written.write_text(run("defaults")[1])
    assert run("check", written)[0] == 0


def test_the_version_is_told(run):
    assert run("--version")[:2] == (0, f"tta-agent {__version__}\n")


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "tta-agent check agent.yaml" in out
    assert "Exit codes" in out


def test_check_needs_no_model_library(written):
    code = (
        "import sys; from agent.cli import app; app(standalone_mode=False);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'kafka')))"
    )
    done = subprocess.run([sys.executable, "-c", code, "check", written], check=False)
    assert done.returncode == 0
