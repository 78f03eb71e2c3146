"""A parser of ftrace's lines made from the kernel's own print formats, as tools for traces make theirs.

Each event's `print fmt` becomes a regular expression: a conversion by what its argument can print (the alternatives of
a choice, the names of __print_symbolic, numbers in its base). Fields that a kernel does not have may be missing, with
the word before them.
"""

from __future__ import annotations

import re
from pathlib import Path

DATA = Path(__file__).parent / "data"

LATER = {
    *("mmu_valid_gen", "ad_disabled", "rip", "immediate_exit", "intr_info"),
    *("kvm_page_fault.guest_rip", "kvm_exit.error_code", "mark_mmio_spte.gen"),
}
"""Fields of Linux 6.1, of all events or of one, that a line of ours need not have."""

_LINE = re.compile(
    r"^ *(?P<comm>\S.{0,15}?)-(?P<pid>\d+) +\[(?P<cpu>\d{3,})\] (?P<flags>\S{5}) +(?P<time>\d+\.\d{6}): "
    r"(?P<event>\w+): (?P<text>.*)$"
)
_CONVERSION = re.compile(r"%(?P<flag>#?)(?P<zeros>0\d+)?(?:ll|l)?(?P<kind>[sduxpc])")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Line:
    """A line: who, where, when (seconds), the event's name, and its fields in the order of the format."""

    def __init__(self, match: re.Match[str], fields: dict[str, str]) -> None:
        self.comm = match["comm"]
        self.pid = int(match["pid"])
        self.cpu = int(match["cpu"])
        self.flags = match["flags"]
        self.time = match["time"]
        self.event = match["event"]
        self.text = match["text"]
        self.fields = fields


class Parser:
    """Parses lines of events that have a format; `extra` are formats of events that are in none of the files."""

    def __init__(self, formats: str, extra: dict[str, str] | None = None) -> None:
        self.patterns = {
            name: re.compile(pattern(name, text), re.ASCII)
            for name, text in re.findall(r"^name: (\w+)\nprint fmt: (.*)$", formats, re.MULTILINE)
        }
        self.patterns |= {name: re.compile(text) for name, text in (extra or {}).items()}

    def parse(self, text: str) -> Line:
        """Raises ValueError if the line is not as the kernel prints it."""
        match = _LINE.match(text.rstrip("\n"))
        if match is None:
            raise ValueError(f"not a line of ftrace: {text!r}")
        expression = self.patterns.get(match["event"])
        if expression is None:
            raise ValueError(f"no such event: {text!r}")
        fields = expression.fullmatch(match["text"])
        if fields is None:
            raise ValueError(f"not as the format of {match['event']} says: {text!r}\n{expression.pattern}")
        return Line(match, {name: value for name, value in fields.groupdict().items() if value is not None})


def split_arguments(text: str) -> list[str]:
    """The arguments of a call, which commas outside brackets and strings divide."""
    parts, depth, current = [], 0, ""
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|.', text, re.DOTALL):
        if token == "," and not depth:
            parts.append(current.strip())
            current = ""
            continue
        depth += (token in "({[") - (token in ")}]") if len(token) == 1 else 0
        current += token
    return [*parts, current.strip()]


def leading_string(text: str) -> tuple[str, str]:
    """A C string literal, possibly in pieces, and what follows it."""
    string = ""
    while match := re.match(r'\s*"((?:[^"\\]|\\.)*)"', text):
        string += match[1]
        text = text[match.end() :]
    return string, text.lstrip().removeprefix(",")


def expand(text: str) -> tuple[str, list[str]]:
    """Format and arguments, with those of a nested trace_seq_printf in their place."""
    string, rest = leading_string(text)
    arguments = split_arguments(rest)
    for index, argument in enumerate(arguments):
        start = argument.find("trace_seq_printf(p,")
        if start < 0:
            continue
        inner = argument[start + len("trace_seq_printf(p,") : argument.rindex(");", 0, argument.rindex(";"))]
        inner_string, inner_arguments = expand(inner)
        arrays = re.findall(r"(\w+)\[\] = \{([^}]*)\}", argument)
        for name, values in arrays:
            inner_arguments = [re.sub(rf"{name}\[.*\]", f"({values})", a) for a in inner_arguments]
        assert not index, "a nested format comes first"
        return string.replace("%s", inner_string, 1), inner_arguments + arguments[1:]
    return string, arguments


def names_in(argument: str) -> set[str]:
    return set(re.findall(r"(?:REC->|role\.)(\w+)", argument))


def convert(conversion: re.Match[str], argument: str) -> str:
    """What the conversion prints of the argument."""
    kind = conversion["kind"]
    if kind == "c":
        return ""  # the end of the string
    if kind in "du":
        return r"-?\d+"
    if kind in "xp":
        return rf"[0-9a-f]{{{int(conversion['zeros'] or 1)},}}"
    if "__print_flags" in argument and "__print_symbolic" not in argument and "?" not in argument:
        separator, *flags = _STRING.findall(argument)
        names = "|".join(map(re.escape, flags))
        return f"(?:(?:{names})(?:{re.escape(separator)}(?:{names}))*)?"
    choices = sorted(set(_STRING.findall(argument)), key=len, reverse=True)
    return "(?:" + "|".join(map(re.escape, choices)) + ")"


def pattern(event: str, text: str) -> str:
    """The regular expression for an event's print format."""
    later = {field.removeprefix(f"{event}.") for field in LATER}
    string, arguments = expand(text)
    values = iter(arguments)
    words: list[tuple[str, set[str] | None]] = []  # with the fields that they show, None if they are plain
    used: set[str] = set()
    for word in string.split(" "):
        expression, shown, end = "", set[str](), 0
        for conversion in _CONVERSION.finditer(word):
            argument = next(values)
            names = names_in(argument)
            shown |= names
            name = next((n for n in sorted(names) if n not in used), None)
            used |= {name} if name else set()
            expression += re.escape(word[end : conversion.start()])
            value = convert(conversion, argument)
            expression += f"(?P<{name}>{value})" if name else f"(?:{value})"
            end = conversion.end()
        expression += re.escape(word[end:])
        words.append((expression, shown if end else None))
    result = ""
    for index, (expression, fields) in enumerate(words):
        following = words[index + 1][1] if index + 1 < len(words) else None
        missing = bool(fields) and fields is not None and fields <= later
        label = (
            fields is None and index > 0 and bool(following) and following is not None and following <= later
        )
        separator = " " if index else ""
        if missing and words[index - 1][1] is None and index > 1:
            result += f"{separator}{expression})?"
        elif missing:
            result += f"(?:{separator}{expression})?"
        elif label:
            if result.endswith(","):  # the comma goes with what follows it
                result = result[:-1] + f"(?:,{separator}{expression}"
            else:
                result += f"(?:{separator}{expression}"
        else:
            result += separator + expression
    return result
