"""Names with arguments: parsing them, checking them against signatures, and binding them."""

import inspect
from typing import Literal

import pytest

from configs import cifar10, digits
from diffusion.experiment import config as config_lib
from diffusion.experiment import names
from diffusion.experiment.names import Call, Choice, Several
from diffusion.experiment.schema import KEYS


def cosine(
    num_steps: int,
    offset: float = 0.008,
    clip: bool = True,
    widths: tuple[int, ...] = (1, 2),
    mode: Literal["fast", "exact"] = "fast",
    limit: float | int = 1,
    title: str = "",
):
    return (num_steps, offset, clip, widths, mode, limit, title)


def power(exponent: int):
    return exponent


CHOICE = Choice({"cosine": cosine, "power": power, "constant": 0.5}, given=("num_steps",))


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("ddim", Call("ddim", {})),
        ("ddim()", Call("ddim", {})),
        (" ddim ( eta = 0.5 ) ", Call("ddim", {"eta": 0.5})),
        ("adamw(b2=0.99, weight_decay=1e-2)", Call("adamw", {"b2": 0.99, "weight_decay": 0.01})),
        ("f(a=-3, b='x, y', c=True)", Call("f", {"a": -3, "b": "x, y", "c": True})),
        ("f(d=None, e=(1, -2))", Call("f", {"d": None, "e": (1, -2)})),
    ],
)
def test_a_name_and_its_arguments_are_read(text, call):
    assert names.parse(text) == call


EVALUATED = []


def witness(value: int = 0):
    EVALUATED.append(value)
    return value


@pytest.mark.parametrize(
    "text",
    [
        "ddim(0.5)",  # arguments have names
        "ddim(eta=1/2)",
        "ddim(eta=2**3)",
        "ddim(eta=float('nan'))",
        "ddim(eta=witness())",
        "ddim(eta=[witness(value=i) for i in (1, 2)])",
        "ddim(eta=__import__('os').getpid())",
        "ddim(eta=(lambda: 1)())",
        "ddim(eta=eta)",
        "ddim(eta=f'{witness()}')",
        "ddim(eta:=0.5)",
        "ddim(**{'eta': 0.5})",
        "ddim(*(0.5,))",
        "ddim(eta=0.5)(eta=0.5)",
        "ddim.step",
        "samplers.ddim(eta=0.5)",
        "ddim, heun",
        "ddim(eta=0.5",
        "ddim(eta=0.5, eta=0.6)",
        "'ddim'",
        "0.5",
        "",
        "ddim\nheun",
        "(" * 300 + ")" * 300,
        "ddim(eta=" + "-" * 20_000 + "1)",
        "ddim(eta='\0')",
        "ddim(eta={[]: 1})",
    ],
)
def test_what_is_no_name_with_literals_is_refused_and_never_evaluated(text):
    with pytest.raises(ValueError, match="^must be a name, or a name with arguments such as name"):
        names.parse(text)
    problem = CHOICE.problem(text)
    assert problem.startswith("must be a name") and "\n" not in problem
    assert not EVALUATED


ONE_OF = "must be one of cosine, power, constant, not"
ARGUMENTS = "offset, clip, widths, mode, limit, title"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, f"{ONE_OF} 3"),
        (None, f"{ONE_OF} None"),
        ("cosin", f"{ONE_OF} 'cosin'; did you mean cosine?"),
        ("xyz", f"{ONE_OF} 'xyz'"),
        ("cosine(offet=1)", f"cosine has no argument offet, only {ARGUMENTS}; did you mean offset?"),
        ("cosine(num_steps=3)", f"cosine has no argument num_steps, only {ARGUMENTS}"),
        ("constant(beta=0.5)", "constant has no argument beta, none"),
        ("power", "power needs the argument exponent"),
    ],
)
def test_an_unknown_name_or_argument_is_one_line_with_what_there_is(value, problem):
    found = CHOICE.problem(value)
    assert found == (problem if problem.startswith("must") else f"is {value!r}, but {problem}")


