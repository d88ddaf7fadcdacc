"""What an operator can do in the console, in one table: its keys, footer, help and palette are made of it.

Each action that asks the appliance for something names the methods it calls and its twin: the `cloister` command
that does the same, for scripts and for screen readers. Uppercase keys change something; the others only look.
"""

from dataclasses import dataclass
from enum import StrEnum


class Page(StrEnum):
    """The console's screens; the digit in front switches to each."""

    DASHBOARD = "dashboard"
    TENANTS = "tenants"
    MODELS = "models"
    AUDIT = "audit"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing an operator can do.

    Attributes:
        id: stable name.
        keys: as Textual names them; the first is shown.
        title: what it does, for help and palette.
        hint: one word for the footer; empty keeps it out of there.
        pages: where it is offered; empty for everywhere.
        twin: words of the `cloister` command that does the same, capitals standing for values; empty for what
            changes the view alone.
        calls: methods of the admin API behind it; empty for what changes the view alone.
        shows: the page it switches to.
    """

    id: str
    keys: tuple[str, ...]
    title: str
    hint: str = ""
    pages: tuple[Page, ...] = ()
    twin: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    shows: Page | None = None

    @property
    def key(self) -> str:
        """The key as people read it."""
        return _SHOWN.get(self.keys[0], self.keys[0])

    @property
    def changes(self) -> bool:
        """It changes something on the appliance."""
        return self.key.isupper() and len(self.key) == 1 and bool(self.calls)

    @property
    def command(self) -> str:
        """The twin as one would type it."""
        return " ".join(("cloister", *self.twin)) if self.twin else ""

    def offered(self, page: Page) -> bool:
        """It can be done on `page`."""
        return not self.pages or page in self.pages


_SHOWN = {
    "slash": "/",
    "colon": ":",
    "question_mark": "?",
    "escape": "esc",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
}
_ADMIN = "/cloister.admin.v1."
_MODELS, _TENANTS, _AUDIT = (Page.MODELS,), (Page.TENANTS,), (Page.AUDIT,)

ACTIONS: tuple[Action, ...] = (
    Action(
        "page.dashboard", ("1",), "Dashboard", twin=("status",),
        calls=(_ADMIN + "SystemService/GetStatus",), shows=Page.DASHBOARD,
    ),
    Action(
        "page.tenants", ("2",), "Tenants: limits, tokens, models, keys", twin=("tenant", "list"),
        calls=(_ADMIN + "TenantService/ListTenants",), shows=Page.TENANTS,
    ),
    Action(
        "page.models", ("3",), "Models: versions, deployments, imports", twin=("bundle", "list"),
        calls=(_ADMIN + "ModelService/ListModelVersions", _ADMIN + "ModelService/ListImports"), shows=Page.MODELS,
    ),
    Action(
        "page.audit", ("5",), "Audit: the log, newest first", twin=("audit", "query"),
        calls=(_ADMIN + "AuditService/QueryAudit",), shows=Page.AUDIT,
    ),
    Action("detail", ("enter",), "Open the chosen row; again: full screen", "open"),
    Action(
        "tenant.keys", ("i",), "Keys of the chosen tenant, in its detail", "keys", _TENANTS,
        ("key", "list", "--tenant", "TENANT"), (_ADMIN + "TenantService/ListKeys",),
    ),
    Action(
        "model.aliases", ("a",), "Aliases of the chosen version, in detail", "aliases", _MODELS,
        ("alias", "list"), (_ADMIN + "ModelService/ListAliases",),
    ),
    Action(
        "model.import", ("I",), "Import a bundle, join, name a volume",
        "import", _MODELS, ("bundle", "import", "BUNDLE"),
        (_ADMIN + "ModelService/ImportBundle", _ADMIN + "ModelService/OfferVolume"),
    ),
    Action(
        "audit.filter", ("slash",), "Filter by kind, tenant, actor and more", "filter", _AUDIT,
        ("audit", "query", "--kind", "PREFIX"), (_ADMIN + "AuditService/QueryAudit",),
    ),
    Action(
        "audit.older", ("n",), "Next page: older records", "older", _AUDIT,
        ("audit", "query", "--before", "SEQ"), (_ADMIN + "AuditService/QueryAudit",),
    ),
    Action(
        "audit.newer", ("p",), "Previous page: newer records", "newer", _AUDIT,
        ("audit", "query", "-n", "COUNT"), (_ADMIN + "AuditService/QueryAudit",),
    ),
    Action(
        "audit.verify", ("v",), "Verify every record of the log", "verify", _AUDIT,
        ("audit", "verify"), (_ADMIN + "AuditService/VerifyAudit",),
    ),
    Action(
        "refresh", ("r",), "Ask again now", "", (), ("status",), (_ADMIN + "SystemService/GetStatus",)
    ),
    Action("sort", ("s",), "Sort by the next column, up, then down", "sort"),
    Action("freeze", ("space",), "Freeze the rows; again: go on", "freeze"),
    Action("focus", ("tab",), "Next table"),
    Action("palette", ("colon",), "Find a command by its name", "commands"),
    Action("help", ("question_mark",), "This help", "help"),
    Action("back", ("escape",), "Back, in the end to the dashboard"),
    Action("quit", ("q", "ctrl+c", "ctrl+q"), "Quit; what runs, runs on", "quit"),
)  # fmt: skip

MOVES = "arrows or j k move, g G go to the first and last row, PgUp PgDn by pages"


def action(name: str) -> Action:
    """The action called `name`.

    Raises:
        KeyError: there is none.
    """
    return {a.id: a for a in ACTIONS}[name]


def offered(page: Page) -> tuple[Action, ...]:
    """What can be done on `page`, in the order of the table."""
    return tuple(a for a in ACTIONS if a.offered(page))


def keys_as_text() -> str:
    """The table for `cloister console --keys`: per key what it does, and the command that does the same."""
    lines = []
    for heading, chosen in _sections():
        lines += [heading, *(f"  {a.key:<6} {a.title:<42}  {a.command}".rstrip() for a in chosen), ""]
    return "\n".join([*lines, MOVES])


def _sections() -> tuple[tuple[str, tuple[Action, ...]], ...]:
    everywhere = ("everywhere", tuple(a for a in ACTIONS if not a.pages))
    return (everywhere, *((page.value, tuple(a for a in ACTIONS if page in a.pages)) for page in Page))
