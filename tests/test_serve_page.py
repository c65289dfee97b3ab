"""The page in a real browser: a person draws, races, and finds the picture in the gallery."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bozzetto import load
from bozzetto.checkpoints.own_sampling import OwnSampling
from serving import Live, live

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser (chromium, google-chrome) is installed")
KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Live]:
    with live({"tiny": load(tiny_model)}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Live) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda line: errors.append(line.text) if "Content Security" in line.text else None)
    opened.goto(server.url)
    sync_api.expect(opened.locator("#state")).to_have_text("ready")
    yield opened
    assert not errors
    opened.close()


def test_draw_shows_the_picture_its_figures_and_the_gallery(page: Any) -> None:
    page.select_option("#class", "tulip")
    page.fill("#seed", "7")
    page.click("#draw")
    sync_api.expect(page.locator("#gallery a")).to_have_count(1, timeout=20000)
    assert page.locator("#left .picture").get_attribute("alt") == "tulip, seed 7"
    assert "tokens per pass" in page.locator("#left .figures").inner_text()
    link = page.locator("#gallery a")
    assert link.get_attribute("download") == "tiny-tulip-7.png"
    assert link.get_attribute("href").startswith("data:image/png;base64,")
    assert page.locator("#legend").is_visible() and not page.locator("#right").is_visible()


def test_race_draws_both_and_says_that_they_are_equal(page: Any) -> None:
    page.click("#race")
    sync_api.expect(page.locator("#replay")).to_be_visible(timeout=30000)
    assert "equal, byte for byte" in page.locator("#verdict").inner_text()
    assert page.locator("#left h2").inner_text() == "sequential"
    assert page.locator("#right h2").inner_text() == "speculative"
    assert page.locator(".lane.won").count() == 1 and "medians of 3 rounds" in page.locator("#verdict").inner_text()
    page.click("#replay")
    for lane in ("#left", "#right"):
        sync_api.expect(page.locator(f"{lane} progress")).to_have_js_property("value", 1, timeout=20000)


def test_several_pictures_of_a_seed_are_collected_as_the_command_draws_them(page: Any, tiny_model: Path) -> None:
    page.select_option("#class", "tulip")
    page.fill("#seed", "7")
    page.fill("#count", "3")
    page.click("#draw")
    sync_api.expect(page.locator("#gallery a")).to_have_count(3, timeout=20000)
    sync_api.expect(page.locator("#left .figures")).to_contain_text("3 of 3 pictures")
    links = page.locator("#gallery a").all()
    found = {link.get_attribute("download"): png(link.get_attribute("href")) for link in links}
    drawn = load(tiny_model).generate(["tulip"] * 3, seed=7, batch=1).images
    names = ("tiny-tulip-7.png", "tiny-tulip-7-1.png", "tiny-tulip-7-2.png")
    assert found == {name: image.image.tobytes() for name, image in zip(names, drawn, strict=True)}
    assert not page.locator("#left .map").is_visible()


def test_rules_follow_the_drafter_and_lossy_ones_say_so(page: Any) -> None:
    assert page.locator("#rule").is_disabled()
    page.select_option("#drafter", "jacobi")
    assert "nothing has to be trained" in page.locator("#about-drafter").inner_text()
    page.select_option("#rule", "lantern++")
    assert "Lossy" in page.locator("#exactness").inner_text()
    assert "lambda" in page.locator("#about-rule").inner_text()
    page.select_option("#rule", "exact")
    assert "Exact" in page.locator("#exactness").inner_text()


def test_empty_fields_are_the_models_own_values_and_filled_ones_arrive(browser: Any, tiny_model: Path) -> None:
    pipe = load(tiny_model)
    pipe.own = OwnSampling(3.5, 0.8, 7, 0.9, source="a paper")
    with live({"tiny": pipe}) as running:
        page = browser.new_page()
        page.goto(running.url)
        sync_api.expect(page.locator("#state")).to_have_text("ready")
        page.click("#more")
        shown = {
            name: page.get_attribute(f"#{name}", "placeholder")
            for name in ("guidance", "temperature", "top_k", "top_p")
        }
        assert shown == {"guidance": "3.5", "temperature": "0.8", "top_k": "7", "top_p": "0.9"}
        assert "a paper" in page.locator("#own").inner_text() and not page.locator("#negative-label").is_visible()
        for field, law in (("", {}), ("guidance", {"guidance": 1.5}), ("top_k", {"top_k": 0})):
            if field:
                page.fill(f"#{field}", str(next(iter(law.values()))))
            page.click("#draw")
            wanted = pipe.generate(["daisy"], seed=1, batch=1, **law).images[0]
            sync_api.expect(page.locator("#gallery a")).not_to_have_count(0, timeout=20000)
            sync_api.expect(page.locator("#draw")).to_be_enabled(timeout=20000)
            assert png(page.locator("#left .picture").get_attribute("src")) == wanted.image.tobytes()
            if field:
                page.fill(f"#{field}", "")
        page.close()


def png(link: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).convert("RGB").tobytes()


def test_what_the_server_refuses_is_shown(page: Any) -> None:
    page.evaluate("document.getElementById('seed').max = 1e30")
    page.fill("#seed", "99999999999999999999")
    page.click("#draw")
    sync_api.expect(page.locator("#error")).to_contain_text("seed", timeout=10000)


def test_everything_can_be_done_with_the_keyboard(page: Any) -> None:
    page.focus("#model")
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [name for name in reached if name] == [
        "class",
        "seed",
        "dice",
        "guidance",
        "count",
        "more",
        "drafter",
        "draw",
        "race",
    ]
    page.focus("#seed")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#gallery a")).to_have_count(1, timeout=20000)


def test_a_phone_needs_no_scrolling_sideways(browser: Any, server: Live) -> None:
    phone = browser.new_page(viewport={"width": 360, "height": 740})
    phone.goto(server.url)
    sync_api.expect(phone.locator("#state")).to_have_text("ready")
    phone.click("#race")
    sync_api.expect(phone.locator("#replay")).to_be_visible(timeout=30000)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    phone.close()


def test_a_server_with_keys_asks_the_visitor_for_one(browser: Any, tiny_model: Path) -> None:
    with live({"tiny": load(tiny_model)}, keys=(KEY,)) as guarded:
        page = browser.new_page()
        page.goto(guarded.url)
        sync_api.expect(page.locator("#key")).to_be_visible(timeout=10000)
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        sync_api.expect(page.locator("#state")).to_have_text("ready")
        page.click("#draw")
        sync_api.expect(page.locator("#gallery a")).to_have_count(1, timeout=20000)
        page.close()
