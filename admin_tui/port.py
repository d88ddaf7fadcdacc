"""What the console asks of the appliance, and the client that answers it; each call blocks its thread."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from appliance.client.admin import AdminClient
from appliance.protos import admin_pb2

# A control that does not answer in this time is shown as not reachable.
_ANSWER_S = 4.0
_READ_S = 30.0


class Port(Protocol):
    """The admin API as the console uses it. Every call raises CloisterError."""

    def status(self) -> admin_pb2.GetStatusResponse:
        """The appliance as a whole."""

    def tenants(self) -> tuple[admin_pb2.Tenant, ...]:
        """The tenants, by name."""

    def keys(self) -> tuple[admin_pb2.Key, ...]:
        """The keys of all tenants, oldest first."""

    def versions(self) -> tuple[admin_pb2.ModelVersion, ...]:
        """The committed model versions, oldest first."""

    def aliases(self) -> tuple[admin_pb2.Alias, ...]:
        """The aliases, by name."""

    def imports(self) -> tuple[admin_pb2.Import, ...]:
        """The imports that run or wait, and the last ones that ended, newest first."""

    def offer_volume(self, import_id: str, path: str) -> None:
        """Hand the next volume to an import that waits for it."""

    def query_audit(self, request: admin_pb2.QueryAuditRequest) -> admin_pb2.QueryAuditResponse:
        """One page of the log. The appliance records that it was read."""

    def verify_audit(self) -> admin_pb2.VerifyAuditResponse:
        """The verdict on the whole log; takes as long as it takes."""

    def import_bundle(self, path: str) -> Iterator[admin_pb2.ImportBundleResponse]:
        """Progress until the import is committed or rejected; the importer goes on without a listener."""

    def close(self) -> None:
        """Hang up; calls in progress end with an error."""


class AdminPort:
    """The appliance in a home directory, over its admin socket.

    Args:
        home: the appliance's home directory.
    """

    def __init__(self, home: Path) -> None:
        self._admin = AdminClient(home)

    def operator(self) -> str:
        """Log in; the operator's name."""
        return self._admin.operator

    def status(self) -> admin_pb2.GetStatusResponse:
        """The appliance as a whole."""
        return self._admin.system.GetStatus(admin_pb2.GetStatusRequest(), timeout=_ANSWER_S)

    def tenants(self) -> tuple[admin_pb2.Tenant, ...]:
        """The tenants, by name."""
        return tuple(self._admin.tenants.ListTenants(admin_pb2.ListTenantsRequest(), timeout=_ANSWER_S).tenants)

    def keys(self) -> tuple[admin_pb2.Key, ...]:
        """The keys of all tenants, oldest first."""
        return tuple(self._admin.tenants.ListKeys(admin_pb2.ListKeysRequest(), timeout=_ANSWER_S).keys)

    def versions(self) -> tuple[admin_pb2.ModelVersion, ...]:
        """The committed model versions, oldest first."""
        request = admin_pb2.ListModelVersionsRequest()
        return tuple(self._admin.models.ListModelVersions(request, timeout=_ANSWER_S).versions)

    def aliases(self) -> tuple[admin_pb2.Alias, ...]:
        """The aliases, by name."""
        return tuple(self._admin.models.ListAliases(admin_pb2.ListAliasesRequest(), timeout=_ANSWER_S).aliases)

    def imports(self) -> tuple[admin_pb2.Import, ...]:
        """The imports that run or wait, and the last ones that ended, newest first."""
        return tuple(self._admin.models.ListImports(admin_pb2.ListImportsRequest(), timeout=_ANSWER_S).imports)

    def offer_volume(self, import_id: str, path: str) -> None:
        """Hand the next volume to an import that waits for it."""
        request = admin_pb2.OfferVolumeRequest(import_id=import_id, path=path)
        self._admin.models.OfferVolume(request, timeout=_READ_S)

    def query_audit(self, request: admin_pb2.QueryAuditRequest) -> admin_pb2.QueryAuditResponse:
        """One page of the log. The appliance records that it was read."""
        return self._admin.audit.QueryAudit(request, timeout=_READ_S)

    def verify_audit(self) -> admin_pb2.VerifyAuditResponse:
        """The verdict on the whole log; takes as long as it takes."""
        return self._admin.audit.VerifyAudit(admin_pb2.VerifyAuditRequest())

    def import_bundle(self, path: str) -> Iterator[admin_pb2.ImportBundleResponse]:
        """Progress until the import is committed or rejected; the importer goes on without a listener."""
        stream: Iterator[admin_pb2.ImportBundleResponse]
        stream = self._admin.models.ImportBundle(admin_pb2.ImportBundleRequest(path=path))
        return stream

    def close(self) -> None:
        """Hang up; calls in progress end with an error."""
        self._admin.close()
