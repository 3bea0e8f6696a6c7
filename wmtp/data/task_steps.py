"""The steps of the generated tasks: their wordings, their code, and the errors of incorrect solutions.

A step maps a value of one kind to a value of another kind. Its code is one expression in which

- `{v}` is the current value and `{e}` the name of an element of it,
- `{c}` is a constant, drawn from `constants`, that also occurs in the wording,
- `«…»` marks a decisive token, which determines the program's result. `CONFUSIONS` lists its replacements in
  incorrect solutions; a decisive constant is replaced by another constant of the same step.
"""

from dataclasses import dataclass

INTEGER, NUMBERS, TEXT = "an integer", "a list of integers", "a string"


@dataclass(frozen=True)
class Step:
    """One step of a task: it maps a value of kind `source` to one of kind `result`."""

    source: str
    result: str
    code: str
    wordings: tuple[str, ...]
    constants: tuple[str, ...] = ()


SMALL = tuple(str(n) for n in range(2, 10))
WIDE = tuple(str(n) for n in range(2, 31))
LETTERS = tuple(f"'{letter}'" for letter in "aeioustrnl")

CONFUSIONS = {
    "+": ("-", "*"),
    "-": ("+", "*"),
    "*": ("+", "-"),
    "%": ("//", "*"),
    "//": ("%", "*"),
    ">": ("<", "<="),
    "<": (">", ">="),
    "==": ("!=",),
    "!=": ("==",),
    "max": ("min", "sum"),
    "min": ("max", "sum"),
    "sum": ("max", "len"),
    "len": ("sum", "max"),
    "sorted": ("list",),
    "True": ("False",),
    "[::-1]": ("[:]", "[1:]"),
    "upper": ("lower", "title"),
    "lower": ("upper", "title"),
    "title": ("upper", "lower"),
    "0": ("1",),
    "1": ("0",),
}

