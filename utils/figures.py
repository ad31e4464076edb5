# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Prints how large the pipeline files are: lines of code, functions, parameters, checks.

Code is what is left without docstrings, comments and blank lines. Checks are the functions named `check_...`,
`_check_...` and `refuse`, and every `if` elsewhere whose body ends in a `raise`. A parameter is one besides `self`.
"""

import ast
import statistics
from pathlib import Path

from fix_copies import COPY, ORIGINAL, region


def code_lines(source: str) -> set[int]:
    """The numbers of the lines of code of a module."""
    docstrings: set[int] = set()
    for part in ast.walk(ast.parse(source)):
        if isinstance(part, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part, clean=False):
            docstrings.update(range(part.body[0].lineno, (part.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return {n for n, line in lines if line.strip() and not line.strip().startswith("#")} - docstrings


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_check(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name.lstrip("_").startswith("check_") or node.name == "refuse"
    return isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)


def parameters(function: ast.FunctionDef) -> int:
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def figures(path: Path) -> dict[str, str]:
    """Name of a figure -> its value for a pipeline file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    code = code_lines(source)
    bodies = {node: len(code & lines_of(node)) for node in functions}
    longest = max(functions, key=bodies.__getitem__)
    call = max((node for node in functions if node.name == "__call__"), key=parameters)
    checks = [code & lines_of(node) for node in ast.walk(tree) if isinstance(node, ast.stmt) and is_check(node)]
    private = max((node for node in functions if is_private(node.name)), key=parameters)
    first = call.body[1].lineno
    return {
        "code lines": str(len(code)),
        "of which checks": str(len(set().union(*checks))),
        "outside of the shared region": str(len(code_lines(source.replace(region(source), "")))),
        "functions": str(len(functions)),
        "median and longest function": f"{statistics.median(bodies.values()):g}, {bodies[longest]} ({longest.name})",
        "body of __call__": str(len([line for line in code & lines_of(call) if line >= first])),
        "most parameters of a private function": f"{parameters(private)} ({private.name})",
    }


def main() -> None:
    rows = [figures(path) for path in (ORIGINAL, COPY)]
    print(f"{'':40}{ORIGINAL.name:>28}{COPY.name:>28}")
    for name in rows[0]:
        print(f"{name:40}{rows[0][name]:>28}{rows[1][name]:>28}")


if __name__ == "__main__":
    main()
