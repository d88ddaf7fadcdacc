"""`cloister trust`: keys, the root of trust over them, revocations, approvals; no daemon but for a bare show."""

import argparse

from appliance.cli import trust_approve, trust_init, trust_revoke, trust_rotate, trust_show


def register(parser: argparse.ArgumentParser) -> None:
    """The verbs of `cloister trust`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for part in (trust_init, trust_show, trust_rotate, trust_revoke, trust_approve):
        part.register_verbs(verbs)
