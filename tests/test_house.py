"""Both scripts are laid out as their maps say, and stay small enough in each room to be read."""

from __future__ import annotations

import ast
import re
import symtable
import tomllib
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import image_gen
import pytest
import remove_chroma_key
from cli import SCRIPTS

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("image_gen.py", "remove_chroma_key.py")
BANNER = re.compile(r"^# ── (\d+)([a-z]?) · (.+?) ─+$", re.MULTILINE)
MAP_LINE = re.compile(r"^ +(\d+)([a-z]?) +(\S.*?)(?:  .*)?$", re.MULTILINE)
COMPOUND = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
Function = ast.FunctionDef | ast.AsyncFunctionDef

GUARD = "if sys.version_info < "  # stands right below the version of the script

MOST_LINES = 45
MOST_PARAMETERS = 5
MOST_NESTING = 5


class Section(NamedTuple):
    """A part of a script below its banner."""

    number: tuple[int, str]
    title: str
    line: int


@cache
def source(name: str) -> str:
    return (SCRIPTS / name).read_text(encoding="utf-8")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(source(name))


@cache
def sections(name: str) -> list[Section]:
    text = source(name)
    return [
        Section((int(found[1]), found[2]), found[3], text.count("\n", 0, found.start()) + 1)
        for found in BANNER.finditer(text)
    ]


def functions(name: str) -> list[Function]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, Function)]


def rank(name: str, line: int) -> int:
    """Which section a line stands in; 0 is above the first."""
    return sum(section.line <= line for section in sections(name))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when the file is loaded: also what stands below an if, a try, a with or a for."""
    for statement in body:
        yield statement
        if isinstance(statement, COMPOUND):
            inner = [part for part in ast.iter_child_nodes(statement) if isinstance(part, ast.stmt)]
            yield from statements(inner)


def definitions(name: str) -> dict[str, int]:
    """The names that the script binds at its top level, with the ranks of their sections.

    A name that is bound twice counts where it has its last value.
    """
    found: dict[str, int] = {}
    for statement in statements(tree(name).body):
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[statement.name] = rank(name, statement.lineno)
        else:
            targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
            for target in targets:
                found |= {word: rank(name, line) for word, line in words(target or ast.Pass())}
    return found


def words(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names below a node, and their lines."""
    return ((part.id, part.lineno) for part in ast.walk(node) if isinstance(part, ast.Name))


def uses(name: str) -> Iterator[tuple[str, int]]:
    """The global names that functions, tables and annotations mention, and their lines."""
    scopes = symtable.symtable(source(name), name, "exec").get_children()
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield symbol.get_name(), scope.get_lineno()
    for node in ast.walk(tree(name)):
        for annotation in (getattr(node, "returns", None), getattr(node, "annotation", None)):
            yield from words(annotation or ast.Pass())
    for statement in statements(tree(name).body):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            yield from words(statement.value or ast.Pass())


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep compound statements stand in each other; elif is no deeper than its if."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deeper = isinstance(child, COMPOUND) and not is_elif
        deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def parameters(function: Function) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


@pytest.mark.parametrize("name", NAMES)
def test_the_map_in_the_docstring_lists_the_banners_of_the_file(name: str) -> None:
    text = ast.get_docstring(tree(name), clean=False) or ""
    shown = MAP_LINE.findall(text[text.index("The file, from top to bottom") :])
    assert [(int(number), letter, title) for number, letter, title in shown] == [
        (*section.number, section.title[0].lower() + section.title[1:])
        for section in sections(name)
    ]
    ruled = re.findall(r"^# ?(?:[─=]|--+ ).*$", source(name), re.MULTILINE)
    assert len(ruled) == len(sections(name)), "a banner is numbered, and of one form"


@pytest.mark.parametrize("name", NAMES)
def test_sections_are_numbered_in_their_order(name: str) -> None:
    numbers = [section.number for section in sections(name)]
    assert numbers[0] == (1, "")
    for (before, letter), (after, sub_letter) in pairwise(numbers):
        follows = (after, sub_letter) == (before + 1, "")
        is_room = after == before and sub_letter == (chr(ord(letter) + 1) if letter else "a")
        assert follows or is_room, f"{after}{sub_letter} behind {before}{letter}"


@pytest.mark.parametrize("name", NAMES)
def test_a_section_uses_only_what_stands_above_it(name: str) -> None:
    defined = definitions(name)
    early = {use for use in uses(name) if defined.get(use[0], 0) > rank(name, use[1])}
    assert not early


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short_and_shallow_and_take_few_parameters(name: str) -> None:
    too_much = []
    for function in functions(name):
        lines = (function.end_lineno or 0) - function.lineno + 1
        taken, depth = parameters(function), nesting(function)
        if lines > MOST_LINES or taken > MOST_PARAMETERS or depth > MOST_NESTING:
            too_much.append(f"{function.name}: {lines} lines, {taken} parameters, {depth} deep")
    assert not too_much


@pytest.mark.parametrize("name", NAMES)
def test_no_function_imports_anything(name: str) -> None:
    late = [
        f"{function.name}, line {node.lineno}"
        for function in functions(name)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not late


@pytest.mark.parametrize("name", NAMES)
def test_the_process_is_left_on_the_last_line_only(name: str) -> None:
    lines = source(name).rstrip().splitlines()
    assert lines[-1] == "    sys.exit(main())"
    # But for an older Python, which could not read the rest.
    body = tree(name).body
    guards = [
        node
        for above, node in pairwise(body)
        if ast.unparse(above).startswith("__version__ = ") and ast.unparse(node).startswith(GUARD)
    ]
    guarded = {line for node in guards for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    rest = [line for number, line in enumerate(lines[:-1], start=1) if number not in guarded]
    assert not [line for line in rest if "sys.exit" in line or "SystemExit" in line]


def test_the_scripts_and_the_package_have_one_version() -> None:
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"attr": "image_gen.__version__"}}
    assert image_gen.__version__ == remove_chroma_key.__version__
    log = (SCRIPTS.parent / ".github/CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", log, re.MULTILINE)[1] == image_gen.__version__  # type: ignore[index]
