"""Where things lie in a home directory, as far as control and `init` are concerned; see docs/architecture.md."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The paths under one home directory."""

    root: Path

    @property
    def run(self) -> Path:
        """Sockets of all processes."""
        return self.root / "run"

    @property
    def control(self) -> Path:
        """What control alone writes."""
        return self.root / "control"

    @property
    def database(self) -> Path:
        """control.db."""
        return self.control / "control.db"

    @property
    def audit_database(self) -> Path:
        """audit.db."""
        return self.control / "audit.db"

    @property
    def audit_head(self) -> Path:
        """The signed head of the audit log."""
        return self.control / "audit.head"

    @property
    def audit_key(self) -> Path:
        """The key that signs it."""
        return self.keys / "audit-head.key"

    @property
    def keys(self) -> Path:
        """Secret keys of control."""
        return self.control / "keys"

    @property
    def ca(self) -> Path:
        """The certificate authority."""
        return self.control / "ca"

    @property
    def control_socket(self) -> Path:
        """ControlService, for the gateway."""
        return self.run / "control.sock"

    @property
    def admin_socket(self) -> Path:
        """The admin services, for operators."""
        return self.run / "admin.sock"

    @property
    def login_socket(self) -> Path:
        """Where operators get a session."""
        return self.run / "login.sock"

    @property
    def importer_socket(self) -> Path:
        """The importer's."""
        return self.run / "importer.sock"

    @property
    def engine_host_socket(self) -> Path:
        """The engine-host's."""
        return self.run / "engine-host.sock"
