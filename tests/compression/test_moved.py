"""Names that moved are still found where they were, and say where they are now."""

from __future__ import annotations

import pytest


def test_what_moved_is_the_same_and_is_told_of() -> None:
    from smartmops import base
    from smartmops.compression import base as before

    with pytest.warns(DeprecationWarning, match=r"smartmops\.base\.load_base: import it from there"):
        assert before.load_base is base.load_base
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        before.nothing  # noqa: B018
