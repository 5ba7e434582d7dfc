"""Names with arguments: how a config chooses a function, such as schedule.name="linear(beta_end=0.03)".

A choice is a table of functions and values by name. The keyword arguments in brackets are read as literals (never
evaluated) and checked against the function's signature.
"""

import ast
import difflib
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin


class Call(NamedTuple):
    """A name and its arguments, as a config wrote them."""

    name: str
    arguments: dict[str, Any]


def parse(text: str) -> Call:
    """ "ddim(eta=0.5)" as Call("ddim", {"eta": 0.5}).

    Raises:
        ValueError: the text is not a name, with or without literal keyword arguments.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return Call(node.id, {})
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            if None not in arguments and len(arguments) == len(node.keywords):  # no **, and no name twice
                return Call(node.func.id, arguments)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # the last two come from deep nesting
        pass
    raise ValueError(f"must be a name, or a name with arguments such as name(size=3), not {text!r}")


class Choice(NamedTuple):
    """The values that a config key can name.

    Attributes:
        table: functions (or classes), which may take arguments, and other values, which take none.
        given: the parameters that the program passes and a config cannot set.
    """

    table: Mapping[str, Any]
    given: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow "config key KEY"; None if nothing is."""
        if not isinstance(value, str):
            return f"must be one of {', '.join(self.table)}, not {value!r}"
        try:
            call = parse(value)
        except ValueError as error:
            return str(error)
        if call.name not in self.table:
            return f"must be one of {', '.join(self.table)}, not {value!r}{_near(call.name, self.table)}"
        parameters = self.parameters(call.name)
        for name, argument in call.arguments.items():
            if name not in parameters:
                known = f"only {', '.join(parameters)}" if parameters else "none"
                return f"is {value!r}, but {call.name} has no argument {name}, {known}{_near(name, parameters)}"
            if not accepts(parameters[name].annotation, argument):
                allowed = words(parameters[name].annotation)
                return f"is {value!r}, but the argument {name} of {call.name} must be {allowed}, not {argument!r}"
        missing = [name for name, p in parameters.items() if p.default is p.empty and name not in call.arguments]
        return f"is {value!r}, but {call.name} needs the argument {missing[0]}" if missing else None

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """The parameters of this entry that a config can set."""
        entry = self.table[name]
        if not (inspect.isfunction(entry) or inspect.isclass(entry)):
            return {}
        return {k: p for k, p in inspect.signature(entry).parameters.items() if k not in self.given}

    def call(self, text: str) -> Call:
        """The name in `text` and its arguments, with the annotated types."""
        name, arguments = parse(text)
        parameters = self.parameters(name)
        return Call(name, {k: float(v) if parameters[k].annotation is float else v for k, v in arguments.items()})

    def bind(self, text: str) -> Any:
        """The entry that `text` names. A function comes with its arguments bound."""
        name, arguments = self.call(text)
        return functools.partial(self.table[name], **arguments) if arguments else self.table[name]


class Several(NamedTuple):
    """A config key that names any number of a table's entries, in a tuple."""

    choice: Choice
    words = "a tuple of names, or () for none"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow "config key KEY"; None if nothing is."""
        if not isinstance(value, tuple):
            return f"must be {self.words}, not {value!r}"
        if problems := [problem for item in value if (problem := self.choice.problem(item))]:
            return problems[0]
        chosen = [parse(item).name for item in value]
        return None if len({*chosen}) == len(chosen) else f"must name each once, not {value!r}"


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a literal has the annotated type. An integer counts as a float. True and False are not numbers."""
    if annotation is float:
        return type(value) in (int, float) and abs(value) < 1e300
    if annotation in (int, bool, str):
        return type(value) is annotation
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        element = get_args(annotation)[0]
        return isinstance(value, tuple) and all(accepts(element, item) for item in value)
    if get_origin(annotation) in (Union, types.UnionType):
        return any(accepts(option, value) for option in get_args(annotation))
    raise TypeError(f"an argument that a config can set needs a plain annotation, not {annotation!r}")


def words(annotation: Any) -> str:
    """The values that `accepts` takes, in words."""
    plain = {float: "a number", int: "an integer", bool: "True or False", str: "a string"}
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "a tuple of integers" if get_args(annotation)[0] is int else "a tuple of numbers"
    options = get_args(annotation)
    return " or ".join(words(option) for option in options if not (option is int and float in options))


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