@pytest.mark.parametrize(
    ("name", "argument", "literal", "wanted"),
    [
        ("cosine", "offset", "'x'", "a number"),
        ("cosine", "offset", "True", "a number"),
        ("cosine", "offset", "None", "a number"),
        ("cosine", "clip", "1", "True or False"),
        ("cosine", "widths", "3", "a tuple of integers"),
        ("cosine", "widths", "(1, 2.5)", "a tuple of integers"),
        ("cosine", "mode", "'slow'", "one of fast, exact"),
        ("cosine", "limit", "'x'", "a number"),
        ("cosine", "limit", "False", "a number"),
        ("cosine", "title", "3", "a string"),
        ("power", "exponent", "2.0", "an integer"),
        ("power", "exponent", "True", "an integer"),
    ],
)
def test_an_argument_of_another_type_is_one_line_with_the_type(name, argument, literal, wanted):
    value = f"{name}({argument}={literal})"
    problem = f"is {value!r}, but the argument {argument} of {name} must be {wanted}, not {literal}"
    assert CHOICE.problem(value) == problem


def test_infinity_is_no_number():
    assert "offset of cosine must be a number, not inf" in CHOICE.problem("cosine(offset=1e999)")


@pytest.mark.parametrize(
    "value",
    [
        "cosine",
        "cosine()",
        "cosine(offset=1, clip=False, widths=(), mode='exact')",
        "cosine(limit=3, offset=-0.5)",
        "cosine(limit=3.5, title='')",
        "power(exponent=-2)",
        "constant",
    ],
)
def test_a_right_choice_has_no_problem(value):
    assert CHOICE.problem(value) is None


def test_binding_gives_the_function_its_arguments_and_floats_where_floats_are_wanted():
    bound = CHOICE.bind("cosine(offset=1, widths=(4,), limit=2, mode='exact')")
    assert bound(num_steps=7) == (7, 1.0, True, (4,), "exact", 2, "")
    assert isinstance(bound.keywords["offset"], float)
    assert isinstance(bound.keywords["limit"], int)  # annotated as either: it stays what it is
    assert CHOICE.bind("cosine") is cosine and CHOICE.bind("cosine()") is cosine
    assert CHOICE.bind("constant") == 0.5
    assert CHOICE.bind("power(exponent=3)")() == 3


def test_an_annotation_that_a_literal_cannot_have_is_the_program_s_mistake():
    with pytest.raises(TypeError, match="needs a plain annotation"):
        names.accepts(dict[str, int], {})


CHOICES = {name: key.allowed for name, key in KEYS.items() if isinstance(key.allowed, Choice)}
TABLES = CHOICES | {name: key.allowed.choice for name, key in KEYS.items() if isinstance(key.allowed, Several)}


@pytest.mark.parametrize("key", TABLES)
def test_every_argument_of_every_choice_has_a_plain_annotation_that_its_default_fits(key):
    choice = TABLES[key]
    for name in choice.table:
        for argument, parameter in choice.parameters(name).items():
            where = f"{key}: {name}({argument})"
            assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), where
            assert names.words(parameter.annotation), where
            assert not names.accepts(parameter.annotation, object()), where
            if parameter.default is not parameter.empty:
                assert names.accepts(parameter.annotation, parameter.default), where


@pytest.mark.parametrize("key", [key for key, choice in TABLES.items() if choice.given])
def test_what_the_program_passes_cannot_be_set_and_is_what_functions_take(key):
    """A misspelt `given` would hide nothing."""
    choice = TABLES[key]
    taken = {name for entry in choice.table.values() for name in inspect.signature(entry).parameters}
    assert set(choice.given) <= taken
    settable = {argument for name in choice.table for argument in choice.parameters(name)}
    assert not settable & set(choice.given)


def test_every_choice_of_every_config_names_something():
    for get_config in (cifar10.get_config, digits.get_config):
        flat = config_lib.flatten(get_config())
        for key, choice in CHOICES.items():
            assert choice.problem(flat[key]) is None, key
