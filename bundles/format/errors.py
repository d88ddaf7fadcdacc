"""The one error of the bundle format: why a bundle is refused, and the exit status each refusal has."""

FAILED, BAD_USAGE, REFUSED = 1, 2, 3

# Everything else is verification, policy or tampering, and REFUSED: so is a code that this version does not know.
_FAILED = frozenset(
    {
        "SOURCE_UNREADABLE",
        "SOURCE_NOT_FILE",
        "SOURCE_CHANGED",
        "KEY_UNREADABLE",
        "SIGNER_FAILED",
        "CERTIFICATE_UNREADABLE",
        "ROOT_UNREADABLE",
        "RECORD_UNREADABLE",
        "STORE_SPACE",
        "STORE_IO",
        "STAGING_DAMAGED",
        "SCRUB_FAILED",
        "LEDGER_NEWER",
        "INTERRUPTED",
        "PREPARE_FAILED",
        "DISK_FULL",
        "OUT_OF_MEMORY",
        "STOPPING",
        "IMPORT_CANCELLED",
        "IMPORT_RUNNING",
        "IMPORTS_TOO_MANY",
        "IMPORT_NOT_FOUND",
        "IMPORT_INCOMPLETE",
        "VOLUME_NOT_WANTED",
        "MODEL_VERSION_NOT_FOUND",
        "INTERNAL",
    }
)
_BAD_USAGE = frozenset(
    {"RELEASE_INVALID", "ALREADY_SIGNED", "OUTPUT_EXISTS", "PATH_NOT_ABSOLUTE", "CALIBRATION_MISSING"}
)


def exit_status_of(code: str) -> int:
    """The exit status of a command line that ends with `code`: 1 failed, 2 bad usage, 3 refused."""
    if code in _FAILED:
        return FAILED
    return BAD_USAGE if code in _BAD_USAGE else REFUSED


class BundleError(Exception):
    """A bundle, or something meant to become one, is refused.

    Attributes:
        code: stable, UPPER_SNAKE_CASE; programs switch on it. All are listed in docs/bundle-format.md.
        message: what was wrong, where, and what to do.
        exit_status: of a command line that ends with it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.exit_status = exit_status_of(code)
