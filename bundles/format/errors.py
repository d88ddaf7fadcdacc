"""The one error of the bundle format: why a bundle is refused."""


class BundleError(Exception):
    """A bundle, or something meant to become one, is refused.

    Attributes:
        code: stable, UPPER_SNAKE_CASE; programs switch on it. All are listed in docs/bundle-format.md.
        message: what was wrong, where, and what to do.
        exit_status: of a command line that ends with it.
    """

    exit_status = 3

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
