"""The audit log: hash-chained, Merkle-treed, signed; nothing is answered before its record is durable.

`AuditLog` writes and reads it, `verify` judges it without any process running; docs/audit.md has the format.
"""

from appliance.control.audit.clock import Clock, SystemClock
from appliance.control.audit.errors import AuditTamperedError
from appliance.control.audit.head import load_public_key, make_key
from appliance.control.audit.log import AuditLog
from appliance.control.audit.record import AuditRecordError, Receipt, Record, Stamp, StoredRecord
from appliance.control.audit.verification import Verdict, verify

__all__ = [
    "AuditLog",
    "AuditRecordError",
    "AuditTamperedError",
    "Clock",
    "Receipt",
    "Record",
    "Stamp",
    "StoredRecord",
    "SystemClock",
    "Verdict",
    "load_public_key",
    "make_key",
    "verify",
]
