"""What the pages say is true: commands parse, links and names resolve, messages exist, recipes work as written."""

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import chain, product
from pathlib import Path

import pytest

from grid.parts import LEVELS
from grid.parts.registry import GRIDS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*"))
    if path.is_file() and path.name != "LOG.md"
}
FOLDERS = ("analysis", "benchmarks", "docs", "examples", "grid", "nets", "tests")
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".ipynb", ".svg")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
RETIRED = (
    "put_down|put down|taken up|show_life|unfit|standings?|cut_sizes|is_here|_obtain|hurried|spel(t|led|ling)",
    "(told|tell) apart|(is|are|was|were) had|(is|are) told|whose turn|none that|in good order|by little|at the most",
    "bids|settle[sd]?|claim(s|ed)?|mend(s|ed|ing)?|judge[sd]?",
)
"""Words that have a better one; extend the list when a word is retired."""

RECIPES = {
    "activation": "mish",
    "setting": "nesterov",
    "model": "softmax_regression",
    "factor": "margin",
    "data set": "stripes",
    "metric": "weight_norm",
}
"""What is added -> its name, in a recipe in CONTRIBUTING.md."""


class Parsed(BaseException):
    """Raised by a command instead of running."""


def page(path: str) -> str:
    text = PAGES[path].read_text()
    if path.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of code blocks, continued lines joined, and the spans of inline code."""
    yield from blocks(text)
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield " ".join(span.split())


def blocks(text: str) -> Iterator[str]:
    for block in FENCE.finditer(text):
        yield from re.sub(r"\\\n *", " ", block[2]).splitlines()


def commands(text: str, start: str) -> Iterator[str]:
    """Yield what follows `start` in lines of code, up to the end of the command."""
    for line in code_lines(text):
        for found in re.finditer(rf"(?<![\w-]){start} +([^#'|;&`]*)", line):
            if not re.search(r"(^|\s)#", line[: found.start()]):
                yield found[1].strip()


MODULE_COMMANDS = sorted(
    {
        (path, command)
        for path in PAGES
        for command in commands(page(path), "python -m")
        if command.split()[0].startswith(FOLDERS)
    }
)


@pytest.mark.parametrize(("path", "command"), MODULE_COMMANDS, ids=lambda value: value)
def test_a_command_is_understood(path: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_mentioned_only = not any(f"python -m {command}" in line for line in blocks(page(path)))
    module, *words = shlex.split(command)
    arguments = ["1" if re.fullmatch("[A-Z]+(-[A-Z]+)+|N|X", word) else word for word in words if word != "..."]
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
        for action in parser._actions:
            action.required = action.required and not is_mentioned_only
        raise Parsed(parse(parser, arguments))

    is_package = (ROOT / module.replace(".", "/")).is_dir()
    main = import_module(f"{module}.__main__" if is_package else module).main
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed) as parsed:
        main()
    options = parsed.value.args[0]
    assert getattr(options, "grid", "full") in GRIDS
    for only in getattr(options, "only", None) or ():
        factor, _, levels = only.partition("=")
        of_files = " ".join(file.read_text() for file in getattr(options, "parts", ()))
        known = {*LEVELS.get(factor, ()), *RECIPES.values(), *re.findall(r"[\w.]+", of_files)}
        assert {factor, *levels.split(",")} <= {*LEVELS, *known}


def test_the_pages_have_commands_to_check() -> None:
    modules = {command.split()[0] for _, command in MODULE_COMMANDS}
    assert {"grid.run", "grid.confirm", "grid.record", "analysis.rank", "benchmarks.chaos"} <= modules


@pytest.mark.parametrize("path", PAGES)
def test_make_targets_exist(path: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in code_lines(page(path)) if line.startswith("make ")} <= set(targets)


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M)) == set(re.findall(r"^([a-z-]+):", makefile, re.M))


def links() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        if path.endswith(".md"):
            for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page(path))):
                if "://" not in target:
                    yield path, target


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("path", "target"), sorted(set(links())), ids=lambda value: value)
def test_a_link_leads_somewhere(path: str, target: str) -> None:
    file, _, anchor = target.partition("#")
    linked = (PAGES[path].parent / file).resolve() if file else PAGES[path]
    assert linked.exists()
    assert not anchor or anchor in anchors(linked)


def names() -> Iterator[tuple[str, str]]:
    """Yield what is named in inline code and looks like a file, a folder or a module of this project."""
    for path in PAGES:
        if path.endswith(".md"):
            for span in re.findall(r"`([^`]+)`", FENCE.sub("", page(path))):
                yield from ((path, name) for name in span.split() if looks_like_ours(name))


def looks_like_ours(name: str) -> bool:
    if re.fullmatch(r"[\w./-]+", name) and "/" in name:
        return name.startswith(FOLDERS)
    return bool(re.fullmatch(r"[\w.-]+", name) and name.endswith(SUFFIXES)) or bool(
        re.fullmatch(rf"({'|'.join(FOLDERS)})(\.\w+)+", name)
    )


@cache
def file_names() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {p.name for p in ROOT.iterdir()}


@pytest.mark.parametrize(("path", "name"), sorted(set(names())), ids=lambda value: value)
def test_a_named_file_or_module_exists(path: str, name: str) -> None:
    if "/" in name:
        assert (ROOT / name).exists()
    elif name.endswith(SUFFIXES):
        assert name in file_names()
    else:
        parts = name.split(".")
        modules = [ROOT.joinpath(*parts[:length]) for length in (len(parts), len(parts) - 1)]
        assert any(module.with_suffix(".py").exists() or module.is_dir() for module in modules)


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_what_is_said_to_be_in_a_file_is_there(path: str) -> None:
    found = re.findall(r"`(\w+)`(?: in|\)?) \(?`([\w/]+\.py)`", page(path))
    assert found
    for name, file in found:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / file).read_text(), re.M), f"{name} in {file}"


def test_the_readme_is_short_and_its_first_command_is_at_the_top() -> None:
    lines = page("README.md").splitlines()
    assert len(lines) <= 150
    assert lines.index("```") + 1 < 20
    assert lines[lines.index("```") + 1].startswith("make run")


def texts() -> Iterator[tuple[str, str]]:
    for folder in (*FOLDERS, "."):
        for path in (ROOT / folder).rglob("*") if folder != "." else ROOT.iterdir():
            is_text = path.suffix in (".py", ".md", ".yaml", ".toml", ".ipynb", ".html") or path.name == "Makefile"
            if is_text and path.name not in ("LOG.md", "CHANGELOG.md", Path(__file__).name):
                yield str(path.relative_to(ROOT)), path.read_text()


def retired(words: str) -> re.Pattern[str]:
    """Return a pattern of whole words, between which a line may break: in text, a comment or a joined string."""
    between = r'[\s#"]+'
    return re.compile(rf"\b({words.replace(' ', between)})\b")


@pytest.mark.parametrize("words", RETIRED, ids=lambda words: words[:20])
def test_retired_words_do_not_return(words: str) -> None:
    found = [
        (path, text[: match.start()].count("\n") + 1, match[0])
        for path, text in texts()
        for match in retired(words).finditer(text)
    ]
    assert not found


@pytest.mark.parametrize(
    "words", ["put_down", "told apart", "told\n    # apart", 'told "\n    "apart', "settled", "is had"]
)
def test_retired_words_would_be_found(words: str) -> None:
    assert any(retired(pattern).search(f"it {words} so") for pattern in RETIRED)


def test_the_picture_of_the_layers_is_what_its_command_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))["draw"]
    assert (ROOT / "docs" / "architecture.svg").read_text() == draw(), "run python docs/draw_architecture.py"


@cache
def message_templates() -> tuple[str, ...]:
    """Return every text in the source, with … for what is filled in."""
    files = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in ("analysis", "grid", "nets"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    filled = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return (*filled, *[node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)])


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", page("docs/troubleshooting.md"), re.M)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_in_the_troubleshooting_page_is_in_the_source(message: str) -> None:
    assert any(message in template for template in message_templates())


TRAIN = """
import json, sys
from pathlib import Path
from grid.config import TrialConfig
from grid.data.load import load
from grid.train.trial import DeviceData, train
data = {name: DeviceData.from_dataset(load(name, Path(sys.argv[1]), per_class=20)) for name in ("glyphs", "stripes")}
for settings in json.loads(sys.argv[2]):
    for images in data.values():
        config = TrialConfig.from_params({"learning_rate": "1e-3", "epochs": "1", **settings})
        print(json.dumps(train(config, images).reports[0].metrics))
