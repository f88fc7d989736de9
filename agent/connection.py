"""What every Kafka client of the agent shares: how to connect, and what an error means."""

from __future__ import annotations

import ssl
from typing import Any

from kafka.errors import (
    AuthorizationError,
    KafkaConfigurationError,
    KafkaError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)

from agent.config import KafkaConfig
from agent.errors import AgentError, BrokerUnavailable, InvalidConfig

#: How long a client looks for a first broker before it gives up.
BOOTSTRAP_TIMEOUT_S = 10.0

#: The longest pause between two attempts to reach a broker that is down.
_RECONNECT_BACKOFF_MAX_MS = 2000


def settings(config: KafkaConfig) -> dict[str, Any]:
    """Arguments for any kafka-python client. They hold secrets: never log them.

    Raises:
        InvalidConfig: a certificate or key cannot be read.
    """
    arguments: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in config.bootstrap_servers.split(",")],
        "bootstrap_timeout_ms": int(BOOTSTRAP_TIMEOUT_S * 1000),
        "reconnect_backoff_max_ms": _RECONNECT_BACKOFF_MAX_MS,
        "client_id": "tta-agent",
        "security_protocol": config.security_protocol,
    }
    if config.security_protocol.endswith("SSL"):
        arguments["ssl_context"] = _ssl_context(config)
    if config.security_protocol.startswith("SASL") and config.sasl_password is not None:
        arguments["sasl_mechanism"] = config.sasl_mechanism
        arguments["sasl_plain_username"] = config.sasl_username
        arguments["sasl_plain_password"] = config.sasl_password.get_secret_value()
    return arguments


def explain(error: KafkaError, config: KafkaConfig) -> AgentError:
    """The agent's error for one of kafka-python's: who is at fault, and what to check."""
    servers, what = config.bootstrap_servers, f"{type(error).__name__}: {error}"
    if isinstance(error, SaslAuthenticationFailedError | UnsupportedSaslMechanismError):
        return InvalidConfig([f"kafka.sasl_*: {servers} refused the credentials: {what}"])
    if isinstance(error, AuthorizationError):
        return InvalidConfig([f"kafka: {servers} denies access; grant it to the agent: {what}"])
    if isinstance(error, KafkaConfigurationError):
        return InvalidConfig([f"kafka: {error}"])
    return BrokerUnavailable(
        f"no usable answer from Kafka at {servers} ({what}): check that it runs, that "
        "kafka.bootstrap_servers and kafka.security_protocol are right, and that its advertised "
        "listeners can be reached from here"
    )


def _ssl_context(config: KafkaConfig) -> ssl.SSLContext:
    password = config.ssl_key_password
    try:
        context = ssl.create_default_context(cafile=config.ssl_ca_file)
        if config.ssl_certificate_file is not None:
            context.load_cert_chain(
                config.ssl_certificate_file,
                config.ssl_key_file,
                # Without one, OpenSSL would ask on the terminal for an encrypted key's.
                password.get_secret_value() if password is not None else "",
            )
    except OSError as error:  # ssl.SSLError is one
        raise InvalidConfig([f"kafka.ssl_*: a file cannot be read: {error}"]) from error
    return context