STEPS = (
    # a list of integers to a list of integers
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} «>» «{c}»]",
         ("keep only the numbers greater than {c}", "drop every number that is at most {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} «<» «{c}»]",
         ("keep only the numbers less than {c}", "drop every number that is at least {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} «!=» «{c}»]",
         ("remove every {c}", "drop the numbers equal to {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} % 2 == «0»]",
         ("keep only the even numbers", "drop the odd numbers")),
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} % 2 == «1»]",
         ("keep only the odd numbers", "drop the even numbers")),
    Step(NUMBERS, NUMBERS, "[{e} for {e} in {v} if {e} % «{c}» == 0]",
         ("keep only the multiples of {c}", "keep the numbers divisible by {c}"), ("3", "4", "5", "6", "7")),
    Step(NUMBERS, NUMBERS, "[{e} «+» «{c}» for {e} in {v}]",
         ("add {c} to each number", "increase every number by {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "[{e} «-» «{c}» for {e} in {v}]",
         ("subtract {c} from each number", "decrease every number by {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "[{e} «*» «{c}» for {e} in {v}]",
         ("multiply each number by {c}", "scale every number by {c}"), SMALL),
    Step(NUMBERS, NUMBERS, "[{e} «*» {e} for {e} in {v}]",
         ("square each number", "replace every number by its square")),
    Step(NUMBERS, NUMBERS, "[abs({e} «-» «{c}») for {e} in {v}]",
         ("replace each number by its distance to {c}", "turn every number into its distance from {c}"), WIDE),
    Step(NUMBERS, NUMBERS, "«sorted»({v})",
         ("sort the numbers in ascending order", "order the list from small to large")),
    Step(NUMBERS, NUMBERS, "sorted({v}, reverse=«True»)",
         ("sort the numbers in descending order", "order the list from large to small")),
    Step(NUMBERS, NUMBERS, "{v}«[::-1]»",
         ("reverse the list", "turn the list around")),
    Step(NUMBERS, NUMBERS, "{v}[:«{c}»]",
         ("take the first {c} numbers", "keep the first {c} numbers"), SMALL),
    Step(NUMBERS, NUMBERS, "{v}[«{c}»:]",
         ("skip the first {c} numbers", "leave out the first {c} numbers"), SMALL),
    # a list of integers to an integer
    Step(NUMBERS, INTEGER, "«sum»({v})",
         ("add up the numbers", "compute the sum of the list")),
    Step(NUMBERS, INTEGER, "«len»({v})",
         ("count the numbers", "compute the length of the list")),
    Step(NUMBERS, INTEGER, "«max»({v}, default=0)",
         ("find the largest number, or 0 if there is none", "take the maximum, 0 for an empty list")),
    Step(NUMBERS, INTEGER, "«min»({v}, default=0)",
         ("find the smallest number, or 0 if there is none", "take the minimum, 0 for an empty list")),
    Step(NUMBERS, INTEGER, "{v}.count(«{c}»)",
         ("count how often {c} occurs", "count the numbers equal to {c}"), WIDE),
    # an integer to an integer
    Step(INTEGER, INTEGER, "{v} «+» «{c}»",
         ("add {c}", "increase it by {c}"), WIDE),
    Step(INTEGER, INTEGER, "{v} «-» «{c}»",
         ("subtract {c}", "decrease it by {c}"), WIDE),
    Step(INTEGER, INTEGER, "{v} «*» «{c}»",
         ("multiply by {c}", "make it {c} times as large"), SMALL),
    Step(INTEGER, INTEGER, "{v} «%» «{c}»",
         ("take the remainder modulo {c}", "take the remainder of a division by {c}"), SMALL),
    Step(INTEGER, INTEGER, "{v} «//» «{c}»",
         ("divide by {c}, rounding down", "take the whole part of a division by {c}"), SMALL),
    Step(INTEGER, INTEGER, "abs({v} «-» «{c}»)",
         ("take the distance to {c}", "compute the distance from {c}"), WIDE),
    Step(INTEGER, INTEGER, "«max»({v}, «{c}»)",
         ("raise it to at least {c}", "replace it by {c} if it is smaller"), WIDE),
    Step(INTEGER, INTEGER, "«min»({v}, «{c}»)",
         ("lower it to at most {c}", "replace it by {c} if it is larger"), WIDE),
    # an integer to a list of integers
    Step(INTEGER, NUMBERS, "list(range({v} % «{c}»))",
         ("list the integers from 0 up to its remainder modulo {c}",
          "count from 0 up to its remainder modulo {c}"), WIDE[4:]),
    # a string to a string
    Step(TEXT, TEXT, "{v}.«upper»()",
         ("convert it to upper case", "make all letters capital")),
    Step(TEXT, TEXT, "{v}.«lower»()",
         ("convert it to lower case", "make all letters small")),
    Step(TEXT, TEXT, "{v}.«title»()",
         ("capitalize each word", "write each word with a capital")),
    Step(TEXT, TEXT, "{v}«[::-1]»",
         ("reverse the string", "spell it backwards")),
    Step(TEXT, TEXT, "{v}.replace(«{c}», '')",
         ("remove every {c}", "delete all occurrences of {c}"), LETTERS),
    Step(TEXT, TEXT, "{v}.replace(«{c}», '*')",
         ("replace every {c} by '*'", "hide each {c} behind '*'"), LETTERS),
    Step(TEXT, TEXT, "{v} * «{c}»",
         ("repeat it {c} times", "write it {c} times in a row"), SMALL),
    Step(TEXT, TEXT, "{v}[:«{c}»]",
         ("take the first {c} characters", "keep the first {c} characters"), SMALL),
    Step(TEXT, TEXT, "{v}[«{c}»:]",
         ("skip the first {c} characters", "leave out the first {c} characters"), SMALL),
    # a string to an integer or a list of integers
    Step(TEXT, INTEGER, "«len»({v})",
         ("count the characters", "compute the length of the string")),
    Step(TEXT, INTEGER, "{v}.count(«{c}»)",
         ("count how often {c} occurs", "count the occurrences of {c}"), LETTERS),
    Step(TEXT, NUMBERS, "[len({e}) for {e} in {v}.split()]",
         ("list the length of each word", "replace each word by its length")),
)  # fmt: skip

NAMES = {
    INTEGER: (("n", "k"), ("number", "k"), ("value", "k"), ("x", "k"), ("amount", "k")),
    NUMBERS: (("numbers", "number"), ("values", "value"), ("items", "item"), ("data", "entry"), ("xs", "x")),
    TEXT: (("text", "word"), ("s", "w"), ("phrase", "word"), ("line", "word"), ("message", "word")),
}  # each with the name of an element
FUNCTIONS = ("solve", "compute", "process", "transform", "run")
OPENINGS = (
    "Write a function {call} that takes {kind}.",
    "Define {call}, where {name} is {kind}.",
    "Given {kind} {name}, implement {call}.",
)
CONNECTORS = ("then ", "next ", "after that ")
CLOSINGS = ("Return the result.", "Give back the final value.")
