"""`python -m tests.faults.impatient ...`: `cloister ...`, whose processes may be silent for a few seconds only.

`cloister.toml` does not allow so little, as on a busy machine it would hit the innocent; tests/mercy spares them.
"""

import sys
from dataclasses import replace

from appliance.cli import serve
from appliance.cli.main import main
from appliance.processes import ProcessSpec
from appliance.settings import Settings

HEARD_WITHIN_S = 2
table = serve.table


def impatient(settings: Settings) -> tuple[ProcessSpec, ...]:
    """The table of processes, engine-host's own limit for its processes included."""
    option = "--heard-within="
    return tuple(
        replace(
            spec,
            heard_within=HEARD_WITHIN_S,
            arguments=tuple(f"{option}{HEARD_WITHIN_S}" if a.startswith(option) else a for a in spec.arguments),
        )
        for spec in table(settings)
    )


if __name__ == "__main__":
    serve.table = impatient
    sys.exit(main())
