"""Build the standard-library quiz in `calib_data/quiz`: multiple-choice questions in the MMLU CSV layout.

    python reference_model/build_quiz.py [--output calib_data/quiz]

Facts come from the same source files as the text source `python-docs` (its calibration split only): which module
defines a function, which class a method, what a one-line docstring describes, and so on. The choice is a function
of the interpreter's version alone; the committed files were made with CPython 3.11.

Every question has exactly one right answer among all right answers of its subject, so that any three others can
serve as distractors: names defined twice anywhere in the standard library are never asked about.
"""

from __future__ import annotations

import argparse
import ast
import csv
import random
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_compress.calibration.python_docs import definitions, module_files, parse_module, split_of

DEV_ROWS = 5
TEST_ROWS = 55
LETTERS = "ABCD"
OBSCURE = ("distutils", "lib", "this", "antigravity", "pydoc_data")
SPECIAL_METHODS = """
x + y:add|x - y:sub|x * y:mul|x @ y:matmul|x / y:truediv|x // y:floordiv|x % y:mod|x ** y:pow|x << y:lshift
x >> y:rshift|x & y:and|x ^ y:xor|x | y:or|x += y:iadd|x -= y:isub|x *= y:imul|x @= y:imatmul|x /= y:itruediv
x //= y:ifloordiv|x %= y:imod|x **= y:ipow|x <<= y:ilshift|x >>= y:irshift|x &= y:iand|x ^= y:ixor|x |= y:ior
-x:neg|+x:pos|~x:invert|abs(x):abs|len(x):len|bool(x):bool|int(x):int|float(x):float|complex(x):complex
round(x):round|hash(x):hash|repr(x):repr|str(x):str|bytes(x):bytes|format(x):format|iter(x):iter|next(x):next
reversed(x):reversed|dir(x):dir|divmod(x, y):divmod|x < y:lt|x <= y:le|x == y:eq|x != y:ne|x > y:gt|x >= y:ge
x[y]:getitem|x[y] = z:setitem|del x[y]:delitem|y in x:contains|x():call|x.y = z:setattr|del x.y:delattr
isinstance(y, x):instancecheck|issubclass(y, x):subclasscheck|await x:await|async for y in x:aiter
math.trunc(x):trunc|math.floor(x):floor|math.ceil(x):ceil|operator.index(x):index
"""


@dataclass(frozen=True)
class Fact:
    """A question and its right answer; `group` limits how many facts may share it."""

    question: str
    answer: str
    group: str


@dataclass
class Definition:
    """A class or function at the top of a module."""

    module: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    methods: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The docstring's one-line summary, empty where it has none."""
        return first_line(ast.get_docstring(self.node))


def first_line(docstring: str | None) -> str:
    """Return a docstring's first paragraph without its full stop where it is one line of one sentence, or nothing."""
    line = (docstring or "").strip().partition("\n\n")[0].strip().rstrip(".")
    return "" if "\n" in line or ". " in line else line


def describes(summary: str, name: str) -> bool:
    """Say whether a summary is short, complete and does not give the name away."""
    complete = 15 <= len(summary) <= 70 and summary[0].isupper() and summary[-1] not in ":,-(" and '"' not in summary
    plain = summary.isascii() and "(" not in summary and "=" not in summary
    parts = [part for part in name.lower().replace(".", "_").split("_") if len(part) > 2]
    return complete and plain and not any(part in summary.lower() for part in parts)


def public(name: str) -> bool:
    """Say whether a name is public and short enough to ask about."""
    return not name.startswith("_") and 3 <= len(name) <= 20


class Library:
    """Everything the quiz asks about, read from the standard library's sources."""

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self.classes: list[Definition] = []
        self.functions: list[Definition] = []
        self.uses: Counter[str] = Counter()
        self.parameter_uses: Counter[str] = Counter()
        for name, path in module_files().items():
            tree = parse_module(path)
            if tree is not None:
                self._read(name, tree)

    def _read(self, module: str, tree: ast.Module) -> None:
        asked = public_module(module) and split_of(module) != "held-out"
        if asked:
            self.modules[module] = first_line(ast.get_docstring(tree))
        for name in {node.name for node in definitions(tree)}:
            self.uses[name] += 1
        for node in definitions(tree):
            found = Definition(module, node)
            if isinstance(node, ast.ClassDef):
                members = {member.name for member in definitions(node)}
                found.methods = sorted(
                    {member.name for member in definitions(node) if ast.get_docstring(member) and public(member.name)}
                )
                for name in members:
                    self.uses[name] += 1
                target = self.classes
            else:
                for argument in {*node.args.args, *node.args.kwonlyargs}:
                    self.parameter_uses[argument.arg] += 1
                target = self.functions
            if asked and public(node.name):
                target.append(found)

    def unique(self, name: str) -> bool:
        """Say whether a name is defined exactly once in the whole standard library."""
        return self.uses[name] == 1


def public_module(name: str) -> bool:
    """Say whether a module is public and one that readers of the documentation meet."""
    parts = name.split(".")
    return parts[0] not in OBSCURE and not any(part.startswith("_") for part in parts)


def is_exception(definition: Definition) -> bool:
    """Say whether a class is an exception, judged by its name."""
    return definition.node.name.endswith(("Error", "Exception", "Warning"))


