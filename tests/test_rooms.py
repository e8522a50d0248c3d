"""What a moved file would break silently: code digest, shipped code, names in strings, shape checks, import cycles."""

import ast
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from grid.config import TrialConfig
from grid.record.predictor import save_predictor
from grid.train.code_version import digest_of
from grid.train.evaluation import inference_state
from grid.train.trial import DeviceData, Trial

ROOT = Path(__file__).parents[1]
TRAINING_CODE = ("grid", "nets")
"""The packages whose code decides what a trial yields."""


def module_name(file: Path) -> str:
    """Return the name of the module that a file of the project holds."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(*packages: str) -> dict[str, ast.Module]:
    """Return the syntax trees of all modules of some packages, by module name."""
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    return {module_name(file): ast.parse(file.read_text()) for file in files}


MODULES = parse("grid", "nets", "analysis")


# The digest of the code that must be the same on all nodes


def copy_training_code(folder: Path) -> list[Path]:
    """Copy grid/ and nets/ into a folder, and return where they are."""
    return [
        Path(shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")))
        for name in TRAINING_CODE
    ]


def test_the_digest_changes_with_every_file_of_the_training_code(tmp_path: Path) -> None:
    folders = copy_training_code(tmp_path)
    before, unnoticed = digest_of(folders), []
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        with file.open("a") as source:
            source.write("# changed\n")
        after = digest_of(folders)
        if after == before:
            unnoticed.append(file)
        before = after
    assert unnoticed == []


def test_the_digest_changes_with_a_new_file_a_new_folder_and_a_move_and_with_nothing_else(tmp_path: Path) -> None:
    folders = copy_training_code(tmp_path)
    digests = [digest_of(folders)]
    (tmp_path / "grid" / "notes.txt").write_text("not code")
    assert digest_of(folders) == digests[0]
    (tmp_path / "grid" / "new.py").write_text("x = 1\n")
    digests.append(digest_of(folders))
    (tmp_path / "nets" / "new").mkdir()
    (tmp_path / "grid" / "new.py").rename(tmp_path / "nets" / "new" / "new.py")
    digests.append(digest_of(folders))
    assert len(set(digests)) == 3


def test_the_digest_of_this_process_is_that_of_this_tree() -> None:
    code = import_module("grid.tune.preflight").CodeVersion.here()
    assert code.digest == digest_of(ROOT / name for name in TRAINING_CODE)


# The code that a saved model takes with it


def test_a_saved_model_takes_the_whole_training_code_with_it(tmp_path: Path) -> None:
    config = TrialConfig(hidden_sizes="8", learning_rate=0.1, epochs=1)
    images, labels = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = DeviceData(images, labels, images, labels, 2, mean=0.0, std=1.0)
    weights = inference_state(config, Trial(config, data).state_dict(), data)
    save_predictor(tmp_path / "model", config, weights, data, "ab", np.zeros((1, 28, 28), np.uint8))
    code = tmp_path / "model" / "code"
    shipped = {str(file.relative_to(code)) for file in code.rglob("*.py")}
    assert shipped == {str(file.relative_to(ROOT)) for name in TRAINING_CODE for file in (ROOT / name).rglob("*.py")}


# Names of modules in strings


NAME = r"(?:grid|nets|analysis|benchmarks)(?:\.[\w{}]+)+"
ALL_MODULES = MODULES | parse("benchmarks", "tests")


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield all strings below a node; an f-string with `{}` for each value in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def names_in(text: str) -> list[str]:
    """Return what a string names of this project: as its whole text, after `python -m`, or between backticks."""
    whole = [text] if re.fullmatch(NAME, text) else []
    names = [*whole, *re.findall(f"-m ({NAME})", text), *re.findall(f"`({NAME})`", text)]
    return [name for name in names if not name.endswith((".json", ".jsonl", ".log", ".py"))]


def exists(name: str) -> bool:
    """Return whether a name is that of a module, of some modules with `{}`, or of something that a module knows."""
    if "{}" in name:
        return any(re.fullmatch(name.replace("{}", r"\w+"), module) for module in ALL_MODULES)
    owner = max((module for module in ALL_MODULES if f"{name}.".startswith(f"{module}.")), key=len)
    attribute = name.removeprefix(owner).lstrip(".").partition(".")[0]
    return not attribute or attribute in known_names(ALL_MODULES[owner])


def known_names(tree: ast.Module) -> set[str]:
    """Return what a module defines or imports."""
    known: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            known.add(node.name)
        elif isinstance(node, ast.Name):
            known.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
    return known


def test_everything_that_a_string_or_docstring_names_exists() -> None:
    texts = [(module, text) for module, tree in ALL_MODULES.items() for text in strings(tree)]
    named = {(module, name) for module, text in texts for name in names_in(text)}
    assert ("grid.driver.launch", "grid.driver.experiment") in named
    missing = {f"{module}: {name}" for module, name in named - MADE_UP if not exists(name)}
    assert missing == set()


MADE_UP = {("tests.test_rooms", name) for name in ("grid.no.such", "grid.tune.tuner.no_such", "grid.no.{}")}


@pytest.mark.parametrize("name", sorted(name for _, name in MADE_UP))
def test_a_name_that_is_gone_is_found_in_code_commands_docstrings_and_f_strings(name: str) -> None:
    written = name.replace("{}", "{1}")
    for code in (f"import_module(f'{written}')", f"f'python -m {written} again'", f"f'see `{written}`'"):
        assert name in [each for text in strings(ast.parse(code)) for each in names_in(text)]
    assert not exists(name)


# Shape checks in tests


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("nets.", "grid.train."))])
def test_shapes_are_checked_in_every_module_that_computes_with_tensors(module: str) -> None:
    assert "jaxtyping" in type(import_module(module).__loader__).__module__


def test_a_wrong_shape_raises_in_nets_and_in_training() -> None:
    config = TrialConfig(hidden_sizes="8", learning_rate=0.1, epochs=1)
    images, labels = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    trial = Trial(config, DeviceData(images, labels, images, labels, 2, mean=0.0, std=1.0))
    with pytest.raises(TypeCheckError):
        trial.logits(images.squeeze(1))
    with pytest.raises(TypeCheckError):
        trial.net(torch.zeros(4, 28, 28))
    with pytest.raises(TypeCheckError):
        import_module("grid.train.evaluation")._timed_logits(trial, images.squeeze(1))


# Import cycles


def lazy_imports(tree: ast.Module) -> list[str]:
    """Return the modules of this project that are imported by their names in strings."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) in ("import_module", "importlib.import_module")]
    named = [text for call in loads for argument in call.args for text in strings(argument)]
    return [name for name in named if name.partition(".")[0] in ("grid", "nets", "analysis")]


