"""Numbers, sizes and times as the screens write them; what is not known is a dash."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from admin_tui.cells import Cell, Tone

UNKNOWN = Cell("-", Tone.DIM, -1.0)


def number(value: int, tone: Tone = Tone.PLAIN) -> Cell:
    """A count: 12,345; from a million on 12.3M."""
    return Cell(short(value), tone, float(value))


def short(value: int) -> str:
    """12,345 up to a million, then 12.3M, 4.5G."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,}"


def share(part: int, whole: int, tone: Tone = Tone.PLAIN) -> Cell:
    """A percentage; a dash of nothing."""
    if not whole:
        return UNKNOWN
    return Cell(f"{100 * part // whole}%", tone, part / whole)


def rate(value: float | None) -> Cell:
    """Per second: one decimal below ten."""
    if value is None:
        return UNKNOWN
    return Cell(f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}", order=value)


def duration(seconds: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def moment(stamp: Timestamp, form: str = "%Y-%m-%d %H:%M") -> str:
    """UTC; a dash for a time that is not there."""
    return stamp.ToDatetime().strftime(form) if stamp.seconds else "-"


def days_until(stamp: Timestamp, now: datetime) -> int:
    """Whole days from `now`; negative when it is past."""
    return (stamp.ToDatetime(tzinfo=UTC) - now.astimezone(UTC)).days
