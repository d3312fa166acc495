"""The mutants of a file: its source with one operator, number, truth or condition changed by cosmic-ray."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator

MODULES = (
    "binary_operator_replacement",
    "boolean_replacer",
    "break_continue",
    "comparison_operator_replacement",
    "number_replacer",
    "unary_operator_replacement",
    "zero_iteration_for_loop",
)
"""The modules of cosmic-ray whose operators are taken."""
REPLACED = {
    "Binary": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Add Pow_Mul BitAnd_BitOr BitOr_BitAnd LShift_RShift",
    "Comparison": "Lt_LtE Lt_Gt LtE_Lt LtE_Gt Gt_GtE Gt_Lt GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "Unary": "USub_UAdd Invert_UAdd Delete_Not",
}
"""One or two replacements of each operator; cosmic-ray has those of all pairs, which the same tests would find."""

Place = tuple[int, int]
"""Line, counted from 1, and column."""


@dataclass(frozen=True)
class Mutant:
    """A changed source."""

    line: int
    column: int
    operator: str
    number: int
    """The occurrence of the operator that was changed."""
    source: str

    def change(self, original: str) -> str:
        """The first line that is changed, before and after."""
        lines = zip(original.splitlines(), self.source.splitlines(), strict=False)
        return next(f"{old.strip()} → {new.strip()}" for old, new in lines if old != new)


def operators() -> Iterator[Operator]:
    wanted = {f"Replace{kind}Operator_{name}" for kind, names in REPLACED.items() for name in names.split()}
    pairs = tuple(f"Replace{kind}Operator_" for kind in REPLACED)
    for module in (importlib.import_module(f"cosmic_ray.operators.{name}") for name in MODULES):
        for one in getattr(module, "operators", vars(module).values)():
            if not inspect.isclass(one) or not issubclass(one, Operator) or inspect.isabstract(one):
                continue
            if one.__name__ in wanted or not one.__name__.startswith((*pairs, "KeywordReplacement")):
                yield one()


def annotations(source: str) -> list[tuple[Place, Place]]:
    """Return where annotations begin and end, which nothing runs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for one in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(one, ast.expr):
                found.append(((one.lineno, one.col_offset), (one.end_lineno or 0, one.end_col_offset or 0)))
    return found


def find_mutants(path: Path) -> list[Mutant]:
    """Return all mutants of a file that can be compiled and differ from it then, in the order of its lines."""
    source = path.read_text(encoding="utf-8")
    spared, original, mutants = annotations(source), compile(source, path, "exec"), []
    for operator in operators():
        places: list[Place] = [at for node in ast_nodes(get_ast(source)) for at, _ in operator.mutation_positions(node)]
        for number, place in enumerate(places):
            if any(begin <= place < end for begin, end in spared):
                continue
            changed = mutate_code(source, operator, number)
            try:
                if compile(changed, path, "exec") == original:
                    continue
            except SyntaxError:
                continue
            mutants.append(Mutant(*place, type(operator).__name__, number, changed))
    return sorted(mutants, key=lambda mutant: (mutant.line, mutant.column, mutant.operator, mutant.number))