def imports(tree: ast.Module, modules: Mapping[str, ast.Module]) -> set[str]:
    """Return the modules of this project that a module imports, at its top, in a function, or by name."""
    found = set(lazy_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(str(node.module))
    # `from grid.tune import tuner` imports the module grid.tune.tuner; grid/tune/__init__.py imports nothing of these.
    return {name for name in found if name in modules}


def assert_no_cycle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_imports_itself_through_others_not_even_lazily() -> None:
    graph = {name: imports(tree, MODULES) - {name} for name, tree in MODULES.items()}
    assert "grid.driver.experiment" in graph["grid.driver.launch"]
    assert_no_cycle(graph)


def test_no_folder_imports_itself_through_others_not_even_lazily() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for name, tree in MODULES.items():
        for other in imports(tree, MODULES):
            graph[folder(name)] |= {folder(other)} - {folder(name)}
    assert "grid.tune" in graph["grid.driver"]
    assert_no_cycle(graph)


def folder(module: str) -> str:
    """Return the folder of a module within its package; a module directly in the package stands for itself."""
    return ".".join(module.split(".")[:2])


def test_a_cycle_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="a -> b -> a|b -> a -> b"):
        assert_no_cycle({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize("package", ["grid", "nets", "analysis"])
def test_no_folder_holds_more_than_fifteen_modules(package: str) -> None:
    sizes = defaultdict(list)
    for file in (ROOT / package).rglob("*.py"):
        sizes[file.parent].append(file.name)
    assert {str(path): len(names) for path, names in sizes.items() if len(set(names) - {"__init__.py"}) > 15} == {}
