"""What the READMEs show: the first request's answer, commands that parse, links that lead somewhere, and their size."""

import io
import json
import re
import shlex
import subprocess
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from vllm import SamplingParams

from model_executors.attention_plan import FULL, AttentionPlan
from tests.engines import engine
from vllm_ext.cli.main import app
from vllm_ext.embedded.model import PLANNED, fetch_planned
from vllm_ext.layers import format_plan

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
PAGES = [ROOT / name for name in TRACKED.split()]
README = (ROOT / "README.md").read_text()
# Where a file has some, the command's name: `vllm-ext`, also after variables, and others that name what is ours.
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:vllm-ext|python -m|make|pytest|locust -f) .*")


def shown() -> tuple[dict, str]:
    """The README's first request, its body, and what the answer says."""
    block = re.search(r"(?ms)^```console\n\$ (.*?)\n```$", README)[1]
    command, answer = block.split("\n{", 1)
    words = shlex.split(command)
    return json.loads(words[words.index("-d") + 1]), re.search(r'"content":"([^"]*)"', answer)[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_request_is_answered_so_and_surely(dtype):
    """With several nats between each token and the next best, so that no CPU's rounding decides."""
    body, answer = shown()
    sampling = SamplingParams(temperature=body["temperature"], max_tokens=body["max_tokens"], logprobs=2)
    with engine(fetch_planned(), dtype=dtype, skip_tokenizer_init=False) as llm:
        (output,) = llm.chat(body["messages"], sampling, use_tqdm=False)
    (given,) = output.outputs
    assert (given.text, given.finish_reason) == (answer, "stop")
    for position in given.logprobs:
        best, second = sorted((each.logprob for each in position.values()), reverse=True)[:2]
        assert best - second > 3


def test_the_readme_is_read_in_two_minutes():
    assert len(README.encode()) <= 8192
    for folder in ("vllm_ext", "model_executors", "serving", "loadtests", "deploy", "tests"):
        assert f"({folder}/README.md)" in README


def test_it_names_the_plan_that_ships():
    section = json.loads((PLANNED / "config.json").read_text())
    layers = AttentionPlan.from_config(section, 30).layers
    assert f"`{format_plan({number: layer for number, layer in enumerate(layers) if layer != FULL})}`" in README


def test_its_one_picture_is_small_and_follows_the_readers_theme():
    (name,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    picture = (ROOT / name).read_text()
    assert len(picture) < 100_000
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def commands(text: str) -> list[str]:
    """The command lines in a page's blocks of shell and in its lines, without omissions."""
    blocks = re.findall(r"(?ms)^```(?:sh|console)\n(.*?)^```$", text)
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    lines = [re.sub(r"\[[^]']*\]|…$", "", line.removeprefix("$ ").strip()).strip() for line in lines]
    return [line for line in lines if COMMAND.fullmatch(line)]


@cache
def handed_on() -> set[str]:
    """What commands hand on: vLLM's options, and, to servers that they start, those of `serve`."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    return theirs | {option for each in typer.main.get_command(app).commands["serve"].params for option in each.opts}


@cache
def helped(*names: str) -> set[str]:
    """The options that a command's own help names, whatever reads them."""
    with redirect_stdout(io.StringIO()) as told, suppress(SystemExit):
        app([*names, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", told.getvalue()))


def check_ours(words: list[str]) -> None:
    """Raise where the command or an option of `vllm-ext` does not exist, or what is given cannot be read.

    A command that is named and not shown in whole, as `vllm-ext plan --auto`, may leave out what must be given.
    """
    command, names = typer.main.get_command(app), []
    while words and hasattr(command, "commands"):
        names.append(words.pop(0))
        assert names[-1] in command.commands, names
        command = command.commands[names[-1]]
    if not words:
        return
    try:
        context = command.make_context(command.name, list(words))
    except Exception as error:
        if type(error).__name__ == "MissingParameter":
            return
        raise
    unread = {word.partition("=")[0] for word in context.args if word.startswith("--")}
    unread -= helped(*names) | (set() if names == ["loadtest", "saturate"] else handed_on())
    assert not unread, unread


def check(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    match words:
        case ["vllm-ext", *words]:
            check_ours(words)
        case ["python", "-m", module, *_]:
            assert find_spec(module), module
        case ["make", target, *_]:
            assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), target
        case [_, *words]:
            for word in words:
                for file in word.split(","):
                    assert "/" not in file or "://" in file or (ROOT / file.partition("::")[0]).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there(page):
    wrong = []
    for line in commands(page.read_text()):
        try:
            check(line)
        except Exception as error:
            wrong.append(f"{line}: {type(error).__name__} {error}")
    assert wrong == []


def test_a_command_that_is_not_there_is_found():
    for line in (
        "vllm-ext serv MODEL",
        "vllm-ext plan MODEL --out FOLDER --windows 3:4",
        "vllm-ext plan MODEL --out FOLDER --rank many",
        "vllm-ext loadtest saturate URL --tttf 1",
        "vllm-ext serve MODEL --max-num-seq 3",
        "python -m serving.nothing",
        "make nothing",
        "pytest tests/test_nothing.py",
    ):
        with pytest.raises(BaseException):  # noqa: B017, PT011
            check(line)
