"""What an operator asks for beyond looking: an import with its progress, a page of the log, a verification."""

from pathlib import Path
from typing import TYPE_CHECKING

from admin_tui.actions import Page
from admin_tui.errand import ask, listen
from admin_tui.state import (
    AuditPage,
    Import,
    ImportBegan,
    ImportLost,
    ImportTold,
    Verified,
    Verifying,
)
from admin_tui.views import audit, models
from admin_tui.widgets.dialogs import Ask, Confirm
from appliance.errors import CloisterError
from appliance.protos import admin_pb2

if TYPE_CHECKING:
    from admin_tui.app import ConsoleApp

_KEPT = "Every byte is verified before it is kept; a version that was imported stays."

# A line cannot be read that changes more often; and it costs bytes.
_SHOW_EVERY_S = 0.25


class Work:
    """Actions that wait for an answer; each ends in a note, never in a traceback.

    Args:
        app: the console.
    """

    def __init__(self, app: "ConsoleApp") -> None:
        self._app = app

    def do(self, name: str) -> None:
        """Begin one of them."""
        getattr(self, name.replace(".", "_"))()

    # The log

    def refresh(self) -> None:
        """Ask for everything the page shows; on the audit page for its newest records."""
        self._app.ask_soon()
        if self._app.page is Page.AUDIT:
            request = admin_pb2.QueryAuditRequest(limit=audit.PAGE_SIZE)
            if self._app.state.audit is not None:
                request.CopyFrom(self._app.state.audit.request)
                request.before_sequence = 0
            self._read(request)

    def audit_older(self) -> None:
        """The next page."""
        page = self._app.state.audit
        step = audit.older(page) if page else None
        if step is None:
            self._app.say("these are the oldest that match")
        else:
            self._read(*step)

    def audit_newer(self) -> None:
        """The page before."""
        page = self._app.state.audit
        step = audit.newer(page) if page else None
        if step is None:
            self._app.say("these are the newest that match; r asks for what came since")
        else:
            self._read(*step)

    def audit_filter(self) -> None:
        """Ask for the filter, then for what matches."""
        page = self._app.state.audit
        present = audit.filter_text(page.request) if page else ""
        self._app.push_screen(Ask("Show the records that match", audit.FILTER_HELP, present), self._filter)

    def audit_verify(self) -> None:
        """Verify the whole log."""
        if not self._app.state.verifying:
            self._app.take(Verifying())
            self._app.run_worker(self._verify(), exit_on_error=False, group="verify")

    def _filter(self, text: str | None) -> None:
        if text is None:
            return
        try:
            self._read(audit.filter_of(text))
        except CloisterError as error:
            self._app.say(str(error), bad=True)

    def _read(self, request: admin_pb2.QueryAuditRequest, newer: tuple[int, ...] = ()) -> None:
        self._app.run_worker(self._reading(request, newer), exclusive=True, exit_on_error=False, group="audit")

    async def _reading(self, request: admin_pb2.QueryAuditRequest, newer: tuple[int, ...]) -> None:
        try:
            answer = await ask(lambda: self._app.port.query_audit(request))
        except CloisterError as error:
            self._app.say(str(error), bad=True)
        else:
            self._app.take(AuditPage(request, answer, newer))
            self._app.say("")

    async def _verify(self) -> None:
        try:
            verdict = await ask(self._app.port.verify_audit)
        except CloisterError as error:
            self._app.take(Verified(None))
            self._app.say(str(error), bad=True)
        else:
            self._app.take(Verified(verdict))

    # An import

    def model_import(self) -> None:
        """Ask for the path, show it, ask again, begin."""
        importing = self._app.state.importing
        if importing is not None and importing.running:
            self._next_volume(importing)
            return
        before = importing.path if importing else ""
        help_text = "a path on the appliance; enter goes on, nothing is read yet"
        self._app.push_screen(Ask("Import a bundle", help_text, before), self._confirm)

    def _next_volume(self, importing: Import) -> None:
        """Ask where the next volume is, if one is wanted."""
        progress = importing.progress
        if progress is None or not progress.volume_wanted:
            self._app.say(f"an import is running: {importing.path}", bad=True)
            return
        title = f"Volume {progress.volume_wanted} of {progress.volumes}"
        help_text = "insert its medium, then name the file as the appliance sees it; a wrong one changes nothing"

        def named(text: str | None) -> None:
            if text and text.strip():
                path = str(Path(text.strip()).expanduser().absolute())
                self._app.run_worker(self._offer(progress.import_id, path), exit_on_error=False, group="volume")

        self._app.push_screen(Ask(title, help_text, importing.path), named)

    async def _offer(self, import_id: str, path: str) -> None:
        try:
            await ask(lambda: self._app.port.offer_volume(import_id, path))
        except CloisterError as error:
            self._app.say(str(error), bad=True)
        else:
            self._app.say("")

    def _confirm(self, text: str | None) -> None:
        if not text or not text.strip():
            return
        path = str(Path(text.strip()).expanduser().absolute())

        def answered(yes: str | None) -> None:
            if yes:
                self._app.take(ImportBegan(path, self._app.clock()))
                self._app.run_worker(self._import(path), exit_on_error=False, group="import")

        self._app.push_screen(Confirm("Import this bundle?", path, _KEPT, "Import"), answered)

    async def _import(self, path: str) -> None:
        shown, state = -_SHOW_EVERY_S, ""

        def told(progress: admin_pb2.ImportBundleResponse) -> None:
            nonlocal shown, state
            now = self._app.clock()
            if progress.state != state or now - shown >= _SHOW_EVERY_S:
                shown, state = now, progress.state
                self._app.take(ImportTold(progress, now))

        try:
            await listen(lambda: self._app.port.import_bundle(path), told)
        except CloisterError as error:
            self._app.take(ImportLost(error))
        self._app.ask_soon()
        importing = self._app.state.importing
        if importing is not None and self._app.page is not Page.MODELS:
            self._app.say(*models.ended(importing))
