"""Text cannot become markup, and numbers keep all their digits."""

import markupsafe
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.reporting.page import parts


@given(text=st.text())
def test_text_is_escaped_wherever_it_stands_and_markup_is_not(text):
    text, number = f"<'{text}", parts.number(1.5)
    escaped = str(markupsafe.escape(text))
    for made in (
        parts.element("p", text),
        parts.table([text], [[text, text, number]], text),
        parts.facts({text: text, "number": number}),
        parts.folded(text, text),
    ):
        assert escaped in made and text not in str(made).replace(escaped, "")
    assert number in parts.table(["", ""], [[text, number]], "") and number in parts.facts({text: number})


@pytest.mark.parametrize("value", [None, "2.0", True, float("nan"), float("inf"), 10**400, [1.0], {}])
def test_what_is_no_number_is_shown_as_missing(value):
    assert parts.number(value) == "–" and parts.with_error(value, 1.0) == "–"


def test_a_number_is_rounded_for_the_eye_and_whole_for_the_rest():
    assert parts.number(2.0049496304) == '<data value="2.0049496304" title="2.0049496304">2.0049</data>'
    assert parts.number(299, ",") == '<data value="299" title="299">299</data>'
    assert " ± " in parts.with_error(2.0, 0.1) and " ± " not in parts.with_error(2.0, None)


def test_values_in_words():
    values = {"a": True, "b": [1, "x"], "c": None, "d": 703362}
    assert parts.text_of(values) == "a: yes, b: (1, x), c: –, d: 703,362"
