"""The documentation holds: links, commands with their options, files, names, messages and examples are really there.

Every check is a function that returns what is wrong with a page, so that a planted fault shows that it can fail.
"""

import ast
import functools
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from ensemble.select import SELECTORS, Select, choose
from search.config import Task
from search.spaces import known_spaces, load_space

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PACKAGES = ("search", "trainables", "ensemble", "cluster")
FOLDERS = (*PACKAGES, "benchmarks", "tests", "docs", "results", ".ci")
LARGEST_README = 10_240  # bytes: one screen
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BANNED = re.compile(r"\b{}(s|ed)?\b".format("m" + "end"), re.IGNORECASE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands between backticks outside of blocks; a span may be broken over two lines."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text) if found == language]


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files or headings that are not there; others' addresses are not asked."""
    wrong = []
    for link in links(text):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.is_relative_to(ROOT) or not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(text if target == page else text_of(target)):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


def test_every_page_is_linked_from_the_readme_and_links_to_a_neighbour() -> None:
    assert len(DOCS) >= 12
    front = links(text_of(ROOT / "README.md"))
    assert [name_of(page) for page in DOCS if name_of(page) not in front] == []
    for page in DOCS:
        others = {link.partition("#")[0] for link in links(text_of(page))}
        assert others & {other.name for other in DOCS if other != page}, name_of(page)


# --- commands ---------------------------------------------------------------------------------------------------------


class Asked(BaseException):
    """A command came to the point where it parses its options."""


@functools.cache
def parser(module: str) -> Any:
    """The dataclass that `python -m module` parses its command line into: its own main() is asked, and gets no further.

    Raises ModuleNotFoundError, or AttributeError for a module without main().
    """
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")

    def ask(options: Any, **rest: Any) -> Any:
        raise Asked(options)

    handler = signal.getsignal(signal.SIGTERM)  # the server's main() sets one of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", ask)
        try:
            found.main()
        except Asked as asked:
            return asked.args[0]
        finally:
            signal.signal(signal.SIGTERM, handler)
    raise AssertionError(f"{module} parsed nothing")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Every `python -m MODULE OPTIONS` of a page, in blocks and between backticks."""
    whole = [code.replace("\\\n", " ") for _, code in FENCE.findall(text)]
    lines = [line for code in whole for line in code.splitlines()] + spans(text)
    found = []
    for line in lines:
        line = line.replace("cluster/launch/slurm.sh --", "python -m search.run --")  # hands its options on
        for module, options in re.findall(r"python -m (\S+)([^#|]*)", line):
            found.append((module, shlex.split(options)))
    return found


def wrong_commands(text: str) -> list[str]:
    """Commands whose module is not there or does not take these options."""
    wrong = []
    for module, options in commands(text):
        shown = f"{module} {shlex.join(options)}"
        if module.split(".")[0] not in FOLDERS:
            if importlib.util.find_spec(module) is None:
                wrong.append(f"{shown}: no such module")
            continue
        try:
            tyro.cli(parser(module), args=options, console_outputs=False)
        except (ModuleNotFoundError, AttributeError) as error:
            wrong.append(f"{shown}: {error}")
        except SystemExit:
            wrong.append(f"{shown}: these options are refused")
    return wrong


@functools.cache
def known_options() -> frozenset[str]:
    """All options of all commands that the documentation names."""
    modules = {module for page in PAGES for module, _ in commands(text_of(page)) if module.split(".")[0] in FOLDERS}
    fields = [field for module in modules for field in parser(module).__dataclass_fields__.values()]
    names = {field.name for field in fields} | {f"no_{field.name}" for field in fields if field.default is True}
    return frozenset(f"--{name.replace('_', '-')}" for name in names) | {"--help", "--no-peers"}


def wrong_options(text: str) -> list[str]:
    """Options named without their command, as `--minutes 30`, that no command has."""
    alone = [span for span in spans(text) if span.startswith("--")]
    named = {option for span in alone for option in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", span)}
    return sorted(named - known_options())


def test_there_are_commands_to_look_at() -> None:
    shown = [module for page in PAGES for module, _ in commands(text_of(page))]
    assert len(shown) > 50
    assert {module for module in shown if module.split(".")[0] in PACKAGES} >= {
        "search.run", "search.refit", "ensemble.select", "ensemble.soup", "ensemble.report", "ensemble.predict",
        "ensemble.serve", "ensemble.export", "trainables.explore", "trainables.lr_find",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists_and_takes_the_options_that_are_shown(page: Path) -> None:
    assert wrong_commands(text_of(page)) == []
    assert wrong_options(text_of(page)) == []


def wrong_targets(text: str) -> list[str]:
    """`make TARGET` for which the Makefile has no rule."""
    rules = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    inside = "\n".join([*spans(text), *(code for _, code in FENCE.findall(text))])
    return sorted(set(re.findall(r"^(?:\$ )?make ([\w-]+)", inside, re.MULTILINE)) - rules)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    assert wrong_targets(text_of(page)) == []


def test_the_readme_shows_the_test_command() -> None:
    assert re.search(r"^\$ make test\b", text_of(ROOT / "README.md"), re.MULTILINE)


def wrong_extras(text: str) -> list[str]:
    """Extras that pyproject.toml does not have."""
    known = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    named = re.findall(r"extra\s+`(\w+)`", text)
    for several in re.findall(r"\.\[([\w,]+)\]", text):
        named += several.split(",")
    return sorted(set(named) - set(known))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_exist(page: Path) -> None:
    assert wrong_extras(text_of(page)) == []


# --- files and names --------------------------------------------------------------------------------------------------


def missing_files(text: str) -> list[str]:
    """Files and folders of this repository that are named and not there; NAME stands for any."""
    wrong = []
    for word in {word for part in [*spans(text), *(code for _, code in FENCE.findall(text))] for word in part.split()}:
        is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) and "/" in word and word.split("/")[0] in FOLDERS
        if is_path and "NAME" not in word and not (ROOT / word).exists():
            wrong.append(word)
    return sorted(wrong)


def missing_in_tree(text: str) -> list[str]:
    """Files and folders of the tree in docs/design.md that are not there."""
    wrong, base = [], ROOT
    for code in blocks(text, ""):
        if not code.startswith("search/"):
            continue
        for line in code.splitlines():
            named = re.split(r" {3,}", line.strip())[0].split("  ")[0].split(", ")
            if not line.startswith(" "):
                base = ROOT / named[0]
            wrong += [name for name in named if not (base / name if line.startswith(" ") else base).exists()]
    return wrong


def missing_names(text: str) -> list[str]:
    """Dotted names as `ensemble.pool.load_pool` that cannot be imported."""
    wrong = []
    for span in spans(text):
        name = span.partition("(")[0]
        if not re.fullmatch(rf"({'|'.join(PACKAGES)}|benchmarks)(\.\w+)+", name):
            continue
        if name.endswith((".json", ".onnx", ".py")):
            continue
        module, _, attribute = name.rpartition(".")
        try:
            if not hasattr(importlib.import_module(module), attribute):
                importlib.import_module(name)
        except ImportError as error:
            wrong.append(f"{name}: {error}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_exist(page: Path) -> None:
    assert missing_files(text_of(page)) == []
    assert missing_names(text_of(page)) == []


def test_the_tree_in_the_design_is_the_houses() -> None:
    text = text_of(ROOT / "docs/design.md")
    assert len(re.findall(r"\.py", blocks(text, "")[-1])) > 30
    assert missing_in_tree(text) == []


def unlisted(names: Iterable[str], text: str) -> list[str]:
    """Names that a page does not give between backticks."""
    return sorted(set(names) - set(spans(text)))


def test_every_selector_space_and_extra_is_in_its_table() -> None:
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert unlisted(SELECTORS, text_of(ROOT / "docs/selection.md")) == []
    assert [name for name in SELECTORS if name not in (Select.__doc__ or "")] == []
    assert unlisted(known_spaces(), text_of(ROOT / "docs/search-spaces.md")) == []
    assert unlisted(extras, text_of(ROOT / "docs/quickstart.md")) == []


# --- messages ---------------------------------------------------------------------------------------------------------


@functools.cache
def literals() -> tuple[str, ...]:
    """Every piece of text in the code."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(text_of(path)))]
    return tuple(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def messages(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def unsaid(text: str) -> list[str]:
    """Messages of docs/faq.md that no line of the code can print."""
    return [message for message in messages(text) if not any(message in literal for literal in literals())]


def test_every_message_that_is_explained_stands_in_the_code() -> None:
    text = text_of(ROOT / "docs/faq.md")
    assert len(messages(text)) > 30
    assert unsaid(text) == []


# --- examples ---------------------------------------------------------------------------------------------------------


def unimportable(code: str) -> list[str]:
    """What an example imports of this project and does not find. Raises SyntaxError for what is no Python."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            module = importlib.import_module(node.module)
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_import_what_exists(page: Path) -> None:
    assert [name for code in blocks(text_of(page), "python") for name in unimportable(code)] == []


def test_the_onnx_lines_are_those_of_the_module_that_are_tested() -> None:
    tested = ast.get_docstring(ast.parse(text_of(ROOT / "ensemble/export/__init__.py"))) or ""
    (shown,) = [code for code in blocks(text_of(ROOT / "README.md"), "python") if "onnxruntime" in code]
    assert [line.strip() for line in shown.splitlines()] == [
        line.strip() for line in tested.splitlines() if line.startswith("    ")
    ]


def test_the_selectors_example_runs() -> None:
    (code,) = [code for code in blocks(text_of(ROOT / "docs/python.md"), "python") if "dirichlet" in code]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["blend"].weights.sum() == pytest.approx(1)
    assert 1 <= np.count_nonzero(names["blend"].weights) <= 5


def test_a_candidate_that_is_added_as_the_page_says_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(text_of(ROOT / "docs/run-directory.md"), "python")
    run, rng = tmp_path / "runs/NAME", np.random.default_rng(0)
    run.mkdir(parents=True)
    labels = rng.integers(0, 3, 80)
    (run / "run.json").write_text(json.dumps({"classes": ["a", "b", "c"], "split_fingerprint": "f00d"}))
    np.save(run / "select_labels.npy", labels)
    np.save(tmp_path / "my_select_probs.npy", 0.7 * np.eye(3)[labels] + 0.1)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    ensemble = choose(Select(run=(str(run),)))
    assert [member.id for member in ensemble.members] == ["my-model"]
    assert ensemble.left_out == {}


def test_the_example_of_a_space_is_one(tmp_path: Path) -> None:
    import optuna

    (code,) = blocks(text_of(ROOT / "docs/search-spaces.md"), "python")
    (tmp_path / "my_space.py").write_text(code)
    space = load_space(str(tmp_path / "my_space.py"))
    task = Task({"speednet": None}, 3, 500, 400, 64, "cpu", 600.0, {})
    config = space.suggest(optuna.create_study().ask(), task)
    assert (space.name, config.backbone, config.pretrained) == ("my_space", "speednet", False)
    assert runpy.run_path(str(tmp_path / "my_space.py"))["BACKBONES"] == space.backbones


# --- the face ---------------------------------------------------------------------------------------------------------


def test_the_readme_fits_one_screen() -> None:
    assert 0 < len((ROOT / "README.md").read_bytes()) <= LARGEST_README


def unproven(text: str) -> list[str]:
    """Percentages in tables for which docs/benchmarks.md has no row with command, hardware and day."""
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    proven = text_of(ROOT / "docs/benchmarks.md")
    return [share for share in re.findall(r"[\d.]+ %", rows) if not re.search(rf"(?<![\d.]){re.escape(share)}", proven)]


def test_every_headline_stands_in_the_benchmarks() -> None:
    text = text_of(ROOT / "README.md")
    assert len(re.findall(r"[\d.]+ %", text)) > 10
    assert unproven(text) == []


def with_banned_words(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if BANNED.search(line)]


def test_a_word_that_is_not_used_is_nowhere_but_in_results() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, "the tests are run in a git checkout"
    found = {}
    for name in listed.stdout.splitlines():
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if not name.startswith("results/") and b"\0" not in content:
            found[name] = with_banned_words(content.decode(errors="replace"))
    assert len(found) > 200
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_licence_is_apaches_and_named() -> None:
    licence = text_of(ROOT / "LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert licence.strip().endswith("limitations under the License.")
    assert tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["license"] == "Apache-2.0"


# --- every check can fail ---------------------------------------------------------------------------------------------

PLANTED: list[tuple[Callable[[str], list[str]], str, str]] = [
    (lambda text: broken_links(ROOT / "README.md", text), "[a](docs/data.md#splits)", "[a](docs/no.md)"),
    (lambda text: broken_links(ROOT / "README.md", text), "[a](docs/data.md#splits)", "[a](docs/data.md#no)"),
    (lambda text: broken_links(ROOT / "README.md", text), "# A, b?\n[a](#a-b)", "# A, b?\n[a](#a-c)"),
    (lambda text: broken_links(ROOT / "README.md", text), "[a](LICENSE)", "[a](../../etc/passwd)"),
    (wrong_commands, "`python -m ensemble.select --top-k 3`", "`python -m ensemble.select --top-l 3`"),
    (wrong_commands, "`python -m ensemble.select --top-k 3`", "`python -m ensemble.select --top-k three`"),
    (wrong_commands, "`python -m ensemble.select`", "`python -m ensemble.selects`"),
    (wrong_commands, "`python -m ensemble.select`", "`python -m ensemble.pool`"),
    (wrong_commands, "`python -m pytest`", "`python -m no_such_module_anywhere`"),
    (wrong_commands, "`python -m search.run --minutes 3`", "```\n$ python -m search.run \\\n    --hours 3\n```"),
    (wrong_commands, "```\npython -m search.run  # the --dry run\n```", "```\npython -m search.run --dry\n```"),
    (wrong_options, "`--minutes 30`", "`--hours 30`"),
    (wrong_targets, "```\n$ make test   # all\n```", "```\n$ make tests   # all\n```"),
    (wrong_targets, "`make check`", "`make chek`"),
    (wrong_extras, "(extra `serve`)", "(extra `served`)"),
    (wrong_extras, "pip install -e '.[dev,serve]'", "pip install -e '.[dev,served]'"),
    (missing_files, "`search/run.py`, `tests/data/`", "`search/running.py`"),
    (missing_files, "```\nsbatch cluster/launch/slurm.sh\n```", "```\nsbatch cluster/launch/slurmed.sh\n```"),
    (missing_files, "`ray up cluster/launch/cloud.yaml`", "`ray up cluster/launch/clouds.yaml`"),
    (missing_names, "`ensemble.pool.load_pool(runs)`", "`ensemble.pool.load_pools(runs)`"),
    (
        missing_in_tree,
        "```\nsearch/   many\n  run.py, study/   it\n```",
        "```\nsearch/   many\n  run.py, no.py   it\n```",
    ),
    (lambda text: unlisted(["greedy"], text), "`greedy` adds", "`greed` adds"),
    (unsaid, "| `has no candidates yet` | wait |", "| `has no candidates here` | wait |"),
    (unimportable, "from ensemble.pool import load_pool", "from ensemble.pool import load_pools"),
    (unproven, "| 95.50 % |", "| 95.55 % |"),
    (with_banned_words, "recommended amendments", "it was m" + "ended"),
]


@pytest.mark.parametrize(("check", "right", "wrong"), PLANTED, ids=[wrong for *_, wrong in PLANTED])
def test_a_planted_fault_is_found(check: Callable[[str], list[str]], right: str, wrong: str) -> None:
    assert check(right) == []
    assert len(check(wrong)) == 1
