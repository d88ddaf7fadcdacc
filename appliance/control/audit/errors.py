"""How the audit log refuses: it was tampered with, it takes no records now, or somebody else writes it."""

from datetime import timedelta

import grpc

from appliance.errors import CloisterError


class AuditTamperedError(CloisterError):
    """The database is not what the signed head says; nothing is written until a person has looked.

    Attributes:
        reason: stable code, as in a verdict of `verify`.
        sequence: the first record that is bad or missing, 0 where it is not known.
    """

    def __init__(self, reason: str, message: str, sequence: int = 0) -> None:
        super().__init__(
            "AUDIT_TAMPERED",
            f"{reason}: {message}; run `cloister audit verify`, restore audit.db and audit.head from one backup",
            grpc.StatusCode.DATA_LOSS,
            {"reason": reason, "sequence": str(sequence)},
        )
        self.reason = reason
        self.sequence = sequence


def blocked(why: str) -> CloisterError:
    """The log takes no records at present: AUDIT_BLOCKED, worth a retry."""
    return CloisterError(
        "AUDIT_BLOCKED",
        f"the audit log takes no records: {why}; nothing is answered until it does, see `cloister status`",
        grpc.StatusCode.UNAVAILABLE,
        retry_after=timedelta(seconds=1),
    )


def in_use(path: str) -> CloisterError:
    """Another process has this log open for writing."""
    return CloisterError(
        "AUDIT_IN_USE",
        f"another process writes {path}; stop it first",
        grpc.StatusCode.FAILED_PRECONDITION,
    )


def exists(path: str) -> CloisterError:
    """A new log was to be made where one already is."""
    return CloisterError(
        "AUDIT_EXISTS",
        f"{path} exists; an audit log is never overwritten, choose another home",
        grpc.StatusCode.ALREADY_EXISTS,
    )
