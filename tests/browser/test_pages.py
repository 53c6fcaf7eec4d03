"""The pages in a real, headless Chromium: no console errors, figures are drawn, a click on a point shows its trial."""

import json
import shutil
import time
from pathlib import Path

import pytest

from ensemble.file import read_ensemble, write_ensemble
from ensemble.report.write import write_report
from ensemble.select import Select, choose
from tests.chromium import open_chromium
from tests.ensemble.test_report import HOSTILE
from tests.ensemble.test_select import make_run
from tests.small_run import doubt_first, train_run
from trainables.config import TrialConfig
from trainables.explore.__main__ import Explore, explore
from trainables.run_directory import CandidateInfo, write_candidate
from trainables.storage import read_json, write_json

pytestmark = pytest.mark.browser

PATIENCE = 60  # seconds that a page may take on a busy machine
PHONE, DESKTOP = 390, 1280


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures_with_val):
    return (*train_run(tmp_path_factory.mktemp("runs") / "stripes", pictures_with_val), pictures_with_val)


@pytest.fixture(scope="module")
def unsure(tmp_path_factory, pictures):
    """A run whose models doubt a label."""
    run, _ = train_run(tmp_path_factory.mktemp("runs") / "unsure", pictures, trials=2)
    doubt_first(run)
    return run


@pytest.fixture(scope="module")
def report(trained) -> Path:
    run, ensemble, _ = trained
    write_report([run], ensemble)
    return Path(str(run / "report.html"))


def show(browser, page: Path, width: int = DESKTOP, scheme: str = "light") -> None:
    """Open a page and scroll through it, so that every figure is drawn; fails on whatever the console complains of."""
    phone = width == PHONE
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    wait_until(lambda: browser.execute_script("return document.readyState") == "complete")
    plots = browser.find_elements("css selector", "main .plot")
    for plot in plots:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
        wait_until(lambda plot=plot: "drawn" in plot.get_attribute("class"))
    assert plots
    assert no_complaints(browser)


def no_complaints(browser) -> bool:
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not complaints
    return True


def wait_until(condition) -> None:
    end = time.time() + PATIENCE
    while not condition():
        assert time.time() < end, "the page did not get that far"
        time.sleep(0.05)


def click(browser, element, right: float = 0, down: float = 0) -> None:
    """As a mouse would: move there, so many pixels from the element's middle, then press."""
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    time.sleep(0.3)  # plotly learns of the new place of its figure by an event
    ActionChains(browser).move_to_element_with_offset(element, right, down).pause(0.2).click().perform()


def points(browser, section: str) -> list[tuple]:
    """(figure, trial id, pixels right of and below its middle) of every point in a section that is a trial."""
    return browser.execute_script(
        """
        const found = [];
        for (const figure of document.querySelectorAll(`#${arguments[0]} .js-plotly-plot`)) {
          const box = figure.getBoundingClientRect();
          for (const points of figure.calcdata) {
            const {trace} = points[0];
            if (trace.type !== "scatter") continue;
            const [x, y] = [trace.xaxis, trace.yaxis].map(id => figure._fullLayout[id.replace(/^(.)/, "$1axis")]);
            for (const point of points) {
              const id = (trace.customdata || [])[point.i];
              if (typeof id !== "string" || !Number.isFinite(point.y)) continue;
              const [right, down] = [x._offset + x.c2p(point.x), y._offset + y.c2p(point.y)];
              found.push([figure, id, right - box.width / 2, down - box.height / 2]);
            }
          }
        }
        return found;
        """,
        section,
    )


def shown_trial(browser) -> str:
    """The text of the trial that has opened; closes it again."""
    dialog = browser.find_element("id", "trial")
    wait_until(lambda: dialog.get_attribute("open"))
    text = dialog.text.removeprefix("×").strip()
    dialog.find_element("css selector", ".close").click()
    wait_until(lambda: not dialog.get_attribute("open"))
    return text


def test_the_report_is_drawn_and_fetches_nothing(browser, report):
    show(browser, report)
    assert len(browser.find_elements("css selector", ".plot.drawn .main-svg")) >= 8
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)"
                                  ".filter(name => !name.startsWith('data:'))") == []  # fmt: skip
    broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
    wait_until(lambda: browser.execute_script(broken) == 0)


