"""What the audit page says of a record, also of one that somebody changed behind control's back."""

import pytest

from admin_tui.state import AuditPage, State
from admin_tui.views import audit
from appliance.protos import admin_pb2
from tests.admin_tui.fake import record


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            '{"arguments":{"max_concurrent":9,"name":"ward"},"method":"/cloister.admin.v1.T/SetTenant"}',
            "SetTenant ward",
        ),
        ('{"arguments":{"application":"a","tenant":"ward"},"method":"/s/IssueKey"}', "IssueKey ward"),
        ('{"model":"notes","parameters":{}}', "notes"),
        ('{"uid":0}', ""),
    ],
)
def test_a_record_is_about_its_method_and_the_name_it_was_given_or_else_its_model(facts: str, words: str) -> None:
    assert audit.what(f'{{"facts":{facts}}}') == words


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "1", '{"facts":3}', '{"facts":{"method":7}}', '{"facts":{"arguments":[1]}}', "[" * 10**5],
)
def test_a_body_that_is_no_record_breaks_nothing(body: str) -> None:
    changed = record(1)
    changed.body_json = body
    page = AuditPage(admin_pb2.QueryAuditRequest(), admin_pb2.QueryAuditResponse(records=[changed], log_size=1))
    state = State(audit=page)
    assert audit.rows(state)[0].cells[-2].text == "-"
    assert audit.detail(state, "1")


def test_who_is_the_operator_or_the_application_of_a_tenant() -> None:
    request = record(1, actor="spiffe://ward/tenant/ward-notes/app/summary", tenant="ward-notes")
    page = AuditPage(admin_pb2.QueryAuditRequest(), admin_pb2.QueryAuditResponse(records=[request, record(2)]))
    assert [row.cells[4].text for row in audit.rows(State(audit=page))] == ["ward-notes/summary", "alice"]
