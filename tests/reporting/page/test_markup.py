"""Text cannot become markup, and numbers keep all their digits."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.reporting.page import markup
from diffusion.reporting.page.markup import Markup, element


@given(text=st.text(), attribute=st.text())
def test_text_and_attributes_are_escaped_and_markup_is_not(text, attribute):
    made = element("p", text, element("b", text), data_x=attribute)
    escaped = html.escape(text)
    assert made == f'<p data-x="{html.escape(attribute)}">{escaped}<b>{escaped}</b></p>'
    assert isinstance(made, Markup)


def test_attributes_that_are_flags_or_missing():
    assert element("input", hidden=True, value=0, class_=None, data_a=False) == '<input hidden value="0">'


@pytest.mark.parametrize("value", [None, "2.0", True, float("nan"), float("inf"), 10**400, [1.0], {}])
def test_what_is_no_number_is_shown_as_missing(value):
    assert markup.number(value) == "–" and markup.with_error(value, 1.0) == "–"


def test_a_number_is_rounded_for_the_eye_and_whole_for_the_rest():
    assert markup.number(2.0049496304) == '<data value="2.0049496304" title="2.0049496304">2.0049</data>'
    assert markup.number(299, ",") == '<data value="299" title="299">299</data>'
    assert " ± " in markup.with_error(2.0, 0.1) and " ± " not in markup.with_error(2.0, None)


def test_values_in_words():
    values = {"a": True, "b": [1, "x"], "c": None, "d": 703362}
    assert markup.text_of(values) == "a: yes, b: (1, x), c: –, d: 703,362"
