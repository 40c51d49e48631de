"""The whole comparison of a server with itself, its report in a browser, and what a mistake gets."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from junitparser import JUnitXml
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import loadtests
from tests.command import refused
from tests.servers import eventually
from vllm_ext.process import free_port, running

COMMAND = [sys.executable, "-m", "vllm_ext.cli.main", "loadtest"]
INCOMPLETE = "Incomplete: saved on the way, of a comparison that has not ended by itself."
PLOTS = {"throughput-chat", "goodput-chat", "ttft-chat", "itl-chat", "kv", "queue"}


@pytest.fixture(scope="module")
def url():
    port = free_port()
    shape = ["--slots", "4", "--first", "0.1", "--gap", "0.02", "--tokens", "6"]
    with running([sys.executable, "-m", "tests.token_server", str(port), *shape], port) as url:
        yield url


@pytest.fixture(scope="module")
def compared(url, tmp_path_factory):
    """A beside A, with one requirement that is met and one that is not."""
    out = tmp_path_factory.mktemp("compared")
    work = [
        "--workload",
        "chat",
        "--needles",
        "0.3",
        "--scale",
        "0.05",
        "--arrival",
        "constant",
        "--ttft",
        "0.3",
        "--itl",
        "0.5",
    ]
    times = [
        "--warmup",
        "0.5",
        "--duration",
        "2",
        "--pairs",
        "2",
        "--start",
        "16",
        "--width",
        "2.5",
        "--minutes",
        "1.5",
        "--client-bound",
        "1",
    ]
    required = ["--require", "goodput_ratio>=2", "--require", "goodput_ratio>=0.5"]
    command = [*COMMAND, "compare", url, url, "--out", str(out), *work, *times, *required]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False), out


def test_a_beside_a_is_no_difference(compared):
    done, out = compared
    assert done.returncode == 1, done.stderr  # for the requirement that is not met, as one of 2 ought to be
    assert "chat: no difference: B serves " in done.stdout
    assert "needles: no difference can be seen" in done.stdout
    assert done.stderr.count("not met: ") == 1
    assert str(out / "report.html") in done.stderr.splitlines()[0]
    assert str(out / "report.html") in done.stdout.splitlines()[-1]
    report = json.loads((out / "report.json").read_text())
    (chat,) = report["workloads"].values()
    assert not chat["ratios"]["goodput_ratio"]["differs"]
    assert set(chat["served_requests_per_second"]) == {"A", "B"}
    assert report["complete"]
    assert report["missing"] == []
    levels = [run for run in report["runs"] if run["kind"] == "level"]
    assert [run["side"] for run in levels] == ["A", "B", "B", "A"]
    assert len({run["figures"]["rate"] for run in levels}) == 1
    assert all(run["client"]["processes"] == 1 for run in report["runs"])
    assert max(sample["running"] for sample in report["metrics"]["A"]) > 0
    assert report["versions"]["server A"] == "token server"


def test_the_report_is_as_its_schema_says(compared):
    schema = json.loads((Path(loadtests.__file__).parent / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((compared[1] / "report.json").read_text()), schema)


def test_one_that_is_ended_leaves_a_report_of_what_was_measured(url, tmp_path):
    work = ["--workload", "chat", "--scale", "0.05", "--arrival", "constant", "--ttft", "0.3", "--itl", "0.5"]
    times = ["--warmup", "0.5", "--duration", "1", "--start", "16", "--client-bound", "1"]
    command = [*COMMAND, "compare", url, url, "--out", str(tmp_path), *work, *times]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert eventually((tmp_path / "junit.xml").exists, 120)
            running.terminate()
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert (running.returncode, out) == (143, "")
    assert "ended early; the report has what was measured: " in err
    report = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(report, json.loads((Path(loadtests.__file__).parent / "report.schema.json").read_text()))
    assert not report["complete"]
    assert {run["side"] for run in report["runs"]} == {"A", "B"}
    assert report["missing"] == [INCOMPLETE, "chat: 0 of 3 pairs of runs at equal load."]
    assert INCOMPLETE in (tmp_path / "report.html").read_text()


def test_junit_has_what_failed(compared):
    (suite,) = JUnitXml.fromfile(str(compared[1] / "junit.xml"))
    cases = {case.name: [each.message for each in case.result] for case in suite}
    assert cases["answers without errors"] == []
    assert cases["goodput_ratio>=0.5"] == []
    (why,) = cases["goodput_ratio>=2"]
    assert ">=2 is required" in why


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def test_the_report_draws_every_plot_with_no_error(compared, browser):
    browser.get((compared[1] / "report.html").as_uri())
    drawn = {
        plot.get_attribute("id")
        for plot in browser.find_elements("css selector", ".js-plotly-plot")
        if plot.find_elements("css selector", ".trace") and plot.size["height"] > 200
    }
    assert drawn == PLOTS
    assert browser.get_log("browser") == []
    page = Path(compared[1] / "report.html").read_text()
    assert 'src="http' not in page


def test_the_first_screen_answers(compared, browser):
    """Which serves more, by how much, how sure, at what cost in quality, before any scrolling."""
    browser.set_window_size(1280, 800)
    browser.get((compared[1] / "report.html").as_uri())
    answer = browser.find_element("css selector", "#answer-chat")
    assert answer.rect["y"] + answer.rect["height"] < 800
    for said in ("No difference", "requests/s of B", "how sure (95% interval)", "at what cost in quality", "needles"):
        assert said in answer.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_read_on_a_phone_in_light_and_dark(compared, browser, scheme):
    """Nothing is wider than the screen, and text stands out from its ground by WCAG's 4.5 to 1."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get((compared[1] / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        text, ground = (luminance(each) for each in browser.execute_script(style))
        assert (text > ground) == (scheme == "dark")
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 4.5
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(colour):
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


compare_refused = partial(refused, "loadtest", "compare")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--require", "goodput>=1"], "require 'goodput>=1': write NAME>=NUMBER"),
        (["--workload", "talk"], "workload 'talk': take one of chat"),
        (["--ttft", "0"], "both must be above 0"),
        (["--goodput", "2"], "goodput 2: it is a part"),
        (["--arrival", "closed"], "arrival 'closed': take constant, poisson or bursts"),
        (["--duration", "0"], "duration 0"),
        (["--width", "1"], "width 1, minutes 15, pairs 3"),
        (["--prometheus", "http://127.0.0.1:9"], "prometheus http://127.0.0.1:9: "),
    ],
)
def test_refuses(url, tmp_path, options, message):
    assert message in compare_refused(url, url, "--out", str(tmp_path / "out"), *options)
    assert list(tmp_path.rglob("*.*")) == []


def test_refuses_sides_that_are_not_there(url, tmp_path):
    nobody = f"http://127.0.0.1:{free_port()}"
    assert "no OpenAI-compatible server there" in refused(
        "loadtest", "compare", url, nobody, "--out", str(tmp_path / "out")
    )
    assert "no such folder" in compare_refused(url, "./nothing", "--out", str(tmp_path / "out"))
    scraped = ["--prometheus", url, "--out", str(tmp_path / "out")]
    assert "give both sides as URLs" in compare_refused(url, "./nothing", *scraped)
    assert list(tmp_path.iterdir()) == []
