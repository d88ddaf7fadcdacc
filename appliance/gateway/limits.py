"""How much of the gateway one caller, and all together, may have; defaults as in appliance/settings.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator may set; a test holds names and defaults against the settings.

    Attributes:
        max_streams: requests answered at once.
        max_calls_per_certificate: open at once by one certificate, whether or not it may do anything.
        max_request_bytes: of one request.
        request_seconds: a call has to deliver its request, from its beginning.
        default_deadline_seconds: of a request whose client set none.
        stall_seconds: one message may wait for the client to make room.
        drain_seconds: what runs may go on for so long once the gateway is told to stop.
    """

    max_streams: int = 512
    max_calls_per_certificate: int = 128
    max_request_bytes: int = 1 << 20
    request_seconds: float = 5.0
    default_deadline_seconds: float = 120.0
    stall_seconds: float = 30.0
    drain_seconds: float = 10.0
