"""Every error the agent raises on purpose.

    AgentError
    ├── InvalidConfig        a configuration is refused; carries file, line and key
    ├── InvalidFrame         this frame can never be read: it is dead-lettered
    │   ├── UnreadableEnvelope   headers or JSON envelope are malformed
    │   ├── UnsupportedImage     not JPEG, PNG or WebP
    │   ├── OversizedFrame       over the limit of bytes or pixels
    │   └── CorruptImage         the decoder gave up
    ├── Retryable            the same call may succeed later
    │   ├── BrokerUnavailable
    │   └── PublishFailed        outputs were not acknowledged; nothing was committed
    └── ModelError           no model to run; the message says what to do
        ├── MissingAsset         a file or a package the model needs is not there
        └── IncompatibleCheckpoint

`Invalid*` is the input's fault and the stream goes on, `Retryable` is the environment's, and
anything else stops the agent, because to go on would be to guess.
"""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """Base of all errors the agent raises on purpose."""


class InvalidConfig(AgentError):
    """A configuration is refused. `faults` holds one readable line per fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class InvalidFrame(AgentError):
    """A frame that can never be read. `reason` names the kind in headers and metrics."""

    reason: ClassVar[str] = "invalid"


class UnreadableEnvelope(InvalidFrame):
    """The record's headers or JSON envelope are malformed."""

    reason = "envelope"


class UnsupportedImage(InvalidFrame):
    """The bytes are not a JPEG, PNG or WebP image."""

    reason = "unsupported"


class OversizedFrame(InvalidFrame):
    """The frame is over the configured limit of bytes or pixels."""

    reason = "oversized"


class CorruptImage(InvalidFrame):
    """The image decoder gave up."""

    reason = "corrupt"


class Retryable(AgentError):
    """The same call may succeed later."""


class BrokerUnavailable(Retryable):
    """No broker of `kafka.bootstrap_servers` answers."""


class PublishFailed(Retryable):
    """Outputs were not acknowledged; their frames' offsets were not committed."""


class ModelError(AgentError):
    """There is no model to run; the message says what to do."""


class MissingAsset(ModelError):
    """A file or package that the model needs is not there."""


class IncompatibleCheckpoint(ModelError):
    """The checkpoint's tensors do not fit the configured architecture."""
