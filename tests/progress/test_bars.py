"""Without a terminal, work that takes long says a line now and then; short work says nothing, not even blank lines."""

from __future__ import annotations

import pytest

from smartmops.progress import bars


@pytest.mark.parametrize(("seconds", "said"), [
    (1.0, []), (20.0, ["reading: 2 of 6, 1 min 20 s left", "reading: 4 of 6, 40 s left"]),
])  # fmt: skip
def test_a_line_now_and_then(
    seconds: float, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    found = []
    for item in bars.track("abcdef", "reading"):
        found.append(item)
        now[0] += seconds
    assert found == list("abcdef") and capsys.readouterr().out.splitlines() == said
    assert list(bars.track([1], "reading", shown=False)) == [1]


def test_a_duration_is_said_as_people_say_it() -> None:
    assert [bars.duration(each) for each in (12.4, 200.0, 7500.0)] == ["12 s", "3 min 20 s", "2 h 5 min"]
