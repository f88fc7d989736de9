"""From the YAML file to a `Config`, or to every fault in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent import config_schema, config_yaml
from agent.config import SECRETS, Config
from agent.errors import InvalidConfig


def load(path: Path | str, environ: Mapping[str, str]) -> Config:
    """Read the configuration at `path`, with the secrets that `environ` holds.

    Raises:
        InvalidConfig: the file cannot be read, or has faults; all of them are told.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfig([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise InvalidConfig([f"{path}: expected text in UTF-8"]) from None
    return load_text(text, str(path), environ)


def load_text(text: str, name: str, environ: Mapping[str, str]) -> Config:
    """Read a configuration from `text`; faults call it `name`.

    A section whose keys are all commented out keeps its defaults. An empty variable of `environ`
    counts as unset.

    Raises:
        InvalidConfig: the text has faults; all of them are told.
    """
    document = config_yaml.read(text, name)
    data = {
        key: {} if value is None and key in Config.model_fields and key != "calibration" else value
        for key, value in document.data.items()
    }
    for variable, (section, key) in SECRETS.items():
        part = data.setdefault(section, {}) if environ.get(variable) else None
        if isinstance(part, dict):
            part[key] = environ[variable]
    faults = document.faults
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        faults = faults + config_schema.explain(document, error, json_schema())
    # Outside the handler, lest the traceback carry what was refused.
    if faults:
        raise InvalidConfig(config_schema.render(document, faults, json_schema()))
    return config


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def default_yaml() -> str:
    """A file that names every key with its default and what it means."""
    editors = "# yaml-language-server: $schema=schema.json\n\n"
    return editors + config_schema.commented(Config().model_dump(mode="json"), json_schema())
