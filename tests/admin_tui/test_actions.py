"""The table of actions holds against the command line, the policy and itself."""

from typing import get_type_hints

import pytest

from admin_tui.actions import ACTIONS, Action, Page, keys_as_text, offered
from admin_tui.port import AdminPort, Port
from appliance import policy
from appliance.cli.main import build_parser

VALUES = {
    "TENANT": "ward-notes",
    "BUNDLE": "/media/usb0/a.bundle",
    "COUNT": "20",
    "SEQ": "151",
    "PREFIX": "operator.",
}
VIEW_ALONE = {"detail", "sort", "freeze", "focus", "palette", "help", "back", "quit"}
ASKING = [a for a in ACTIONS if a.id not in VIEW_ALONE]


@pytest.mark.parametrize("asked", ASKING, ids=lambda a: a.id)
def test_an_action_that_asks_the_appliance_has_a_twin_that_the_command_line_takes(asked: Action) -> None:
    words = [VALUES.get(word, word) for word in asked.twin]
    assert words, f"{asked.id} has no twin on the command line"
    args = build_parser(words[0]).parse_args(words)
    assert callable(args.run)


@pytest.mark.parametrize("asked", ASKING, ids=lambda a: a.id)
def test_an_action_that_asks_the_appliance_calls_what_the_policy_allows_operators(asked: Action) -> None:
    assert asked.calls
    for method in asked.calls:
        assert policy.rule_for(method, policy.Audience.OPERATOR)


def test_what_changes_the_view_alone_calls_nothing() -> None:
    assert all(not a.calls and not a.twin for a in ACTIONS if a.id in VIEW_ALONE)


def test_capital_letters_change_something_and_nothing_else_does() -> None:
    for asked in ASKING:
        changes = any(policy.TABLE[m].audit is policy.AuditClass.CHANGE for m in asked.calls)
        assert changes == asked.key.isupper() == asked.changes, asked.id


@pytest.mark.parametrize("page", list(Page))
def test_no_key_means_two_things_on_one_page(page: Page) -> None:
    keys = [key for a in offered(page) for key in a.keys]
    assert len(keys) == len(set(keys))


def test_every_call_of_the_port_is_behind_an_action(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """The port is asked for everything over a channel that notes the methods' names and answers nothing."""
    called: set[str] = set()

    class Stub:
        def __init__(self, service: str) -> None:
            self._service = service

        def __getattr__(self, method: str) -> object:
            def call(request: object, timeout: float | None = None) -> object:
                called.add(f"/cloister.admin.v1.{self._service}/{method}")
                raise StopIteration

            return call

    class Admin:
        system, models = Stub("SystemService"), Stub("ModelService")
        tenants, audit = Stub("TenantService"), Stub("AuditService")

    monkeypatch.setattr("admin_tui.port.AdminClient", lambda home: Admin())
    port = AdminPort(tmp_path)  # type: ignore[arg-type]  # never opened
    for name in (n for n in vars(Port) if not n.startswith("_") and n != "close"):
        takes = [n for n in get_type_hints(getattr(Port, name)) if n != "return"]
        with pytest.raises(StopIteration):
            getattr(port, name)(*["/x" for _ in takes])
    assert called == {method for a in ACTIONS for method in a.calls}


def test_the_keys_are_told_without_a_terminal() -> None:
    text = keys_as_text()
    for a in ACTIONS:
        assert a.title in text
        assert a.command in text
