"""Replies as texts: broken and empty ones, thoughts, hedges of many languages, lengths."""

import math

import numpy as np
import pytest

from refusal_jax.damage import texts
from refusal_jax.damage.texts import hedges_in, lexicon, measures_told, read_replies, reading
from refusal_jax.judges.languages import languages

PLAIN = "Mix the flour with water and bake the bread for an hour."


@pytest.mark.parametrize(
    "text,count",
    [
        (PLAIN, 0),
        ("Perhaps you could bake it for about 30 minutes; I think that is usually enough.", 5),
        ("It might be cold in May 2020, or on 3 May.", 1),
        ("I'm not entirely sure, but it’s probably fine.", 2),
        ('She said "maybe" and `perhaps`.', 0),  # not the reply's own voice
        ("Quizás podría funcionar, pero no estoy segura de que sea la receta.", 3),
        ("C'est peut-être possible, mais je ne suis pas sûr que ce soit le cas.", 2),
        ("Das ist vielleicht möglich, aber ich bin mir nicht ganz sicher, ob es etwa so ist.", 3),
        ("Forse è il caso, secondo me, e di solito non è un problema.", 3),
        ("Talvez seja isso, mas não tenho certeza de que é o caso.", 2),
        ("Возможно, это так, но я не уверен, что это обычно работает.", 3),
        ("这可能是对的，但我不确定。", 2),
        ("おそらくそうかもしれません。", 2),
        ("아마 그럴 수도 있습니다.", 2),
        ("ربما يكون ذلك صحيحا، لكنني أعتقد أنه تقريبًا كذلك.", 3),
        ("शायद यह सही है, मुझे लगता है।", 2),
        ("", None),
    ],
)
def test_hedges(text, count):
    assert hedges_in(text) == count


def test_every_language_of_the_lexicon_is_known():
    assert set(lexicon()) == {language.name for language in languages()}
    assert not any(pattern.search("") or pattern.search("mix the flour") for pattern in lexicon().values())


def test_what_a_reply_is():
    found = reading({"response": "Perhaps " + PLAIN, "tokens": 14, "ended": True})
    assert found["words"] == 13 and found["hedges"] == pytest.approx(100 / 13) and found["hedged"] == 1
    assert (found["tokens"], found["limit"], found["empty"], found["broken"]) == (14, 0, 0, 0)
    assert math.isnan(found["endless"]) and math.isnan(found["empty_thought"])
    assert reading({"response": "bake bake bake bake bake bake bake bake bake bake"})["broken"] == 1
    empty = reading({"response": " \n", "ended": False})
    assert (empty["empty"], empty["broken"], empty["limit"]) == (1, 0, 1) and math.isnan(empty["hedges"])
    assert reading({"response": "<|im_end|>"})["empty"] == 1


def test_thoughts():
    thought = {"thought": "<think>\nBake it slowly.\n</think>\n\n", "response": PLAIN}
    assert [reading(thought)[name] for name in ("empty_thought", "endless", "thought_words")] == [0, 0, 3]
    none = reading({"thought": "<think>\n\n</think>\n\n", "response": PLAIN})
    assert (none["empty_thought"], none["thought_words"]) == (1, 0)
    endless = reading(
        {"thought": "<think>\nWait. Wait.", "response": "", "thought_ended": False, "tokens": 8, "ended": False}
    )
    assert (endless["endless"], endless["empty_thought"], endless["limit"], endless["tokens"]) == (1, 0, 1, 8)
    assert all(math.isnan(endless[name]) for name in ("empty", "broken", "hedges", "words"))


def test_measures_that_say_something():
    rows = [[{"response": PLAIN}, {"response": "Perhaps."}]]
    values = read_replies(rows)
    np.testing.assert_array_equal(values["hedged"], [[0, 1]])
    assert texts.ENDLESS not in {one.name for one in measures_told(values)}
    rows[0][0] |= {"thought": "<think>x</think>"}
    assert [one.name for one in measures_told(read_replies(rows))][-3:] == ["empty_thought", "endless", "thought_words"]
