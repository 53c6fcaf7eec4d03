"""The demo page in a real, headless Chromium: `make test-browser`."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.predict import Voters
from tests.chromium import open_chromium
from tests.server import Server, bomb
from trainables.data.share import open_run_data
from trainables.data.splits import load_splits

pytestmark = pytest.mark.browser
PATIENCE = 120  # seconds that a page may take on a busy machine


class Page:
    """A tab of Chromium that looks at the demo."""

    def __init__(self, address: str, profile: Path) -> None:
        self.driver = open_chromium(profile, performance="ALL")
        self.driver.set_page_load_timeout(PATIENCE)
        self.driver.set_window_size(1200, 900)
        self.driver.get(address)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.time() + PATIENCE
        while not condition():
            assert time.time() < end, f"{what}; the page says:\n{self.text('body')}"
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        return self.driver.execute_script(f"return document.querySelector({selector!r})?.innerText ?? ''")

    def click_tab(self, name: str) -> None:
        def click() -> bool:
            script = """
                const tabs = [...document.querySelectorAll('button[role=tab]')];
                const tab = tabs.find(button => button.innerText.trim() == arguments[0]);
                if (tab) tab.click();
                return Boolean(tab)
            """
            return bool(self.driver.execute_script(script, name))

        self.wait_for(click, f"there is no tab {name}")

    def upload(self, path: Path) -> None:
        """As a person who chooses a file; the picture that was there before is taken away first."""
        clear = 'document.querySelector(\'#upload button[aria-label="Clear"], #upload button[title="Clear"]\')'
        self.driver.execute_script(f"{clear}?.click()")
        file = "#upload input[type=file]"
        self.wait_for(lambda: bool(self.driver.find_elements("css selector", file)), "there is no upload")
        self.driver.find_element("css selector", file).send_keys(str(path))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requested(self) -> set[str]:
        """Every address that the page has asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


@pytest.fixture(scope="module")
def server(small_run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(small_run, tmp_path_factory.mktemp("temporary"), "--most-mib", "2") as server:
        yield server
        assert server.process.poll() is None, "it stayed up"
        server.stop()


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[Page]:
    page = Page(server.address, tmp_path / "profile")
    yield page
    page.driver.quit()


def test_an_uploaded_picture_is_answered_without_a_network(page: Page, pictures: Path, small_run: UPath) -> None:
    path = pictures / "test/grid/0.png"
    page.upload(path)
    page.wait_for(lambda: "Votes:" in page.text("#own-answer"), "no answer came")
    voters = Voters.load([small_run], read_ensemble(small_run), "cpu")
    votes = voters.votes(np.asarray(Image.open(path))[None])
    probs = voters.ensemble.predict(votes)[0]
    assert page.text("#own-answer .nf-label").split()[0] == voters.classes[int(probs.argmax())]
    shown = [line.split() for line in page.text("#own-answer .nf-bars").splitlines() if line.strip()]
    bars = page.driver.execute_script(
        "return [...document.querySelectorAll('#own-answer .nf-bars tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert len(shown) >= 3
    assert {name: float(p.rstrip("%")) for name, _, p in bars} == pytest.approx(
        {name: 100 * float(p) for name, p in zip(voters.classes, probs, strict=True)}, abs=0.11
    )
    said = page.driver.execute_script(
        "return [...document.querySelectorAll('#own-answer .nf-votes tbody tr')].map(r => r.cells[1].innerText)"
    )
    assert [row.split()[1] for row in said] == [voters.classes[int(vote[0].argmax())] for vote in votes]
    assert page.errors() == []
    own = (page.driver.current_url, "data:", "blob:", "chrome:")
    assert {url for url in page.requested() if not url.startswith(own)} == set(), "nothing comes from elsewhere"


def test_bad_uploads_are_refused_in_words(page: Page, tmp_path: Path) -> None:
    for name, content, expected in (
        ("bomb.png", bomb(), "100,000,000 pixels, expected at most"),
        ("text.png", b"just some text", "not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        page.upload(tmp_path / name)
        page.wait_for(lambda expected=expected: expected in page.text("#own-answer [role=alert]"), f"{name} unnoticed")
    assert page.errors() == []


def test_the_slider_shows_the_select_split_with_true_labels(page: Page, small_run: UPath) -> None:
    page.click_tab("Select split")
    data = open_run_data(small_run)[0]
    select = load_splits(small_run).select
    for index in (0, 5, len(select) - 1):
        script = """
            const input = document.querySelector('#index input[type=range]');
            input.value = arguments[0];
            input.dispatchEvent(new Event('input', {bubbles: true}));
        """
        page.wait_for(lambda: bool(page.driver.find_elements("css selector", "#index input[type=range]")), "no slider")
        page.driver.execute_script(script, index)
        truth = data.classes[int(data.labels[select[index]])]
        alt = "document.querySelector('#example img')?.alt ?? ''"
        page.wait_for(
            lambda alt=alt, index=index: page.driver.execute_script(f"return {alt}").startswith(f"image {index} "),
            f"image {index} was not shown",
        )
        assert page.driver.execute_script(f"return {alt}") == f"image {index} of the select split: {truth}"
        page.wait_for(
            lambda truth=truth: f"true label: {truth}" in page.text("#example-answer"), f"no answer to image {index}"
        )
    assert page.errors() == []


def test_a_token_opens_the_page(small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    """The address that --token prints leads to a page that works, and that no longer shows the token."""
    (tmp_path / "uploads").mkdir()
    with Server(small_run, tmp_path / "uploads", "--token", "a secret") as server:
        assert server.process.stdout is not None
        address = next(word for word in server.process.stdout.readline().split() if word.startswith("http://"))
        assert address == f"{server.address}/?token=a%20secret"
        page = Page(address, tmp_path / "profile")
        try:
            assert page.driver.current_url == f"{server.address}/"
            page.upload(pictures / "test/grid/0.png")
            page.wait_for(lambda: "Votes:" in page.text("#own-answer"), "no answer came")
            assert page.errors() == []
            page.driver.delete_all_cookies()
            page.driver.get(server.address)
            assert "needs a token" in page.text("body")
        finally:
            page.driver.quit()
