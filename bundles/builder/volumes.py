"""Which chunks lie in which volume, so that none exceeds its size and no chunk is split."""

from collections.abc import Sequence
from pathlib import Path

from bundles.format.container import BLOCK
from bundles.format.errors import BundleError
from bundles.format.manifest import MAX_VOLUMES, Manifest, Volume
from bundles.format.members import MAX_HEADER

_ENDS = 2 * BLOCK + 2 * (BLOCK + MAX_HEADER)  # end marker, and header.json and end.json at their largest


def member_size(size: int) -> int:
    """Bytes that a member takes in a container: a header block and whole blocks of content."""
    return BLOCK + size + -size % BLOCK


def plan_volumes(lengths: Sequence[int], head: int, limit: int, spare: int = 0) -> tuple[Volume, ...]:
    """The volumes of a bundle; none where one is enough.

    Args:
        lengths: bytes of each chunk that is carried, in order.
        head: bytes in the first volume that are no chunks, with room for what signing adds.
        limit: bytes that no volume exceeds.
        spare: bytes of the first volume that stay free beside these, as far as it has them.

    Raises:
        BundleError: RELEASE_INVALID, the head or a chunk does not fit, or there are too many volumes.
    """
    room = limit - _ENDS
    largest = max(map(member_size, lengths), default=0)
    if head > room or largest > room:
        least = max(head, largest) + _ENDS
        raise BundleError(
            "RELEASE_INVALID", f"volumes of {limit} bytes are too small; at least {least} are needed"
        )
    counts, used = [0], min(head + spare, room)
    for length in lengths:
        if used + member_size(length) > room:
            counts.append(0)
            used = 0
        counts[-1] += 1
        used += member_size(length)
    if len(counts) > MAX_VOLUMES:
        raise BundleError(
            "RELEASE_INVALID", f"{len(counts)} volumes are more than {MAX_VOLUMES}; make them larger"
        )
    return tuple(Volume(index=i, chunks=n) for i, n in enumerate(counts, 1)) if len(counts) > 1 else ()


def volume_paths(out: Path, volumes: Sequence[Volume]) -> tuple[Path, ...]:
    """Where the volumes of a bundle are written: `out` itself, or `out.001`, `out.002` and so on."""
    return tuple(out.with_name(f"{out.name}.{volume.index:03}") for volume in volumes) or (out,)


def written(out: Path, manifest: Manifest) -> tuple[Path, ...]:
    """What building wrote as `out`, the first volume first; that one is signed, verified and imported."""
    return volume_paths(out, manifest.volumes)
