"""The published harness's rules for mathematics, by its description: two normal forms of an answer, then SymPy.

An answer is right if its text equals the truth's after the first normal form (that of the MATH release: spaces, units
on the right, degrees, dollars, percent, `x =`, braces of fractions and roots) or the second (that of prm800k: text,
units by name, thousands separators, mixed numbers, LaTeX turned into text, letters' case). Otherwise tuples and
intervals must have the same brackets and as many elements, and each pair of elements must be equal under SymPy;
integers and numeric fractions must be the same text, so that 2/4 is not 1/2.

These functions can hang (SymPy does); `workers` runs them where they can be killed.
"""

from __future__ import annotations

import re

_UNITS = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot",
    "feet", "inch", "yard",
)  # fmt: skip
_SIGNS = {"√": "sqrt", "π": "pi", "∞": "inf", "\N{UNION}": "U", "·": "*", "\N{MULTIPLICATION SIGN}": "*"}
_BRACKETS = "()[]"


def last_boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{...}`, braces matched; None if there is none or it is not closed."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0 and text[position] == "}":
            return text[start + len("\\boxed{") : position]
    return None


def is_right(answer: str, truth: str) -> bool:
    """Whether the published harness counts `answer` (`last_boxed`) as `truth`."""
    if _release_form(answer) == _release_form(truth):
        return True
    answer, truth = _text_form(answer), _text_form(truth)
    if answer == truth:
        return True
    if not answer:
        return False
    answers, truths = _elements(answer), _elements(truth)
    if len(truths) > 1 and (answer[0] != truth[0] or answer[-1] != truth[-1]):
        return False
    return len(answers) == len(truths) and all(map(_same_element, answers, truths))


# ---------------------------------------------------------------- the first normal form


def _release_form(text: str) -> str:
    text = text.strip()
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1].strip()
    try:
        return _stripped(text)
    except ValueError:  # the rules stop: such a text stays as it is
        return text


def _stripped(text: str) -> str:
    """The rules in their order; ValueError at two units, and at a root or a fraction of nothing."""
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\$", ""),
    ):
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")  # what is in \text{ ...} on the right is a unit
    if len(units) > 1:
        raise ValueError("two units")
    text = text.replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # x = 3
        text = sides[1]
    if "" in text.split("\\sqrt")[1:]:
        raise ValueError("a root of nothing")
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _with_braces(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    if re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text):
        above, below = text.split("/")
        return f"\\frac{{{above}}}{{{below}}}"
    return text


def _with_braces(text: str) -> str:
    r"""\frac12 as \frac{1}{2}, \frac1{72} as \frac{1}{72}."""
    head, *tails = text.split("\\frac")
    if "" in tails:
        raise ValueError("a fraction of nothing")
    for i, tail in enumerate(tails):
        if tail.startswith("{"):
            continue
        if len(tail) < 2:
            return text
        tails[i] = f"{{{tail[0]}}}{tail[1:]}" if tail[1] == "{" else f"{{{tail[0]}}}{{{tail[1]}}}{tail[2:]}"
    return "\\frac".join([head, *tails])


# ---------------------------------------------------------------- the second normal form


def _text_form(text: str) -> str:
    if whole := re.search(r"^\\text\{(.+?)\}$", text):
        text = whole[1]
    text = text.replace("\\%", "%").replace("\\$", "$").replace("$", "").replace("%", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, factor in (("million", "*10^6"), ("billion", "*10^9"), ("trillion", "*10^12")):
        text = text.replace(word, factor)
    for unit in _UNITS:
        text = re.sub(rf"{unit}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text and text[0] == "{" and text[-1] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    if _is_integer(text):
        text = str(round(float(text)))
    if "\\" in text:
        text = _latex_as_text(text)
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)  # mixed numbers: 7 3/4 is 7+3/4
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    if _is_integer(_without_separators(text)):
        text = str(int(float(text.replace(",", ""))))
    return text


def _latex_as_text(text: str) -> str:
    from pylatexenc import latex2text

    latex = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    try:
        latex = latex2text.LatexNodes2Text().latex_to_text(latex)
    except Exception:  # the parser raises many kinds; what it cannot read is compared as it stands
        return text
    for sign, name in _SIGNS.items():
        latex = latex.replace(sign, name)
    return latex.strip()


def _is_integer(text: str) -> bool:
    try:
        value = float(text)
        return abs(value - round(value)) <= 1e-7
    except (ValueError, OverflowError):  # no number; an infinite one
        return False


def _without_separators(text: str) -> str:
    """1,000,000 as 1000000; (1,2) stays."""
    while (shorter := re.sub(r"(\d),(\d\d\d)($|\D)", r"\1\2\3", text)) != text:
        text = shorter
    return text


# ---------------------------------------------------------------- elements


def _elements(text: str) -> list[str]:
    text = _without_separators(text)
    if not text:
        return []
    inside = text[1:-1]
    if len(text) > 2 and text[0] in _BRACKETS and text[-1] in _BRACKETS and not set(inside) & set(_BRACKETS):
        return [element.strip() for element in inside.split(",")]
    return [text]


def _same_element(answer: str, truth: str) -> bool:
    fraction = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
    if fraction.search(answer) and fraction.search(truth):
        return answer == truth
    if _is_integer(_without_separators(answer)) != _is_integer(_without_separators(truth)):
        return False
    return _equal_in_sympy(answer, truth)


def _equal_in_sympy(answer: str, truth: str) -> bool:
    import sympy
    from sympy.parsing import sympy_parser

    difference = f"({truth})-({answer})"
    letters = {sign for sign in difference.replace("sqrt", "").replace("frac", "") if sign.isalpha()}
    if len(letters) > 2 or re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+", difference):
        return False  # words, and powers that may not end
    rules = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    try:
        parsed = sympy_parser.parse_expr(difference.replace("^", "**"), transformations=rules)
        return bool(sympy.simplify(parsed) == 0)
    except Exception:  # SymPy's parser compiles what it is given, so any text that is no expression raises something
        return False
