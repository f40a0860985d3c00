"""What is written about the package is so."""

import ast
import doctest
import importlib.metadata
import inspect
import re
from importlib import resources
from pathlib import Path

import ppv2
from ppv2 import _native


def documented(node: ast.AST, path: str = "") -> dict[str, str]:
    """Docstrings of a stub by the dotted name of what they document."""
    found = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = f"{path}{child.name}"
            text = ast.get_docstring(child)
            if text is not None:
                found[name] = text
            found |= documented(child, f"{name}.")
    return found


def test_the_stub_says_what_help_says() -> None:
    stub = resources.files("ppv2").joinpath("_native.pyi").read_text(encoding="utf-8")
    found = documented(ast.parse(stub))
    assert len(found) > 30
    for name, text in found.items():
        item: object = _native
        for part in name.split("."):
            item = inspect.getattr_static(item, part)
        assert text == inspect.getdoc(item), name


def test_everything_public_is_documented() -> None:
    for name in ppv2.__all__:
        if name not in ("__version__", "Address"):
            assert getattr(ppv2, name).__doc__, name
    for of in (ppv2.Header, ppv2.Socket, ppv2.Ssl):
        for name in dir(of):
            item = inspect.getattr_static(of, name)
            if inspect.isgetsetdescriptor(item) or inspect.ismethoddescriptor(item):
                assert name.startswith("_") or item.__doc__, name


def test_the_example_of_help_is_true() -> None:
    tried = doctest.testmod(ppv2, verbose=False, raise_on_error=True)
    assert tried.attempted > 3


def test_the_examples_of_the_readme_run() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_versions_agree() -> None:
    assert ppv2.__version__ == importlib.metadata.version("ppv2")
    requirements = importlib.metadata.requires("ppv2") or []
    assert all("extra ==" in requirement for requirement in requirements)


def test_public_names_are_spelled_as_public() -> None:
    for name in ppv2.__all__:
        item = getattr(ppv2, name)
        if inspect.isclass(item):
            assert item.__module__ == "ppv2", name
