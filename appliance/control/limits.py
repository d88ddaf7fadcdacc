"""What an operator may set of control; defaults as in appliance/settings.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Handed to control when it starts; a test holds names and defaults against the settings.

    Attributes:
        audit_wait_seconds: a record that is not durable by then refuses what depends on it.
        max_concurrent: of a tenant that is added without.
        weight: of a tenant that is added without.
        key_days: of a key that is issued without.
        canary_seconds: the answer to a canary that takes longer has failed.
    """

    audit_wait_seconds: float = 2.0
    max_concurrent: int = 16
    weight: int = 100
    key_days: int = 90
    canary_seconds: float = 120.0
