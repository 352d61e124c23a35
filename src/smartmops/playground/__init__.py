"""The page at `/` of the server: one file without build step, which needs no network. Knows no model, no HTTP."""

from pathlib import Path


def page() -> str:
    """The page's HTML; it finds out what is served by asking `/v1/models`."""
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
