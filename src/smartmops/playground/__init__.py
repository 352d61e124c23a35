"""The page at `/` of the server: one file without build step, which needs no network. Knows no model, no HTTP."""

from pathlib import Path


def page(most: int) -> str:
    """The page's HTML; it finds out what is served by asking `/v1/models`.

    Args:
        most: Tokens that the server lets one answer have, which the page asks for too unless told otherwise.
    """
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8").replace("MOST", str(most))
