"""Locust's web page has our options and rows; workers ask what one process asks on the same seed."""

import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from loadtests.answer import read_answers
from loadtests.run import LOCUSTFILE, locust
from tests.servers import eventually
from vllm_ext.process import free_port, running


@pytest.fixture(scope="module")
def url():
    port = free_port()
    with running([sys.executable, "-m", "tests.token_server", str(port), "--gap", "0.01"], port) as url:
        yield url


@contextmanager
def page(url):
    """Locust with its web page."""
    port = free_port()
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, f"--web-port={port}"]
    process = subprocess.Popen([*command, "--web-host=127.0.0.1", "--client-bound=inf"], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: httpx.get(address).status_code == 200, 60)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def rows(address):
    return {each["method"]: each for each in httpx.get(f"{address}/stats/requests", timeout=30).json()["stats"]}


def test_the_page_has_our_options_and_rows_and_starts_what_they_say(url):
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        with page(url) as address:
            driver.get(address)
            assert eventually(lambda: "Custom parameters" in driver.find_element("css selector", "body").text, 30)
            source = httpx.get(address, timeout=30).text
            for name in ("workload", "prefix_share", "arrival", "records"):
                assert f'"{name}": {{"' in source
            swarm = {"user_count": 1, "spawn_rate": 1, "host": url, "scale": "0.1", "arrival": "constant", "rate": "20"}
            httpx.post(f"{address}/swarm", data=swarm | {"duration": "60"}, timeout=30).raise_for_status()
            assert eventually(lambda: {"POST", "TTFT", "ITL", "TPOT"} <= set(rows(address)), 60)
            begun = rows(address)["POST"]["num_requests"]
            time.sleep(3)
            assert 20 < rows(address)["POST"]["num_requests"] - begun < 100  # 20 a second, not as fast as it can
            httpx.get(f"{address}/stats/requests", timeout=30).raise_for_status()
            driver.get(f"{address}/?tab=charts")
            assert eventually(lambda: len(driver.find_elements("css selector", "canvas, svg")) > 0, 30)
    finally:
        driver.quit()


def test_workers_ask_what_one_process_asks_on_the_same_seed(url, tmp_path):
    """The same requests, at the same times of the schedule, to the token."""
    asked = ["--scale=0.1", "--workload=conversation", "--turns=2", "--think=0.2", "--arrival=poisson", "--rate=12"]
    asked += ["--duration=4", "--warmup=0", "--seed=3", "--client-bound=inf"]
    assert locust(url, [*asked, "--users=1", f"--records={tmp_path / 'one.jsonl'}"]) == 0
    alone = {each["id"]: each["prompt"] for each in httpx.get(f"{url}/sent", timeout=60).json()}
    base = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
    port = str(free_port())
    master = [*base, "--master", "--headless", "--expect-workers=2", "--expect-workers-max-wait=60", "--users=2"]
    bound = [f"--master-bind-port={port}", "--master-bind-host=127.0.0.1", "--host", url]
    processes = [subprocess.Popen([*master, *bound, *asked, f"--records={tmp_path / 'two.jsonl'}"])]
    processes += [subprocess.Popen([*base, "--worker", f"--master-port={port}"]) for _ in range(2)]
    try:
        assert [process.wait(90) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    shares = [{answer.id: answer for answer in read_answers([tmp_path / f"two-{place}.jsonl"])} for place in range(2)]
    one = {answer.id: answer for answer in read_answers([tmp_path / "one.jsonl"])}
    assert not set(shares[0]) & set(shares[1])
    both = shares[0] | shares[1]
    measured = {name for name, answer in one.items() if answer.error is None and name.endswith(".0")}
    assert len(measured & set(both)) >= 0.9 * len(measured) > 10  # the ends of the runs are not quite at one time
    later = {each["id"]: each["prompt"] for each in httpx.get(f"{url}/sent", timeout=60).json()}
    for name in set(one) & set(both):
        assert (one[name].prompt_tokens, one[name].answer_tokens) == (
            both[name].prompt_tokens,
            both[name].answer_tokens,
        )
        assert alone.get(name) in (None, later.get(name))
