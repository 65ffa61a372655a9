from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import InvalidSettingError
from pocketlm.stops import StopMatcher

# Two letters, so that stop strings overlap themselves, each other and the text in every way.
texts = st.text("ab", max_size=20)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=8), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow reference: the first stop string to be complete, the longest of those, by str.find."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(found)[1]], True) if found else (text, False)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text, stopped = "", False
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        text += safe
    return text + matcher.flush(), stopped


@given(st.lists(texts, max_size=6), stop_lists)
@settings(deadline=None, max_examples=200)
def test_equals_find_on_the_whole_text_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # Without a push, nothing can have been reported.
    assert run([*pieces, ""], stops) == expected(whole, stops)
    assert run([*whole, ""], stops) == expected(whole, stops)


@given(texts, stop_lists)
@settings(deadline=None)
def test_holds_back_only_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for end, character in enumerate(text, start=1):
        safe, stopped = matcher.push(character)
        if stopped:
            return
        emitted += safe
        suffixes = [text[start:end] for start in range(end + 1)]
        longest = next(suffix for suffix in suffixes if any(stop.startswith(suffix) for stop in [*stops, ""]))
        assert emitted == text[: end - len(longest)]


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (["###"], ["Hello", " #", "#", "# more"], "Hello "),
        (["\n\nUser:"], ["Fine.\n", "\nUs", "er: and"], "Fine."),
        (["bc", "abc"], ["xa", "bc"], "x"),  # completed together: the longest
        (["abcd", "bc"], ["abcd"], "a"),  # completed first, though the other begins earlier
        (["🙂"], ["a🙂b"], "a"),
        (["aabaaac"], ["xaabaaabaaac"], "xaaba"),  # a failed start hides another one
    ],
)
def test_ends_before_the_stop_string(stops: list[str], pieces: list[str], text: str) -> None:
    assert run(pieces, stops) == (text, True)


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("one. two.") == ("one", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


def test_flush_gives_what_was_held_back_and_starts_anew() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.flush() == "EN"
    assert matcher.push("D.") == ("D.", False)


def test_a_lone_string_is_one_stop() -> None:
    assert run(["a b END c"], "END") == ("a b ", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "", [None], [7]])
def test_refuses_what_is_no_stop_string(stops: list[str]) -> None:
    with pytest.raises(InvalidSettingError, match="at least one character"):
        StopMatcher(stops)
