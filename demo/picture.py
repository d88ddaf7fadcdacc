"""The console on a running appliance, as a picture: python -m demo.picture writes docs/console.svg.

A real appliance is made in .picture/ and removed again: signed bundle, deployment, tenants, streams that run while
the picture is taken. The drawing is Textual's own of the console at 80x24, without the fonts it would load from
elsewhere.
"""

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from appliance.client import AsyncClient, CloisterError
from benchmarks.demo_models.notes import draw
from demo.machine import ROOT, Machine

PICTURE = ROOT / "docs" / "console.svg"
MODEL, ALIAS = "demo-notes-s", "notes"
SIZE = (80, 24)
STREAMS = {"ward-notes": 6, "claims-desk": 3}
"""Tenants and the streams of each that run while the picture is taken."""
ANSWERED_S = 8.0
"""How long they run before it is."""
_FONT_FACE = re.compile(r"@font-face\s*\{[^}]*\}\s*|<!--.*?-->\s*", re.S)
_FONTS = "ui-monospace, 'Cascadia Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def bring_up(machine: Machine) -> None:
    """Everything that the picture shows."""
    user = pwd.getpwuid(os.getuid()).pw_name
    keys, bundle = machine.folder / "keys", machine.folder / "notes.bundle"
    root, release = ("--root", f"{keys}/root.json"), ("--release-key", f"{keys}/release.key")
    signed = (*root, *release, "--publisher-key", f"{keys}/publisher.key")
    machine.run(("trust", "init", "--out", str(keys)))
    model = ("--model", str(ROOT / "demo" / MODEL), "--name", MODEL, "--version", "1.0.0", "--sequence", "1")
    machine.run(("bundle", "build", *model, "--out", str(bundle)))
    machine.run(("bundle", "sign", str(bundle), *signed))
    machine.run(("init", "--operator", f"alice={user}", "--site", "ward", "--profile", "demo", *root))
    machine.serve(("serve", "--listen", "127.0.0.1:0"), False)
    machine.run(("bundle", "import", str(bundle)))
    machine.run(("model", "load", MODEL, "--as", ALIAS))
    machine.run(("model", "load", MODEL, "--as", "notes-exact", "--deterministic"))
    machine.run(("alias", "set", ALIAS, ALIAS))
    for tenant in (*STREAMS, "night-batch"):
        machine.run(("tenant", "add", tenant, "--models", ALIAS, "--max-concurrent", "32"))
        machine.run(("key", "issue", "--tenant", tenant, "--app", "main", "--out", str(machine.folder / tenant)))
    machine.run(("tenant", "suspend", "night-batch"))


async def keep_asking(client: AsyncClient, number: int) -> None:
    """One stream after the other until cancelled."""
    for note in draw(number, 1000):
        with contextlib.suppress(CloisterError):
            await client.chat(ALIAS, note.messages, temperature=0.7, seed=number, max_tokens=160).result()


@contextlib.asynccontextmanager
async def streams(folder: Path) -> AsyncIterator[None]:
    """Tenants at work."""
    async with contextlib.AsyncExitStack() as stack:
        tasks = []
        for tenant, count in STREAMS.items():
            client = await stack.enter_async_context(AsyncClient.from_dir(folder / tenant))
            tasks += [asyncio.create_task(keep_asking(client, 100 * len(tenant) + n)) for n in range(count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def take(machine: Machine) -> str:
    """The console at 80x24 while tenants are at work, as SVG."""
    from admin_tui.app import ConsoleApp
    from admin_tui.port import AdminPort

    port = AdminPort(machine.home)
    app = ConsoleApp(port, machine.shown(machine.home), ansi=False)
    try:
        async with streams(machine.folder), app.run_test(size=SIZE) as pilot:
            await asyncio.sleep(ANSWERED_S)
            await pilot.press("enter")
            await pilot.pause()
            return app.export_screenshot(title="cloister console")
    finally:
        port.close()


def without_remote_fonts(svg: str) -> str:
    """The drawing with fonts of the reader's machine; nothing in it is fetched."""
    local = _FONT_FACE.sub("", svg)
    local = re.sub(r"font-family:\s*[^;]+;", f"font-family: {_FONTS};", local)
    if "http" in local.replace("http://www.w3.org/", ""):
        raise ValueError("the drawing would load something from the network")
    return local


def main() -> int:
    """Take the picture; 0 when it is written."""
    from admin_tui import launch

    launch.prepare(ansi=False)
    os.environ.pop("NO_COLOR", None)
    os.umask(0o077)
    machine = Machine(".picture")
    try:
        bring_up(machine)
        svg = without_remote_fonts(asyncio.run(take(machine)))
    finally:
        machine.stop()
        machine.tidy()
        shutil.rmtree(ROOT / ".picture", ignore_errors=True)
    PICTURE.write_text(svg)
    PICTURE.chmod(0o644)
    print(f"{machine.shown(PICTURE)}: {len(svg):,} bytes, {SIZE[0]}x{SIZE[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
