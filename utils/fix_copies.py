# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Keeps `pipeline_muse_xl.py` in step with `pipeline_muse.py`: diffusers loads each by itself, so neither can import.

Whatever stands in the one under `# Copied from pipeline_muse.<name>` is written anew from the other, with names
replaced where the comment goes on with `with Old->New, Older->Newer`. `--check` only tells what is out of step.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
ORIGINAL = REPOSITORY / "pipeline_muse.py"
COPY = REPOSITORY / "pipeline_muse_xl.py"

MARK = re.compile(r"^\s*# Copied from pipeline_muse\.([\w.]+)(?: with (.+))?$")


@dataclass(frozen=True)
class Piece:
    """A function, class or constant of a file: its qualified name, its syntax, and its lines, [start, end)."""

    name: str
    node: ast.stmt
    start: int
    end: int


def pieces(source: str) -> dict[str, Piece]:
    """All pieces of a module, and those of its classes, by qualified name."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[Piece]:
        for node in body:
            name = None
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
            if name is None:
                continue
            decorators = getattr(node, "decorator_list", [])
            start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
            yield Piece(prefix + name, node, start, node.end_lineno or node.lineno)
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{name}.")

    return {piece.name: piece for piece in walk(ast.parse(source).body, "")}


def rename(text: str, replacements: str | None) -> str:
    """`text` with the beginnings of words replaced, as `Old->New, Older->Newer` says; the first that fits counts."""
    pairs = dict(pair.split("->") for pair in (replacements or "").split(", ") if pair)
    if not pairs:
        return text
    return re.sub(rf"\b({'|'.join(map(re.escape, pairs))})", lambda match: pairs[match[1]], text)


def marked(source: str) -> Iterator[tuple[Piece, str, str | None]]:
    """Each piece under a mark, the name that it is copied from, and the replacements."""
    by_line = {piece.start: piece for piece in pieces(source).values()}
    for number, line in enumerate(source.splitlines()):
        if match := MARK.match(line):
            if number + 1 not in by_line:
                raise ValueError(f"Line {number + 1}: no function, class or constant follows {line.strip()!r}.")
            yield by_line[number + 1], match[1], match[2]


def fixed(copy: str, original: str) -> str:
    """The text of `copy` with every marked piece as `original` has it."""
    sources, lines = pieces(original), copy.splitlines()
    original_lines = original.splitlines()
    for piece, name, replacements in sorted(marked(copy), key=lambda entry: -entry[0].start):
        if name not in sources:
            raise ValueError(f"{ORIGINAL.name} has no {name!r}, from which {piece.name} claims to be copied.")
        source = sources[name]
        text = "\n".join(original_lines[source.start : source.end])
        lines[piece.start : piece.end] = rename(text, replacements).splitlines()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is out of step")
    args = parser.parse_args()
    before = COPY.read_text(encoding="utf-8")
    after = fixed(before, ORIGINAL.read_text(encoding="utf-8"))
    if before == after:
        return
    if args.check:
        sys.exit(f"{COPY.name} is out of step with {ORIGINAL.name}: run `make fix-copies`.")
    COPY.write_text(after, encoding="utf-8")
    print(f"{COPY.name} brought in step with {ORIGINAL.name}")


if __name__ == "__main__":
    main()