@pytest.mark.parametrize(("section", "count"), [("picture", 3), ("curves", 12), ("study", 3)])
def test_a_click_on_a_point_shows_its_trial(browser, report, section, count):
    show(browser, report)
    found = points(browser, section)
    assert len(found) >= count
    for figure, id, right, down in found[:: max(1, len(found) // 3)]:
        near = [o[1] for o in found if o[0] == figure and abs(o[2] - right) + abs(o[3] - down) <= 20]
        assert id in near
        click(browser, figure, right, down)
        text = shown_trial(browser)
        assert text.startswith(tuple(f"{one} speednet" for one in near)), "the trial of this point, or one beside it"
        assert "Tune accuracy by epoch" in text or "pruned" in text, "one epoch is no curve"
        assert "batch_size" in text
    assert no_complaints(browser)


def test_the_trials_of_tables_open_too_and_close_by_escape(browser, report):
    from selenium.webdriver import Keys

    show(browser, report)
    button = browser.find_element("css selector", "#failures button.trial")
    click(browser, button)
    dialog = browser.find_element("id", "trial")
    wait_until(lambda: dialog.get_attribute("open"))
    assert "loss is nan in epoch 1" in dialog.text
    dialog.send_keys(Keys.ESCAPE)
    wait_until(lambda: not dialog.get_attribute("open"))


def test_dark_mode_changes_the_page_and_its_figures(browser, report):
    seen = {}
    for scheme in ("light", "dark"):
        show(browser, report, scheme=scheme)
        seen[scheme] = browser.execute_script(
            "const p = document.querySelector('#picture .js-plotly-plot');"
            "return [getComputedStyle(document.body).backgroundColor, p._fullLayout.font.color,"
            " p.data.at(-1).marker.color]"
        )
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    # a page that is open follows its system
    media = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    colour = "return document.querySelector('#picture .js-plotly-plot')._fullLayout.font.color"
    wait_until(lambda: browser.execute_script(colour) == seen["light"][1])


def test_a_phone_shows_it_without_scrolling_sideways(browser, report):
    show(browser, report, width=PHONE)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE
    click(browser, browser.find_element("css selector", "#members button.trial"))
    assert "speednet" in shown_trial(browser)


def test_a_run_written_by_hand_with_hostile_names(browser, tmp_path):
    run, probs, _ = make_run(tmp_path / "run", models=3)
    classes = [HOSTILE, "</script><script>document.title='owned'</script>", "<b>bold</b>", "d"]
    write_json(run / "run.json", read_json(run / "run.json") | {"classes": classes, "command": HOSTILE})
    curve = tuple({"epoch": epoch, "tune_accuracy": 0.5} for epoch in (1, 2, 3))
    for m, p in enumerate(probs):
        write_candidate(run, CandidateInfo(f"c{m}", TrialConfig(backbone=HOSTILE), curve=curve), p)
    write_ensemble(run, choose(Select(run=(str(run),))))
    write_report([run], read_ensemble(run))
    show(browser, Path(str(run / "report.html")))
    assert browser.title == "run: Ninefold report"
    click(browser, browser.find_element("css selector", "#members button.trial"))
    assert HOSTILE in shown_trial(browser)
    labels = [element.text for element in browser.find_elements("css selector", "#classes .ytick text")]
    assert "<b>bold</b>" in labels
    assert no_complaints(browser)


@pytest.mark.parametrize(("width", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_explore(browser, unsure, pictures, tmp_path, width, scheme):
    for part in ("train", "test"):
        shutil.copytree(pictures / part, tmp_path / "photos" / part)
    (tmp_path / "photos/train/down/broken.png").write_bytes(b"broken")
    page = tmp_path / "page.html"
    explore(Explore(data="folder", data_dir=tmp_path / "photos", out=page))
    show(browser, page, width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert "broken.png" in browser.find_element("id", "unreadable").text
    explore(Explore(run=str(unsure), out=page))
    show(browser, page, width, scheme)
    assert "Cleanlab estimates" in browser.find_element("id", "suspects").text
    suspects = json.loads(page.with_suffix(".json").read_text())["suspects"]["images"]
    assert len(browser.find_elements("css selector", "#suspects .shot img")) == len(suspects) > 0
