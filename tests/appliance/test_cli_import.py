"""`cloister bundle import` as an operator has it: volumes asked for, rejoined after Ctrl-C, lines for programs."""

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from bundles.protos import importer_pb2
from tests.appliance.control_house import DIGEST, House, Importer, make_home, running, until

ALONE = [sys.executable, "-m", "appliance.cli.main"]


class Split(Importer):
    """An importer whose bundle has three volumes: `v1` is imported, then `v2` and `v3` are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = 2
        self.taken = asyncio.Condition()

    def _progress(self, **fields: Any) -> importer_pb2.ImportBundleResponse:
        common = {"import_id": "import-1", "model_version": "notes@1", "model_digest": DIGEST, "volumes": 3}
        state = importer_pb2.IMPORT_STATE_STREAMING
        return importer_pb2.ImportBundleResponse(**{"state": state, "bytes_total": 300, **common, **fields})

    async def ImportBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while self.wanted <= 3:
            yield self._progress(bytes_done=100 * (self.wanted - 1), volume_wanted=self.wanted)
            async with self.taken:
                await self.taken.wait()
            yield self._progress(bytes_done=100 * (self.wanted - 2) + 50, bytes_per_second=7 << 20)
        yield self._progress(state=importer_pb2.IMPORT_STATE_COMMITTED, bytes_done=300, bytes_reused=100)

    async def OfferVolume(self, request: Any, context: Any) -> importer_pb2.OfferVolumeResponse:
        if request.path == "/too/late":  # another operator was faster
            self.wanted += 1
            async with self.taken:
                self.taken.notify_all()
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_NOT_WANTED: it waits for none")
        if not request.path.endswith(str(self.wanted)):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"VOLUME_ORDER: volume {self.wanted} is wanted"
            )
        self.offered.append((request.import_id, request.path))
        self.wanted += 1
        async with self.taken:
            self.taken.notify_all()
        return importer_pb2.OfferVolumeResponse()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    home = make_home()
    try:
        async with running(home, House(home, importer=Split())) as made:
            yield made
    finally:
        shutil.rmtree(home.root.parent)


@dataclass
class Typed:
    """What a command left."""

    status: int
    out: str
    err: str


async def run(house: House, *words: str) -> Typed:
    """A command without a terminal."""
    process = await asyncio.create_subprocess_exec(
        *ALONE, "--home", str(house.home.root), *words, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return Typed(process.returncode or 0, out.decode(), err.decode())


class OnTerminal:
    """A command on a terminal of 80 columns."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process = process
        self._master = master
        self.shown = ""
        os.set_blocking(master, False)

    def read(self) -> str:
        """All that the terminal has shown."""
        try:
            while data := os.read(self._master, 65536):
                self.shown += data.decode()
        except OSError:  # nothing now, or its other end is closed
            pass
        return self.shown

    async def sees(self, words: str) -> None:
        """Until the terminal shows `words`."""
        await until(lambda: words in self.read())

    def types(self, text: str) -> None:
        """Keys."""
        os.write(self._master, text.encode())


