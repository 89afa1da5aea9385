from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeq.errors import UsageError
from edgeq.strict_yaml import load_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_are_read_as_pyyaml_reads_them(data: object) -> None:
    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text = yaml.dump(data, Dumper=NoAliases)
    assert load_yaml(text, "a.yaml") == yaml.safe_load(text) == data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", ["line 3", "'a'", "twice"]),
        ("x:\n  - {k: 1, k: 1}", ["line 2", "'k'", "twice"]),
        ("1: a\n1.0: b", ["twice"]),
        ("a: 2020-13-45", ["month"]),
        ("a: 1" + 200 * ":01" + ".5", ["too large"]),
        ("a: " + "9" * 5000, ["digit"]),
        ("a: 0b_", ["invalid literal"]),
        ("[" * 20_000, ["too deeply"]),
        ("a: &x [*x]", ["aliases"]),
        ("a: &x 1\nb: *x", ["line 2", "aliases"]),
        ("a: !!int ''", ["tags"]),
        ("a: !!python/object/apply:os.system [ls]", ["tags"]),
        ("a: !!timestamp no", ["tags"]),
        ("{[a]: 1}", ["unhashable"]),
        ("a: [1", ["line 1"]),
        ("a: \x07", ["special characters"]),
        ("a: 1\n---\nb: 2", ["document"]),
        ("=", ["line 1"]),
    ],
)
def test_what_is_refused_is_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "some.yaml")
    message = str(caught.value)
    assert "some.yaml" in message
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


def test_an_empty_text_is_none() -> None:
    assert load_yaml("", "a.yaml") is None


@given(st.text(alphabet="ab01-:_.{}[]<=&*!?|>#'\"\n \t,%@0x", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        load_yaml(text, "a.yaml")
    except UsageError as error:
        assert error.exit_code == 2
