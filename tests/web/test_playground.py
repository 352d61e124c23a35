"""The playground in headless Chromium, over a real server: it streams, shows who answered, and its sliders move the gate."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smartmops.playground import page
from smartmops.serving.answering import Answerer

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")

from served import post, serving  # noqa: E402

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    shown = page(512)
    assert "http://" not in shown and "https://" not in shown and "//cdn" not in shown


@pytest.mark.parametrize("most", [1, 64, 512])
def test_it_asks_for_as_many_tokens_as_the_server_gives(most: int) -> None:
    [field] = re.findall('<input id="tokens"[^>]*>', page(most))
    assert f'max="{most}"' in field and f'value="{most}"' in field and "MOST" not in page(most)


@pytest.fixture(scope="module")
def url(answerer: Answerer) -> Iterator[str]:
    with serving(answerer) as found:
        yield found.url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Any, url: str, **how: Any) -> Any:
    shown = chromium.new_page(**how)
    shown.set_default_timeout(600_000)
    shown.errors = []
    shown.on("pageerror", lambda error: shown.errors.append(str(error)))
    shown.goto(url)
    shown.wait_for_selector("#hand input[type=range]")
    return shown


def asked(shown: Any) -> None:
    shown.fill("#text", "apple number 3.")
    shown.fill("#tokens", "8")
    shown.click("button")
    for name in ("auto", "base", "pinned", "hand"):
        shown.wait_for_selector(f"#{name} .said[data-state=done]")


def said(shown: Any, name: str) -> str:
    found: str = shown.inner_text(f"#{name} .said").strip()
    return found


def alone(url: str, body: dict[str, Any]) -> str:

    asked = {"model": "auto", "messages": [{"role": "user", "content": "apple number 3."}], "max_tokens": 8}
    found: str = post(f"{url}/v1/chat/completions", json=asked | body).json()["choices"][0]["message"]["content"]
    return found.strip()


def test_all_sides_answer_and_a_slider_changes_the_answer(chromium: Any, url: str) -> None:
    shown = opened(chromium, url)
    asked(shown)
    assert said(shown, "auto") == alone(url, {}) and said(shown, "base") == alone(url, {"model": "base"})
    assert said(shown, "pinned") == alone(url, {"model": "apple"})
    assert shown.locator("#auto .bar").count() == 3 and shown.locator("#hand .bar").count() == 2
    answers = []
    for apple, banana in ((100, 0), (0, 100)):
        for name, value in (("apple", apple), ("banana", banana)):
            slider = shown.locator(f"#hand input[aria-label='share of {name}']")
            slider.fill(str(value))
            slider.dispatch_event("change")
        shown.wait_for_selector("#hand .said[data-state=done]")
        answers.append(said(shown, "hand"))
        assert answers[-1] == alone(url, {"gate_weights": {"apple": apple / 100, "banana": banana / 100}})
    assert answers[0] != answers[1] and shown.errors == []
    shown.close()


def test_each_expert_shows_its_tasks(chromium: Any, url: str, answerer: Answerer) -> None:
    shown = opened(chromium, url)
    cards = shown.locator("#tasks .card")
    assert cards.locator("h3").all_inner_texts() == list(answerer.experts)
    for at, name in enumerate(answerer.experts):
        (task, share), *_ = answerer.tasks[name].items()
        assert cards.nth(at).locator(".bar").first.inner_text().split() == [task, f"{share:.2f}"]
    assert shown.errors == []
    shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(chromium: Any, url: str, scheme: str) -> None:
    shown = opened(chromium, url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    asked(shown)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out sideways"
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 23, 29)"}[scheme]
    if folder := os.environ.get("PLAYGROUND_SCREENSHOTS"):  # for whoever wants to look
        shown.screenshot(path=Path(folder) / f"phone-{scheme}.png", full_page=True)
        shown.set_viewport_size({"width": 1280, "height": 800})
        shown.screenshot(path=Path(folder) / f"wide-{scheme}.png", full_page=True)
    assert shown.errors == []
    shown.close()