async def on_terminal(house: House, *words: str) -> OnTerminal:
    """Start one."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    process = await asyncio.create_subprocess_exec(
        *ALONE, "--home", str(house.home.root), *words, stdin=slave, stdout=slave, stderr=slave,
        env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    return OnTerminal(process, master)


async def test_volumes_named_beforehand_are_handed_over_in_whatever_order_they_were_named(house: House) -> None:
    done = await run(house, "bundle", "import", "/m/v1", "--volume", "/c/v3", "--volume", "/b/v2")
    assert (done.status, house.importer.offered) == (0, [("import-1", "/b/v2"), ("import-1", "/c/v3")])
    assert "notes@1" in done.out
    assert "300 B, 100 B of it were here already" in done.out
    assert "7.0 MiB/s" in done.err, "the rate is the importer's"


async def test_where_nobody_can_be_asked_the_wanted_volume_is_an_error_and_the_import_waits_on(
    house: House,
) -> None:
    done = await run(house, "bundle", "import", "/m/v1", "--volume", "/b/v2")
    assert done.status == 3
    assert "error: VOLUME_WANTED: the import waits for volume 3 of 3: cloister bundle import /m/v1" in done.err
    again = await run(house, "--json", "bundle", "import", "/m/v1", "--volume", "/c/v3")
    assert again.status == 0
    lines = [json.loads(line) for line in again.out.splitlines()]
    assert [(line["state"], line["volume_wanted"]) for line in lines] == [
        ("streaming", 3), ("streaming", 0), ("committed", 0),
    ]  # fmt: skip


async def test_on_a_terminal_the_next_volume_is_asked_for_and_a_wrong_one_is_asked_for_again(house: House) -> None:
    terminal = await on_terminal(house, "bundle", "import", "/m/x.bundle.001")
    await terminal.sees("volume 2 of 3 is wanted")
    await terminal.sees("[/m/x.bundle.002]: ")
    terminal.types("/b/v7\n")
    await terminal.sees("not taken: VOLUME_ORDER: volume 2 is wanted")
    terminal.types("\n")
    await terminal.sees("volume 3 of 3 is wanted")
    terminal.types("/c/v3\n")
    assert await terminal.process.wait() == 0
    assert house.importer.offered == [("import-1", "/m/x.bundle.002"), ("import-1", "/c/v3")]
    painted = re.split(r"[\r\n]+", terminal.read())
    assert max(map(len, (line for line in painted if line.startswith("[")))) < 80


async def test_a_volume_that_somebody_else_handed_over_meanwhile_is_not_asked_for_again(house: House) -> None:
    terminal = await on_terminal(house, "bundle", "import", "/m/x.bundle.001")
    await terminal.sees("volume 2 of 3 is wanted")
    terminal.types("/too/late\n")
    await terminal.sees("volume 3 of 3 is wanted")
    terminal.types("/c/v3\n")
    assert await terminal.process.wait() == 0
    assert house.importer.offered == [("import-1", "/c/v3")]


async def test_ctrl_c_leaves_the_import_running_and_says_how_to_see_it_again(house: House) -> None:
    terminal = await on_terminal(house, "bundle", "import", "/m/v1")
    await terminal.sees("volume 2 of 3 is wanted")
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.process.wait() == 130
    assert "the import goes on; to watch it again: cloister bundle import /m/v1, or cloister bundle imports" in (
        terminal.read()
    )
    assert house.importer.cancelled == []


class Dying(Split):
    """One that dies while a volume is wanted; the next waits for it still, and its first answers fail."""

    def __init__(self) -> None:
        super().__init__()
        self.died = False
        self.silent = 3

    async def ImportBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if not self.died:
            yield self._progress(bytes_done=50)
            self.died = True
            await context.abort(grpc.StatusCode.UNAVAILABLE, "STOPPING: the importer is stopping")
        async for told in super().ImportBundle(request, context):
            yield told

    async def ListImports(self, request: Any, context: Any) -> importer_pb2.ListImportsResponse:
        self.silent -= 1
        if self.silent > 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no importer")
        progress = self._progress(volume_wanted=2)
        if self.wanted > 3:
            progress = self._progress(state=importer_pb2.IMPORT_STATE_COMMITTED, bytes_done=300)
        return importer_pb2.ListImportsResponse(imports=[importer_pb2.Import(path="/m/v1", progress=progress)])


@pytest.mark.parametrize("ended", [False, True])
async def test_an_importer_that_dies_is_waited_for_and_the_same_import_watched_on(ended: bool) -> None:
    home, importer = make_home(), Dying()
    importer.wanted = 4 if ended else 2
    try:
        async with running(home, House(home, importer=importer)) as house:
            done = await run(house, "bundle", "import", "/m/v1", "--volume", "/b/v2", "--volume", "/c/v3")
    finally:
        shutil.rmtree(home.root.parent)
    assert (done.status, "the importer is away" in done.err) == (0, True)
    assert "notes@1" in done.out
    assert importer.offered == ([] if ended else [("import-1", "/b/v2"), ("import-1", "/c/v3")])


async def test_imports_are_listed_and_ended_by_the_beginning_of_their_id_or_their_path(house: House) -> None:
    listed = await run(house, "bundle", "imports")
    assert "waits for volume 2 of 3" in listed.out
    assert "/media/a" in listed.out
    assert max(map(len, listed.out.splitlines())) <= 80
    for name in ("i1", "/media/a"):
        assert (await run(house, "bundle", "cancel", name)).status == 0
    assert house.importer.cancelled == ["i1", "i1"]
    missing = await run(house, "bundle", "cancel", "another")
    assert (missing.status, missing.err.split(":")[1].strip()) == (1, "IMPORT_NOT_FOUND")


async def test_versions_are_listed_in_80_columns_with_what_needs_attention_below(house: House) -> None:
    house.importer.versions[0].MergeFrom(
        importer_pb2.ModelVersion(damaged=["model.safetensors"], approvals_required=2, signers=["k"])
    )
    shown = (await run(house, "bundle", "list")).out
    header, row, *notes = shown.splitlines()
    assert header.split() == ["MODEL", "SEQ", "KIND", "SIZE", "STATE", "SIGNERS", "DIGEST"]
    assert "committed" in row
    assert any("is DAMAGED: 1 file(s), model.safetensors" in note for note in notes)
    assert any("0 of 2 custodians approved it" in note for note in notes)
    assert "DAMAGED     ab changed: notes@1 config.json" in (await run(house, "bundle", "store")).out
    assert "every file is what was imported" in (await run(house, "bundle", "scrub")).out


async def test_an_activation_tells_each_step_and_its_refusal_is_an_exit_status(house: House) -> None:
    done = await run(house, "model", "activate", "notes", "--alias", "ward")
    assert [line.split()[0] for line in done.out.splitlines()] == ["planned", "loading", "switched", "active"]
    shown = (await run(house, "model", "list")).out
    assert re.search(r"notes@1 +active +ward", shown)
    refused = await run(house, "model", "rollback", "ward")
    assert (refused.status, "error: NO_EARLIER_VERSION" in refused.err) == (3, True)
    house.importer.approvals = {b"signed": (DIGEST, ["k1"])}
    statement = house.home.root / "approval.json"
    statement.write_bytes(b"signed")
    house.importer.versions[0].approvals_required, house.importer.custodians = 2, ["k1", "k2"]
    approved = await run(house, "model", "approve", str(statement))
    assert (approved.status, approved.out.splitlines()) == (0, ["notes@1: active, approved by 1 of 2", "  k1"])
