"""A streaming test-time adaptation agent: frames in, verdicts out, adapting without labels."""

__version__ = "0.1.0"