def facts_by_subject(library: Library) -> dict[str, list[Fact]]:
    """Return every fact that may be asked, by subject."""
    facts: dict[str, list[Fact]] = defaultdict(list)
    for line in SPECIAL_METHODS.strip().splitlines():
        for entry in line.replace("x | y", "x OR y").replace("x |= y", "x OR= y").split("|"):
            expression, _, method = entry.replace("OR", "|").rpartition(":")
            facts["special_methods"].append(Fact(f"Which method implements {expression}?", f"__{method}__", method))

    for module, summary in library.modules.items():
        if "." not in module and describes(summary, module):
            facts["module_summaries"].append(Fact(f"Which module is this: {summary}?", module, module))
        package, _, submodule = module.partition(".")
        if submodule and public(submodule) and sum(m.split(".")[-1] == submodule for m in module_files()) == 1:
            facts["package_modules"].append(Fact(f"Which package contains {submodule}?", package, package))

    for definition in library.functions:
        name, module, node = definition.node.name, definition.module, definition.node
        assert not isinstance(node, ast.ClassDef)
        if not library.unique(name) or not ast.get_docstring(node):
            continue
        if "." not in module:
            facts["function_modules"].append(Fact(f"Which module defines {name}()?", module, module))
            facts["module_functions"].append(Fact(f"Which function is in {module}?", f"{name}()", f"{name}()"))
        if describes(definition.summary, name):
            facts["function_summaries"].append(Fact(f"Which function is this: {definition.summary}?", name, name))
        for argument in node.args.args:
            if library.parameter_uses[argument.arg] == 1 and public(argument.arg):
                facts["function_parameters"].append(Fact(f"Which function takes {argument.arg}?", name, name))

    for definition in library.classes:
        name, module, node = definition.node.name, definition.module, definition.node
        assert isinstance(node, ast.ClassDef)
        if not library.unique(name):
            continue
        if "." not in module:
            subject = "exception_modules" if is_exception(definition) else "class_modules"
            kind = "exception" if is_exception(definition) else "class"
            facts[subject].append(Fact(f"Which module defines the {kind} {name}?", module, module))
        if describes(definition.summary, name):
            facts["class_summaries"].append(Fact(f"Which class is this: {definition.summary}?", name, name))
        if len(node.bases) == 1 and isinstance(node.bases[0], ast.Name) and public(node.bases[0].id):
            base = node.bases[0].id
            facts["base_classes"].append(Fact(f"What is the direct base class of {name}?", base, base))
        own = [method for method in definition.methods if library.unique(method)]
        for method in own:
            facts["method_classes"].append(Fact(f"Which class defines the method {method}?", name, name))
            facts["class_methods"].append(Fact(f"Which method does {name} define?", method, method))
    return facts


def choose(facts: list[Fact], count: int, per_group: int) -> list[Fact]:
    """Choose facts by a hash of their text: no question twice, no answer more often than `per_group`."""
    ranked = sorted(facts, key=lambda fact: (zlib.crc32(fact.question.encode() + fact.answer.encode()), fact.question))
    chosen: list[Fact] = []
    questions: set[str] = set()
    groups: Counter[str] = Counter()
    for fact in ranked:
        if fact.question not in questions and groups[fact.group] < per_group and len(chosen) < count:
            chosen.append(fact)
            questions.add(fact.question)
            groups[fact.group] += 1
    return chosen


def rows(facts: list[Fact], subject: str) -> list[list[str]]:
    """Turn facts into CSV rows: three distractors from the other answers, right letters evenly spread."""
    rng = random.Random(zlib.crc32(subject.encode()))
    pool = sorted({fact.answer for fact in facts})
    letters = [LETTERS[i % 4] for i in range(len(facts) - DEV_ROWS)]
    rng.shuffle(letters)
    dev_letters = [*LETTERS, rng.choice(LETTERS)]
    rng.shuffle(dev_letters)
    table = []
    for fact, letter in zip(facts, [*dev_letters, *letters], strict=True):
        options = rng.sample([answer for answer in pool if answer != fact.answer], 3)
        options.insert(LETTERS.index(letter), fact.answer)
        table.append([fact.question, *options, letter])
    return table


def write(path: Path, table: list[list[str]]) -> None:
    """Write rows as a CSV file without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(table)


def main() -> None:
    """Write `dev/<subject>.csv` and `test/<subject>.csv` for every subject with enough facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("calib_data/quiz"), help="folder to write to")
    output: Path = parser.parse_args().output
    for subject, facts in sorted(facts_by_subject(Library()).items()):
        one_to_one = subject.endswith(("_methods", "_summaries", "_parameters", "_functions"))
        per_group = 1 if one_to_one else 12 if subject == "package_modules" else 7
        chosen = choose(facts, DEV_ROWS + TEST_ROWS, per_group)
        if len(chosen) < DEV_ROWS + TEST_ROWS:
            print(f"{subject}: only {len(chosen)} of {len(facts)} facts usable, left out")
            continue
        table = rows(chosen, subject)
        write(output / "dev" / f"{subject}.csv", table[:DEV_ROWS])
        write(output / "test" / f"{subject}.csv", table[DEV_ROWS:])
        print(f"{subject}: {len(chosen)} questions, {len({fact.answer for fact in chosen})} answers")


if __name__ == "__main__":
    main()
