"""Small wrong changes to Python source, for scripts/mutate.py: one operator, constant, argument or statement at a time.

Left alone are annotations, docstrings, strings (most of them are messages), f-strings and `if __name__ == "__main__"`.
"""

import ast
import copy
import difflib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    """Path from the root of the repository, with forward slashes."""
    kind: str
    start: int
    """Offset in the source, in characters, of what is replaced; `end` is behind it."""
    end: int
    text: str
    """What stands there instead."""
    source: str = field(repr=False)
    function: str = ""
    """Dotted name of the innermost function around it; empty at the level of the module."""

    def apply(self) -> str:
        return self.source[: self.start] + self.text + self.source[self.end :]

    @property
    def line(self) -> int:
        return self.source.count("\n", 0, self.start) + 1

    def changed_lines(self) -> tuple[list[str], list[str]]:
        """Return the lines that go and those that come, without indentation."""
        rows = list(difflib.ndiff(self.source.splitlines(), self.apply().splitlines()))
        return tuple([row[2:].strip() for row in rows if row.startswith(sign)] for sign in ("- ", "+ "))

    def diff(self) -> str:
        lines = difflib.unified_diff(
            self.source.splitlines(), self.apply().splitlines(), self.file, self.file, lineterm="", n=1
        )
        return "\n".join(lines)

    @property
    def key(self) -> str:
        """A name that is the same as long as the file and the change are."""
        content = "\0".join((self.file, str(self.start), str(self.end), self.text, self.source))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def alternatives(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (kind, node that takes this one's place)."""

    def changed(**fields) -> ast.AST:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Compare(ops=[operator]):
            for other in COMPARISONS[type(operator)]:
                yield "comparison", changed(ops=[other()])
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator):
            for other in ARITHMETIC.get(type(operator), ()):
                yield "arithmetic", changed(op=other())
        case ast.BoolOp(op=operator):
            yield "boolean", changed(op=ast.Or() if isinstance(operator, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "sign", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(2 * value or 1.0)
        case ast.IfExp(test=test):
            yield "condition", changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=value) if value is not None and not is_none(value):
            yield "return", ast.Return(ast.Constant(None))
    if isinstance(node, ast.Call):
        for place, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield "keyword", changed(keywords=node.keywords[:place] + node.keywords[place + 1 :])
        first_two = node.args[:2]
        if len(first_two) == 2 and not any(isinstance(item, ast.Starred) for item in first_two):
            yield "arguments", changed(args=[first_two[1], first_two[0], *node.args[2:]])
    if drops(node):
        yield "statement", ast.Pass()


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def drops(node: ast.AST) -> bool:
    """Return True for a statement that may go without leaving a name undefined."""
    match node:
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Assert() | ast.Continue() | ast.Break():
            return True
        case ast.Expr(value=value):
            return not isinstance(value, ast.Constant)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return True
    return False


def children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below this one that may be changed."""
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == "__name__":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def find_mutants(source: str, file: str) -> list[Mutant]:
    """Return every mutant of a file, outer expressions before inner ones."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def offset(line: int, column: int) -> int:  # ast counts columns in bytes of UTF-8
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if hasattr(node, "end_lineno"):
            start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
            for kind, other in alternatives(node):
                text = ast.unparse(other)
                text = f"({text})" if isinstance(other, ast.expr) and not atomic(other) else text
                found.append(Mutant(file, kind, start, end, text, source, function))
        for child in children(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


def atomic(node: ast.expr) -> bool:
    """Return True for an expression that needs no brackets wherever it stands."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, int | float) or isinstance(node.value, bool) or node.value >= 0
    return isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript)


def draw(found: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Return `number` different mutants, every kind drawn equally often as long as it lasts."""
    rng, kinds = random.Random(seed), {}
    for mutant in found:
        kinds.setdefault(mutant.kind, []).append(mutant)
    drawn = []
    while kinds and len(drawn) < number:
        kind = rng.choice(sorted(kinds))
        mutant = kinds[kind].pop(rng.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        if ast.dump(ast.parse(mutant.apply())) != ast.dump(ast.parse(mutant.source)):
            drawn.append(mutant)
    return drawn