"""

READ = """
import json, sys
from analysis.curves import read_curves
from analysis.store import read_experiment
experiment = read_experiment(sys.argv[1], "recipes")
norms = read_curves(experiment, experiment.trials["run_id"], "weight_norm")
trials = experiment.trials.merge(norms, on="run_id")
print(json.dumps(trials[["model", "activation", "margin", "weight_norm"]].to_numpy().tolist()))
"""


def recipe(name: str) -> str:
    blocks = [block[2] for block in FENCE.finditer(page("CONTRIBUTING.md")) if block[1] == "diff"]
    (found,) = [block for block in blocks if RECIPES[name] in block]
    return found


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ (.*)", diff, re.M)


@pytest.mark.parametrize("part", [part for part in RECIPES if part != "metric"])
def test_adding_a_part_changes_one_file_of_the_package(part: str) -> None:
    """As the table in README.md says; a new file beside it is not a change."""
    word = {"model": "net"}.get(part, part)
    changed = [file for file in files_of(recipe(part)) if (ROOT / file).exists()]
    rows = [line for line in page("README.md").splitlines() if line.startswith("| a")]
    (row,) = [line for line in rows if re.search(rf"\ban? {word}\b", line)]
    assert re.findall(r"1: `([\w/.]+)`", row) == changed
    assert row.endswith("| 0 |")


def apply(diff: str, tree: Path) -> None:
    """Apply a recipe: context must be there once, and `...` stands for what is there already."""
    for part in re.split(r"^\+\+\+ ", diff, flags=re.M)[1:]:
        file, *lines = part.splitlines()
        if not (tree / file).exists():
            (tree / file).write_text("\n".join(line[1:] for line in lines) + "\n")
            continue
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        text = (tree / file).read_text()
        (found,) = re.finditer(re.escape(old).replace(re.escape("..."), "(.*)") + "$", text, re.M)
        added = new.replace("...", found[1]) if found.groups() else new
        (tree / file).write_text(text[: found.start()] + added + text[found.end() :])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its tests, with all recipes applied."""
    folder = tmp_path_factory.mktemp("recipes") / "copy"
    for name in ("analysis", "docs", "grid", "nets", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for part in RECIPES:
        apply(recipe(part), folder)
    return folder


def run(tree: Path, *arguments: str) -> str:
    """Run Python in the copy and return what it prints."""
    folders = {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(tree.parent)}
    environment = os.environ | folders | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_recipes_add_trains(tree: Path, glyphs_dir: Path) -> None:
    settings = [
        {"activation": "mish"},
        {"model": "softmax_regression"},
        {"optimizer": "sgd", "nesterov": "on"},
        {"margin": "0.1"},
    ]
    for metrics in map(json.loads, run(tree, "-c", TRAIN, str(glyphs_dir), json.dumps(settings)).splitlines()):
        assert 0 <= metrics["val_accuracy"] <= 1
        assert metrics["weight_norm"] > 0.1


def test_what_the_recipes_add_passes_the_tests_that_are_named_for_it(tree: Path) -> None:
    files, names = set(), []
    for part, name in RECIPES.items():
        rows = re.findall(rf"^\| {part} .*\| `(tests/[^`]+) -k (\w+)` \|$", page("CONTRIBUTING.md"), re.M)
        if not rows:
            continue
        (cells,) = rows
        files |= set(cells[0].split())
        names.append(cells[1].replace("NAME", name))
    quick = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", " or ".join(names)]
    passed = run(tree, "-m", "pytest", *quick, *sorted(files), "-rA")
    assert all(re.search(rf"^PASSED .*{name}", passed, re.M) for name in names)


def test_what_the_recipes_add_passes_the_linter(tree: Path) -> None:
    run(tree, "-m", "ruff", "check", "--no-cache", "grid", "nets")
    run(tree, "-m", "ruff", "format", "--no-cache", "--check", "grid", "nets")


@pytest.mark.slow
def test_a_real_grid_compares_what_the_recipes_add(tree: Path, glyphs_dir: Path) -> None:
    small = ["--only", "optimizer=adam", "--only", "batch_norm=off", "--only", "dropout=off", "--per-class", "20"]
    levels = ("activation=relu,mish", "model=mlp,softmax_regression", "margin=off,0.1")
    added = [word for level in levels for word in ("--only", level)] + ["--epochs", "1"]
    where = ["--data-dir", str(glyphs_dir), "--address", "local", "--store", f"sqlite:///{tree}/mlflow.db"]
    run(tree, "-m", "grid.run", "--grid", "smoke", *small, *added, *where, "--experiment", "recipes")
    trials = json.loads(run(tree, "-c", READ, where[-1]))
    assert {tuple(levels) for *levels, _ in trials} == set(
        product(("mlp", "softmax_regression"), ("relu", "mish"), ("off", "0.1"))
    )
    assert min(weight_norm for *_, weight_norm in trials) > 1
