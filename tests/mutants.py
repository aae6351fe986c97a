"""Small errors in a source file, each of the kind that a slip of the hand makes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
}  # fmt: skip
PAIRS = [("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("clamp_min", "clamp_max"), ("any", "all")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


@dataclass(frozen=True)
class Mutant:
    """A change of one place: what stood there and what stands there now; `source` is the whole file."""

    file: str
    line: int
    column: int
    old: str
    new: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.old}  ->  {self.new}"


def _skipped(node: ast.AST) -> bool:
    """What no test of results could tell: messages, annotations, and what only tracing calls."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    decorators = getattr(node, "decorator_list", [])
    return any("register_fake" in ast.unparse(decorator) for decorator in decorators)


def _places(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run, docstrings, annotations and decorators left out."""
    if _skipped(node):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not docstring:
                yield from _places(child)


def _added(bound: ast.expr | None, by: int) -> ast.expr:
    return ast.Constant(by) if bound is None else ast.BinOp(bound, ast.Add(), ast.Constant(by))


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one slip in it."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(new.ops[0])]()
        yield new
    elif isinstance(new, ast.BinOp) and type(new.op) in OPERATORS:
        new.op = OPERATORS[type(new.op)]()
        yield new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, (ast.Not, ast.Invert, ast.USub)):
        yield new.operand
    elif isinstance(new, ast.Constant) and type(new.value) in (int, float):
        yield ast.Constant({0: 1, 1: 0}.get(new.value, new.value + 1))
    elif isinstance(new, ast.keyword) and isinstance(new.value, ast.Constant) and isinstance(new.value.value, bool):
        new.value = ast.Constant(not new.value.value)
        yield new
    elif isinstance(new, ast.keyword) and new.arg in NAMES:
        new.arg = NAMES[new.arg]
        yield new
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in NAMES:
        new.func.id = NAMES[new.func.id]
        yield new
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute) and new.func.attr in (*NAMES, "detach"):
        if new.func.attr == "detach":
            yield new.func.value
        else:
            new.func.attr = NAMES[new.func.attr]
            yield new
    elif isinstance(new, ast.Slice) and (new.lower or new.upper):
        yield ast.Slice(_added(new.lower, 1), new.upper, new.step)
        if new.upper is not None:
            yield ast.Slice(new.lower, _added(new.upper, -1), new.step)


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _text(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 90 else text[:87] + "..."


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    tree = ast.parse(source)
    for node in list(_places(tree)):
        for new in _variants(node):
            swapped = ast.unparse(ast.fix_missing_locations(_Swap(node, new).visit(tree)))
            _Swap(new, node).visit(tree)
            anchor = node
            while not hasattr(anchor, "lineno"):  # a slice's bounds have a place, it has none
                anchor = next(ast.iter_child_nodes(anchor))
            yield Mutant(file, anchor.lineno, anchor.col_offset, _text(node), _text(new), swapped)
