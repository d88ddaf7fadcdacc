"""A driver that keeps what is painted: the very bytes that a terminal would get."""

from typing import Any

from textual.drivers.headless_driver import HeadlessDriver


class PaintingDriver(HeadlessDriver):
    """Paints into `painted`."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, **options)
        self.painted = ""

    @property
    def is_headless(self) -> bool:
        return False

    def write(self, data: str) -> None:
        self.painted += data

    def taken(self) -> bytes:
        """What was painted since this was asked last."""
        data, self.painted = self.painted, ""
        return data.encode()


def painted(app: Any) -> bytes:
    """What the app's driver painted since this was asked last."""
    driver = app._driver
    assert isinstance(driver, PaintingDriver)
    return driver.taken()
