"""How a handler of control ends a call it cannot answer; a defect is logged here and named to nobody."""

import logging
from typing import Any, NoReturn

import grpc

from appliance import errors
from appliance.errors import CloisterError

log = logging.getLogger(__name__)


async def refuse(context: Any, error: Exception) -> NoReturn:
    """End the call with `error`; whatever is not a CloisterError becomes INTERNAL, without its text."""
    if not isinstance(error, CloisterError):
        log.error("a call failed", exc_info=error)
        error = CloisterError(
            "INTERNAL", "a defect of the control plane; its log has it", grpc.StatusCode.INTERNAL
        )
    await errors.abort(context, error)
