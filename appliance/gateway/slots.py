"""How many requests each tenant has on their way: what is being prepared counts, not only what runs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import grpc

from appliance.errors import CloisterError


class TenantSlots:
    """One slot for each request a tenant may have at once, by the tenant's opaque scope."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    @contextmanager
    def slot(self, scope: str, limit: int) -> Iterator[None]:
        """Hold a slot of the tenant.

        Raises:
            CloisterError: TENANT_CONCURRENCY; none is free.
        """
        if self._taken[scope] >= limit:
            raise CloisterError(
                "TENANT_CONCURRENCY",
                f"the tenant already has its {limit} requests on their way; wait for one to end",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                {"max_concurrent": str(limit)},
                retry_after=timedelta(seconds=1),
            )
        self._taken[scope] += 1
        try:
            yield
        finally:
            self._taken[scope] -= 1
            if not self._taken[scope]:
                del self._taken[scope]
