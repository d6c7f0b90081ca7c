"""Rules of the source code: directions of imports, lengths of modules and functions, and docstrings."""

import ast
from functools import cache

from tests.helpers import ROOT

MAX_MODULE_LINES = 600  # without get_args_parser
MAX_FUNCTION_LINES = 70

# Parts of the code by level: a part may import models and parts of its own or a lower level.
LEVELS = {
    "utils": 1,
    "core": 2,
    "transforms": 3,
    "datasets": 3,
    "samplers": 3,
    "losses": 3,
    "engine": 3,
    "dense": 4,
    "segmentation": 5,
    "detection": 5,
}
MODULES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "*/*.py", "*/configs/*.py")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".")
)


def part_of(module) -> str:
    """Return the top-level module or package of a file such as `core/run.py`."""
    return module.parts[0].removesuffix(".py")


PARTS = {part_of(module) for module in MODULES}


@cache
def parse(module) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


@cache
def absolute_imports(module) -> set[str]:
    """Return the names that a file imports absolutely, including imports inside functions."""
    names = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@cache
def relative_imports(module) -> set[str]:
    """Return the names that a file imports relatively, as absolute names."""
    names = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            package = [*module.parts[: len(module.parts) - node.level], *filter(None, [node.module])]
            names |= {".".join([*package, alias.name]) for alias in node.names}
    return names


def imported_parts(module) -> set[str]:
    """Return the other parts of the code that a file imports."""
    names = absolute_imports(module) | relative_imports(module)
    return {name.split(".")[0] for name in names} & PARTS - {part_of(module)}


def find_imports(is_forbidden) -> list[str]:
    """Return descriptions of the imports for which `is_forbidden(importing part, imported part)` is true."""
    return [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in sorted(imported_parts(module))
        if is_forbidden(part_of(module), imported)
    ]


def functions_of(module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(module)) if isinstance(node, ast.FunctionDef)]


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def test_imports_have_one_direction():
    def is_upward(importer: str, imported: str) -> bool:
        return importer in LEVELS and imported != "models" and LEVELS.get(imported, 6) > LEVELS[importer]

    assert not find_imports(is_upward)


def test_models_import_nothing_outside_their_package():
    assert not find_imports(lambda importer, imported: importer == "models")


def test_models_import_each_other_relatively():
    """They are installed under another name."""
    names = {name for module in MODULES if part_of(module) == "models" for name in absolute_imports(module)}
    assert "models" not in {name.split(".")[0] for name in names}


def test_segmentation_and_detection_do_not_import_each_other():
    assert not find_imports(lambda importer, imported: {importer, imported} == {"segmentation", "detection"})


def test_only_tests_import_main_and_benchmarks():
    assert not find_imports(lambda importer, imported: imported in {"main", "benchmarks"} and importer != "tests")


def test_only_tests_import_analyze_and_only_it_imports_analysis():
    assert not find_imports(lambda importer, imported: imported == "analyze" and importer != "tests")
    assert not find_imports(lambda importer, imported: imported == "analysis" and importer not in {"analyze", "tests"})


def test_few_import_predict():
    users = {"analysis", "analyze", "export", "hubconf", "tests"}
    assert not find_imports(lambda importer, imported: imported == "predict" and importer not in users)


def test_modules_are_short():
    lengths = {}
    for module in MODULES:
        parsers = [function for function in functions_of(module) if function.name == "get_args_parser"]
        lengths[str(module)] = len((ROOT / module).read_text().splitlines()) - sum(map(lines_of, parsers))
    assert not {module: lines for module, lines in lengths.items() if lines > MAX_MODULE_LINES}
    assert lengths["main.py"] <= 360  # "about 350"


def test_functions_are_short():
    lengths = {
        f"{module}: {function.name}": lines_of(function)
        for module in MODULES
        for function in functions_of(module)
        if function.name != "get_args_parser"
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def test_public_functions_and_classes_have_docstrings():
    """Methods and functions inside functions are not checked."""
    missing = [
        f"{module}: {node.name}"
        for module in MODULES
        if part_of(module) != "tests"
        for node in parse(module).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if ast.get_docstring(node) is None
    ]
    assert not missing
