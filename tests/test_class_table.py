"""Rows of named classes: growth, merging by rule, heads, checkpoints."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.errors import ConfigError, UnknownClass
from clfed.learners.tables import ClassTable, Column, Head

COLUMNS = {
    "total": Column((2,), rule="add"),
    "average": Column((2,), rule="mean"),
    "weight": Column((2,), rule="param", initial=1.0),
    "secret": Column((), rule="local"),
}


def table(names, seed=0, **values):
    made = ClassTable(COLUMNS, seed=seed, purpose="test")
    made.grow(names)
    for key, rows in values.items():
        with torch.no_grad():
            made.column(key).copy_(torch.tensor(rows))
    return made


def test_first_values_depend_on_the_name_and_not_on_when_it_came():
    together, apart = table(["a", "b", "c"]), table(["c"])
    apart.grow(["a"])
    assert torch.equal(together.column("weight")[2], apart.column("weight")[0])
    assert torch.equal(together.column("weight")[0], apart.column("weight")[1])
    assert not torch.equal(together.column("weight")[0], together.column("weight")[1])
    assert not torch.equal(table(["a"], seed=1).column("weight"), table(["a"]).column("weight"))


def test_growing_keeps_old_rows_and_ignores_known_names():
    grown = table(["a", "b"], average=[[1.0, 2.0], [3.0, 4.0]])
    before = grown.column("weight").detach().clone()
    grown.grow(["b", "c", "c"])
    assert grown.classes == ("a", "b", "c")
    assert grown.column("average").tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]
    assert torch.equal(grown.column("weight")[:2], before)
    assert isinstance(grown.weight, torch.nn.Parameter)
    assert "average" in dict(grown.named_buffers())


def test_merge_weights_rows_by_counts_and_absent_classes_have_no_say():
    one = table(["a", "b"], total=[[1.0, 1.0], [2.0, 2.0]], average=[[1.0, 0.0], [5.0, 5.0]])
    two = table(["c", "a"], total=[[7.0, 7.0], [4.0, 4.0]], average=[[9.0, 9.0], [4.0, 0.0]])
    merged = ClassTable(COLUMNS, seed=0, purpose="test")
    merged.merge([one, two], [{"a": 1, "b": 3}, {"a": 2, "c": 1}])
    assert merged.classes == ("a", "b", "c")
    assert merged.column("total").tolist() == [[5.0, 5.0], [2.0, 2.0], [7.0, 7.0]]
    assert merged.column("average").tolist() == [[3.0, 0.0], [5.0, 5.0], [9.0, 9.0]]
    assert merged.column("secret").tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(-9, 9)), min_size=1, max_size=5))
def test_merged_mean_equals_a_slow_loop(owners):
    tables = [table(["a"], average=[[value, -value]]) for _, value in owners]
    merged = ClassTable(COLUMNS, seed=0, purpose="test")
    merged.merge(tables, [{"a": count} for count, _ in owners])
    expected = sum(count * value for count, value in owners) / sum(count for count, _ in owners)
    assert merged.column("average")[0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_merging_needs_counts_of_every_owner():
    with pytest.raises(ConfigError, match="2 tables, got 1"):
        table(["a"]).merge([table(["a"]), table(["a"])], [{"a": 1}])


def test_local_columns_never_leave():
    assert set(table(["a"]).payload()) == {"total", "average", "weight"}


def test_rows_can_be_removed_and_unknown_ones_are_refused():
    kept = table(["a", "b", "c"], average=[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    kept.without(["b"])
    assert kept.classes == ("a", "c") and kept.column("average").tolist() == [[1, 1], [3, 3]]
    with pytest.raises(UnknownClass, match="'b'"):
        kept.without(["b"])


def test_a_new_table_takes_over_a_larger_one():
    old, new = table(["a", "b"]), ClassTable(COLUMNS, seed=5, purpose="test")
    new.load_state_dict(old.state_dict())
    assert new.classes == old.classes
    assert all(torch.equal(new.column(key), old.column(key)) for key in COLUMNS)
    smaller = table(["x"])
    new.load_state_dict(smaller.state_dict())
    assert new.classes == ("x",) and torch.equal(new.column("weight"), smaller.column("weight"))


def test_heads():
    linear = Head(3, "linear")
    linear.grow(["a", "b"])
    assert linear(torch.ones(4, 3)).tolist() == [[0.0, 0.0]] * 4
    cosine = Head(3, "cosine", temperature=2.0)
    cosine.grow(["a", "b"])
    h = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    w = cosine.column("weight").detach()
    expected = 2.0 * (h @ w.T) / h.norm(dim=1)[:, None] / w.norm(dim=1)
    torch.testing.assert_close(cosine(h).detach(), expected)
    assert torch.allclose(cosine(7 * h), cosine(h))
    with pytest.raises(ConfigError, match="round"):
        Head(3, "round")


def test_reserved_rows_are_taken_over_in_order():
    head = Head(2, "linear")
    head.adopt(["a"])
    head.reserve(2)
    with torch.no_grad():
        head.column("bias").copy_(torch.tensor([0.0, 1.0, 2.0]))
    head.adopt(["b"])
    assert head.classes[:2] == ("a", "b") and len(head.classes) == 3
    assert head.column("bias").tolist() == [0.0, 1.0, 2.0]
    head.reserve(1)
    assert len(head.classes) == 3
    head.adopt(["c", "d"])
    assert head.classes == ("a", "b", "c", "d")
