"""How long `cloister audit query` waits for a page of a long log, by what is asked for.

Run: python -m benchmarks.audit_query [--records N] [--dir DIR]
The log is written by SQL in one go, as nothing here verifies it: the records, their columns and their indexes are
real, the hashes are not. One caller. The first call is timed with its pages in the file cache; all calls until a
page is full, or the log at its end, by the clock and by the processor: a log read for the first time is as fast as
the disk.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.control.audit.query import Filter, Page, query
from appliance.control.audit.record import Record, Stamp, StoredRecord, draft, encode
from appliance.control.audit.store import Store

_PAGE = 50
_ROUNDS = 9
_TENANTS = 40
_RARE = 10_000  # one request in so many is denied
_SECOND = 10**9
_STARTED_NS = 1_800_000_000 * _SECOND


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, help="records in the log")
    parser.add_argument("--dir", type=Path, help="where to write")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="cl-audit-", dir=args.dir))
    try:
        _write(place / "audit.db", args.records)
        _measure(place / "audit.db", args.records)
    finally:
        shutil.rmtree(place)


def _write(db: Path, count: int) -> None:
    Store.create(db)
    store = Store(db)
    for start in range(1, count + 1, 20_000):
        end = min(count + 1, start + 20_000)
        store.commit([_stored(number) for number in range(start, end)], [], end - 1, "")
    store.close()
    print(f"log: {count:,} records, {db.stat().st_size / 2**20:,.0f} MiB")


def _stored(number: int) -> StoredRecord:
    """Intent or outcome of a request, as control writes them; tenants in turn, one request in many denied."""
    request = number // 2
    tenant = f"tenant-{request % _TENANTS}"
    record = Record(
        kind="inference.generate",
        phase="outcome" if number % 2 else "intent",
        actor=f"spiffe://site/tenant/{tenant}/app/claims",
        decision="ok" if number % 2 else "allow" if request % _RARE else "deny",
        request_id=f"{tenant}/01890a5d-ac96-774b-0000-{request:012d}",
        tenant=tenant,
        facts={"key_id": "k_7Q2M4ZCD", "model_digest": "c3" * 32, "policy": "1", "prompt_tokens": 412},
    )
    stamp = Stamp(_STARTED_NS + number * _SECOND, number, "0" * 36, "synchronised")
    body = encode(draft(record), number, stamp, bytes(16))
    told = (record.request_id, record.kind, record.phase, record.tenant, record.actor, record.decision)
    return StoredRecord(number, *stamp, *told, body, bytes(32), bytes(32))


def _measure(db: Path, count: int) -> None:
    middle = _STARTED_NS + count // 2 * _SECOND
    asked = {
        "newest page": Filter(),
        "one tenant": Filter(tenant="tenant-7"),
        "one request": Filter(request_id=f"tenant-1/01890a5d-ac96-774b-0000-{1:012d}"),
        "one actor, by part of the name": Filter(actor="TENANT-7/"),
        f"one in {2 * _RARE:,}": Filter(decision="deny"),
        f"one in {2 * _RARE:,}, of one tenant": Filter(decision="deny", tenant="tenant-0"),
        "nothing matches": Filter(decision="none of them"),
        "the older half, by time": Filter(until_ns=middle),
    }
    print(f"{'asked for':<32} {'first call ms':>14} {'calls':>6} {'page ms':>8} {'cpu ms':>8} {'matches':>8}")
    for name, wanted in asked.items():
        first = [_timed(db, wanted, 0)[0] for _ in range(_ROUNDS)][1:]
        began, cpu = time.perf_counter(), time.process_time()
        pages = list(_until_full(db, wanted))
        page, cpu = (time.perf_counter() - began) * 1e3, (time.process_time() - cpu) * 1e3
        found = sum(len(page.records) for page in pages)
        once = statistics.median(first) * 1e3
        print(f"{name:<32} {once:>14.1f} {len(pages):>6} {page:>8.1f} {cpu:>8.1f} {found:>8}")


def _until_full(db: Path, wanted: Filter) -> Iterator[Page]:
    """Call after call until a page is full or the log is at its end, as the command does."""
    before, left = 0, _PAGE
    while left > 0:
        page = query(db, wanted, before, left)
        yield page
        before, left = page.next_before, left - len(page.records)
        if not before:
            return


def _timed(db: Path, wanted: Filter, before: int) -> tuple[float, Page]:
    began = time.perf_counter()
    page = query(db, wanted, before, _PAGE)
    return time.perf_counter() - began, page


if __name__ == "__main__":
    main()
