"""The value of an arithmetic expression that a model wrote: parsed and computed exactly, never executed."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_DEPTH = 50
MAX_BITS = 4096  # of the numerator and the denominator of every intermediate value
MAX_EXPONENT = 100

_BINARY: dict[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def value(text: str) -> Fraction | None:
    """The exact value of an expression of numbers, + - * / // % **, and parentheses, as Python reads it.

    None for everything else: other syntax, a division by zero, an expression of more than MAX_CHARACTERS or deeper than
    MAX_DEPTH, a value of more than MAX_BITS bits, an exponent that is not a whole number or beyond MAX_EXPONENT.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, text, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str, depth: int) -> Fraction:
    """Raises ValueError or ArithmeticError if there is no value."""
    if not depth:
        raise ValueError("too deep")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # From the digits as written, so that 0.1 is exactly a tenth; a float is not.
        written = ast.get_source_segment(text, node) or ""
        if "e" in written.lower() and abs(int(written.lower().partition("e")[2])) > MAX_EXPONENT:
            raise ValueError("a large exponent")
        return _bounded(Fraction(written))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _value(node.operand, text, depth - 1)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text, depth - 1), _value(node.right, text, depth - 1)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > MAX_EXPONENT:
                raise ValueError("a large exponent")
            bits = max(left.numerator.bit_length(), left.denominator.bit_length())
            if bits * abs(right) > MAX_BITS:
                raise ValueError("a large number")
            return Fraction(left ** int(right))
        if type(node.op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    raise ValueError("no arithmetic")


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
        raise ValueError("a large number")
    return number
