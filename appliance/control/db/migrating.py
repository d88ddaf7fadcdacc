"""Brings control.db to the newest revision with Alembic; loaded only for a file that has not got it."""

import logging
from pathlib import Path

import grpc
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from appliance.errors import CloisterError

logging.getLogger("alembic").setLevel(logging.WARNING)

_MIGRATIONS = Path(__file__).with_name("migrations")


def scripts() -> ScriptDirectory:
    """All revisions that this program knows."""
    return ScriptDirectory.from_config(_config())


def migrate(connection: Connection) -> None:
    """Run what is missing, in the transaction of `connection`.

    Raises:
        CloisterError: DATABASE_REVISION_UNKNOWN, a newer or foreign program wrote the file.
    """
    known = {script.revision for script in scripts().walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise CloisterError(
            "DATABASE_REVISION_UNKNOWN",
            f"control.db has revision {current}, unknown to this program; start the newer one that wrote it",
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
