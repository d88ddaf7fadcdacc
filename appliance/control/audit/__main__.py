"""`python -m appliance.control.audit DB HEAD PUB`: verify a log from its files; one JSON object, exit 0 or 3.

It stands alone: no home directory, no process, no session. The command line runs it for `audit verify --file`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from appliance.control.audit.head import load_public_key
from appliance.control.audit.verification import verify


def main() -> int:
    """Verify; 0 when the log is intact, 3 when it is not, 2 when the key file is no key."""
    parser = argparse.ArgumentParser(prog="python -m appliance.control.audit", description=__doc__)
    parser.add_argument("db", type=Path, help="audit.db")
    parser.add_argument("head", type=Path, help="audit.head")
    parser.add_argument("key", type=Path, help="public key of the log: verifier key (name+id+base64) or PEM")
    args = parser.parse_args()
    try:
        key = load_public_key(args.key)
    except (OSError, ValueError) as error:
        print(f"no public key: {error}", file=sys.stderr)
        return 2
    verdict = verify(args.db, args.head, key)
    print(json.dumps({**asdict(verdict), "root": verdict.root.hex()}))
    return 0 if verdict.intact else 3


if __name__ == "__main__":
    sys.exit(main())
