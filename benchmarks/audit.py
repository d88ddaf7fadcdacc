"""How fast the audit log appends, how long a caller waits, how fast it is verified and searched for open intents
(which the start of control waits for), and what a record costs on disk.

Run: python -m benchmarks.audit [--records N] [--dir DIR]
Every append is strict: it counts once it is durable and covered by the signed head.
"""

import argparse
import asyncio
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.control.audit import AuditLog, Record, make_key, verify

ORIGIN = "cloister/benchmark/audit"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000, help="records in the log that is verified")
    parser.add_argument("--dir", type=Path, help="where to write; its disk is what is measured")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="cl-audit-", dir=args.dir))
    try:
        _measure(place, args.records)
    finally:
        shutil.rmtree(place)


def _measure(place: Path, records: int) -> None:
    make_key(place / "audit.pem", ORIGIN)
    log = AuditLog.create(place / "audit.db", place / "audit.head", place / "audit.pem", ORIGIN)
    print(f"{'callers':>8} {'kind':>8} {'appends/s':>10} {'p50 ms':>8} {'p99 ms':>8}")
    for callers, each in ((1, 300), (16, 300), (128, 200)):
        _report(callers, "threads", *_threads(log, callers, each))
    for callers, each in ((1, 300), (16, 300), (128, 200), (1000, 30)):
        _report(callers, "asyncio", *asyncio.run(_tasks(log, callers, each)))
    _fill(log, max(records - log.size, 10_000))
    began = time.perf_counter()
    found = len(log.open_intents())
    seconds = time.perf_counter() - began
    print(f"open intents: {found:,} of {log.size:,} records in {seconds:.2f} s, {log.size / seconds:,.0f}/s")
    log.close()
    began, cpu = time.perf_counter(), time.process_time()
    verdict = verify(place / "audit.db", place / "audit.head", log.public_key)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    size = (place / "audit.db").stat().st_size
    print(
        f"verify: {verdict.size:,} records in {seconds:.2f} s, {verdict.size / seconds:,.0f}/s, {verdict.intact=}"
    )
    print(f"verify: {verdict.size / cpu:,.0f} records a second of processor time")
    print(f"disk: {size / verdict.size:.0f} bytes a record")
    print(f"peak memory of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def _report(callers: int, kind: str, rate: float, waits: list[float]) -> None:
    cuts = statistics.quantiles(waits, n=100)
    print(f"{callers:>8} {kind:>8} {rate:>10,.0f} {cuts[49] * 1e3:>8.2f} {cuts[98] * 1e3:>8.2f}")


def _records() -> Iterator[Record]:
    """Intent and outcome of requests as control writes them."""
    for number in range(1 << 40):
        request = f"01890a5d-ac96-774b-{time.monotonic_ns():016x}-{number}"
        yield _record("intent", "allow", request, {"prompt_tokens": 412, "max_tokens": 256})
        yield _record("outcome", "ok", request, {"prompt_tokens": 412, "generated_tokens": 97, "finish": "stop"})


def _record(phase: str, decision: str, request: str, counts: dict[str, int | str]) -> Record:
    facts = {"key_id": "k_7Q2M4ZCD", "model_digest": "c3" * 32, "policy": "1", **counts}
    actor = "spiffe://site/tenant/acme/app/claims"
    return Record("inference.generate", phase, actor, decision, request, "acme", facts)  # type: ignore[arg-type]  # phase is one of the three


def _threads(log: AuditLog, callers: int, each: int) -> tuple[float, list[float]]:
    waits: list[float] = []

    def call() -> None:
        source = _records()
        for _ in range(each):
            began = time.perf_counter()
            log.append(next(source)).result()
            waits.append(time.perf_counter() - began)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return callers * each / (time.perf_counter() - began), waits


async def _tasks(log: AuditLog, callers: int, each: int) -> tuple[float, list[float]]:
    waits: list[float] = []

    async def call() -> None:
        source = _records()
        for _ in range(each):
            began = time.perf_counter()
            await log.record(next(source), timeout=30)
            waits.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return callers * each / (time.perf_counter() - began), waits


def _fill(log: AuditLog, count: int) -> None:
    """Append many records with at most 4096 under way, and print how fast, by the clock and by the processor."""
    source, began, cpu = _records(), time.perf_counter(), time.process_time()
    for start in range(0, count, 4096):
        futures = [log.append(next(source)) for _ in range(min(4096, count - start))]
        futures[-1].result()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"one caller that does not wait: {count / seconds:,.0f} appends/s, {count / cpu:,.0f}/s of processor time"
    )


if __name__ == "__main__":
    main()
