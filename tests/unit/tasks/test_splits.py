"""Splits by hash: the same on every machine and in every version, equal texts together, subsets nested."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tritune.tasks.base import Example
from tritune.tasks.splits import balanced, split_off, subset, unit_hash


def examples(labels: str, texts: list[str] | None = None) -> list[Example]:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    return [
        Example(f"id{i}", f"f, line {i}", {"t": text}, label)
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def test_hashes_are_recorded():
    """Other values would silently move rows between splits of stored comparisons."""
    assert unit_hash("") == 0.8894159948913369
    assert unit_hash("a plain sentence") == 0.3981333694570246
    assert unit_hash("Съешь ещё этих булок 👩‍👩‍👧") == 0.07178126801241902
    assert unit_hash("a plain sentence", "salt") == 0.8119599944439031


def test_split_is_recorded():
    _, dev = split_off(examples("ab" * 20), 0.1, "t")
    assert [e.fields["t"] for e in dev] == [f"text {i}" for i in (12, 13, 19, 20, 26, 30)]


rows = st.lists(st.tuples(st.sampled_from([f"text {i}" for i in range(30)]), st.sampled_from("abc")), max_size=40)


@given(rows, st.floats(0.01, 0.5))
def test_split_keeps_texts_together_labels_in_train_and_loses_nothing(pairs, fraction):
    given_rows = examples("".join(label for _, label in pairs), [text for text, _ in pairs])
    train, dev = split_off(given_rows, fraction, "t")
    assert sorted(e.id for e in (*train, *dev)) == sorted(e.id for e in given_rows)
    assert [e for e in given_rows if e in train] == list(train)
    assert not {e.fields["t"] for e in train} & {e.fields["t"] for e in dev}
    assert {e.label for e in train} == {e.label for e in given_rows}


@given(rows)
def test_a_texts_side_does_not_depend_on_the_other_rows(pairs):
    given_rows = examples("".join(label for _, label in pairs), [text for text, _ in pairs])
    many = examples("abc" * 30, [f"text {i}" for i in range(30)] * 3)
    expected = {e.fields["t"] for e in split_off(many, 0.3, "t")[1]}
    _, dev = split_off(given_rows, 0.3, "t")
    if len({e.fields["t"] for e in dev}) > 1:  # with one text it may be the repair for small data
        assert {e.fields["t"] for e in dev} <= expected


def test_small_data_still_gets_dev_rows_that_train_can_spare():
    train, dev = split_off(examples("aab"), 0.001, "t")
    assert len(dev) == 1
    assert dev[0].label == "a"
    assert Counter(e.label for e in train) == {"a": 1, "b": 1}
    assert split_off(examples("ab"), 0.1, "t")[1] == ()
    assert split_off(examples("aabb"), 0.0, "t")[1] == ()


@given(st.text("abcd", min_size=8, max_size=60), st.integers(0, 5), st.data())
def test_subsets_are_nested_and_stable(labels, seed, data):
    given_rows = examples(labels)
    small = data.draw(st.integers(1, len(labels)))
    large = data.draw(st.integers(small, len(labels)))
    inner, outer = subset(given_rows, small, seed), subset(given_rows, large, seed)
    assert len(inner) == small
    assert {e.id for e in inner} <= {e.id for e in outer}
    assert [e for e in given_rows if e in inner] == list(inner)
    assert subset(given_rows[::-1], small, seed) == inner[::-1]


def test_subsets_keep_proportions_and_every_label():
    given_rows = examples("a" * 700 + "b" * 299 + "c")
    counts = Counter(e.label for e in subset(given_rows, 100, 0))
    assert counts["c"] == 1
    assert 68 <= counts["a"] <= 71
    assert {e.id for e in subset(given_rows, 100, 0)} != {e.id for e in subset(given_rows, 100, 1)}


def test_balanced_shots():
    given_rows = examples("a" * 50 + "b" * 30 + "c" * 2)
    picked = balanced(given_rows, "abc", 12, seed=3)
    assert Counter(e.label for e in picked) == {"a": 5, "b": 5, "c": 2}
    assert picked == balanced(given_rows[::-1], "abc", 12, seed=3)
    assert picked != balanced(given_rows, "abc", 12, seed=4)
    assert [e.label for e in picked] != sorted(e.label for e in picked)
    assert len(balanced(given_rows, "abc", 500, seed=0)) == 82
    assert balanced(given_rows, "abc", 0, seed=0) == ()
    assert {balanced(given_rows, "ab", 1, seed=seed)[0].label for seed in range(8)} == {"a", "b"}
