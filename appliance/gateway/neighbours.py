"""The processes a request is walked through, and what all requests have in common."""

from dataclasses import dataclass, field

from appliance.gateway.background import Background
from appliance.gateway.control import ControlClient
from appliance.gateway.limits import Limits
from appliance.gateway.quarantine import Quarantine
from appliance.gateway.sessions import Sessions
from appliance.gateway.slots import TenantSlots
from appliance.gateway.streams import Streams
from appliance.gateway.texts import Texts


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The processes a request is walked through, and what all requests have in common."""

    control: ControlClient
    texts: Texts
    sessions: Sessions
    background: Background
    streams: Streams = field(default_factory=Streams)
    slots: TenantSlots = field(default_factory=TenantSlots)
    limits: Limits = field(default_factory=Limits)
    quarantine: Quarantine = field(default_factory=Quarantine)
