"""The lines that the packages keep: who imports whom, and what no byte from outside may reach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "param_server", "feature_eviction", "proto")

MAY_IMPORT = {
    "proto": set(),
    "feature_eviction": set(),
    "param_server": {"proto", "feature_eviction"},
    "trainer": {"proto", "feature_eviction", "param_server.client"},
}
"""Beside itself. `trainer` reaches the parameter server through one module."""

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "torch.export.load", "all_gather_object"}


def modules(package: str) -> Iterator[Path]:
    return (path for path in sorted((REPOSITORY / package).rglob("*.py")) if "_pb2" not in path.name)


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def wrong_imports(package: str, tree: ast.AST) -> list[str]:
    """Imports of our own packages that `package` may not make."""
    allowed = MAY_IMPORT[package] | {package}
    return sorted(
        name
        for name in imported(tree)
        if name.split(".")[0] in PACKAGES
        and not any(name == one or name.startswith(f"{one}.") for one in allowed)
        # `from param_server import client` names both; the second is what counts.
        and not any(one.startswith(f"{name}.") for one in allowed & imported(tree))
    )


def called(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def ways_to_run_bytes(tree: ast.AST) -> list[str]:
    """Imports and calls that could execute data."""
    found = [name for name in imported(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = called(node.func)
            if name in FORBIDDEN_CALLS or name.split(".")[-1] in {"all_gather_object"}:
                found.append(name)
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.append("allow_pickle")
    return sorted(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    wrong = {
        str(path.relative_to(REPOSITORY)): names
        for path in modules(package)
        if (names := wrong_imports(package, ast.parse(path.read_text())))
    }
    assert wrong == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_byte_from_outside_is_executed(package: str) -> None:
    """Invariant 7, as far as it can be read off the source."""
    found = {
        str(path.relative_to(REPOSITORY)): names
        for path in modules(package)
        if (names := ways_to_run_bytes(ast.parse(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("feature_eviction", "import trainer.loop", ["trainer.loop"]),
        ("param_server", "from trainer.config import Config", ["trainer.config", "trainer.config.Config"]),
        ("trainer", "from param_server.shard import x", ["param_server.shard", "param_server.shard.x"]),
        ("trainer", "from param_server.client import x", []),
        ("trainer", "from param_server import client", []),
        ("proto", "import feature_eviction", ["feature_eviction"]),
    ],
)
def test_the_import_guard_can_fail(package: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(package, ast.parse(source)) == wrong


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(a, b)",
    ],
)
def test_the_execution_guard_can_fail(source: str) -> None:
    assert ways_to_run_bytes(ast.parse(source))


def test_every_package_is_listed_for_the_wheel() -> None:
    """A folder with modules that the wheel lacks would be missed only after installing it."""
    import tomllib

    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        str(path.parent.relative_to(REPOSITORY)).replace("/", ".")
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("__init__.py")
    }
    assert listed == there
