"""Accuracy counts images; accounts add up."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score

from clfed.errors import NotEnoughData
from clfed.evaluation.accounting import Account, Accounts, peak_memory, stopwatch
from clfed.evaluation.accuracy import (
    Counts,
    accuracy,
    groupwise,
    per_class_recall,
    unweighted_mean,
)

CLASSES = 4
pairs = st.lists(st.tuples(*[st.integers(0, CLASSES - 1)] * 2), min_size=1, max_size=40)


def tensors(drawn):
    predictions, labels = torch.tensor(drawn).T
    return predictions, labels


@given(pairs)
def test_accuracy_agrees_with_sklearn(drawn):
    predictions, labels = tensors(drawn)
    assert accuracy(predictions, labels) == accuracy_score(labels, predictions)


@given(pairs)
def test_recall_agrees_with_sklearn(drawn):
    predictions, labels = tensors(drawn)
    theirs = recall_score(
        labels, predictions, labels=range(CLASSES), average=None, zero_division=np.nan
    )
    ours = per_class_recall(predictions, labels, CLASSES)
    np.testing.assert_array_equal(ours.numpy(), theirs)


@given(pairs, st.integers(1, 7))
def test_batches_do_not_matter(drawn, size):
    predictions, labels = tensors(drawn)
    batches = zip(predictions.split(size), labels.split(size), strict=True)
    assert sum((Counts.of(*batch) for batch in batches), Counts()) == Counts.of(predictions, labels)


@given(pairs)
def test_disjoint_groups_add_up_to_all(drawn):
    predictions, labels = tensors(drawn)
    groups = {"base": torch.tensor([0, 2]), "field": torch.tensor([1, 3])}
    counts = groupwise(predictions, labels, groups)
    assert counts["base"] + counts["field"] == Counts.of(predictions, labels)


def test_the_three_groups_of_a_mission_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    groups = {
        "base": torch.tensor([0]),
        "previous": torch.tensor([1]),
        "mission": torch.tensor([1, 2]),  # brings back a class of an earlier mission
    }
    counts = groupwise(predictions, labels, groups)
    assert counts == {"base": Counts(3, 4), "previous": Counts(1, 2), "mission": Counts(2, 3)}
    assert unweighted_mean(counts) == pytest.approx((3 / 4 + 1 / 2 + 2 / 3) / 3)


def test_a_group_without_images_is_left_out_of_the_mean():
    groups = {"base": torch.tensor([0]), "previous": torch.tensor([], dtype=torch.int64)}
    counts = groupwise(torch.tensor([0, 1]), torch.tensor([0, 0]), groups)
    assert counts["previous"] == Counts(0, 0)
    assert unweighted_mean(counts) == 0.5


def test_an_unknown_answer_is_wrong_and_not_an_error():
    assert accuracy(torch.tensor([-1, 0]), torch.tensor([0, 0])) == 0.5


@pytest.mark.parametrize(
    "judge",
    [
        lambda: accuracy(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
        lambda: Counts().fraction,
        lambda: unweighted_mean({"base": Counts()}),
    ],
)
def test_no_image_is_refused(judge):
    with pytest.raises(NotEnoughData, match="at least one test image"):
        judge()


@pytest.mark.parametrize(
    "predictions, labels",
    [
        (torch.tensor([0, 1]), torch.tensor([0])),
        (torch.tensor([[0], [1]]), torch.tensor([[0], [1]])),
        (torch.tensor([0.0]), torch.tensor([0])),
    ],
)
def test_wrong_shapes_and_types_are_refused(predictions, labels):
    with pytest.raises(ValueError, match="Expected"):
        accuracy(predictions, labels)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        per_class_recall(torch.tensor([0]), torch.tensor([label]), 3)


@pytest.mark.parametrize("correct, total", [(2, 1), (-1, 3)])
def test_impossible_counts_are_refused(correct, total):
    with pytest.raises(ValueError, match="correct <= total"):
        Counts(correct, total)


amounts = st.integers(0, 2**60)
accounts = st.builds(
    Account,
    uplink=amounts,
    downlink=amounts,
    seconds=st.integers(0, 2**40).map(lambda ticks: ticks / 1024),
    images=amounts,
    macs=st.none() | amounts,
    peak_memory=amounts,
)


@given(accounts, accounts, accounts)
def test_accounts_are_a_commutative_monoid(a, b, c):
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Account() == a


def test_a_negative_cost_is_refused():
    with pytest.raises(ValueError, match="negative"):
        Account(uplink=-1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), accounts), max_size=12))
def test_accounts_by_node_and_by_round_give_the_same_total(entries):
    book = Accounts()
    for entry in entries:
        book.add(*entry)
    by_node = sum((book.total(node=node) for node in book.nodes), Account())
    by_round = sum((book.total(round_=number) for number in book.rounds), Account())
    for total in (by_node, by_round):
        assert (total.uplink, total.images, total.macs) == (
            book.total().uplink,
            book.total().images,
            book.total().macs,
        )
        assert math.isclose(total.seconds, book.total().seconds)


def test_accounts_of_one_node_in_one_round():
    book = Accounts()
    book.add("a", 1, Account(uplink=1))
    book.add("a", 1, Account(uplink=2))
    book.add("a", 2, Account(uplink=4))
    book.add("b", 1, Account(uplink=8))
    assert book.total(node="a", round_=1).uplink == 3
    assert book.total(node="a").uplink == 7
    assert book.total(round_=1).uplink == 11
    assert book.total(node="nobody") == Account()
    assert (book.nodes, book.rounds) == (("a", "b"), (1, 2))


def test_stopwatch_stops_with_its_block():
    with stopwatch() as watch:
        time.sleep(0.01)
    first = watch.seconds
    time.sleep(0.01)
    assert watch.seconds == first >= 0.01


def test_peak_memory_is_in_bytes():
    pytest.importorskip("resource")
    assert 20e6 < peak_memory() < 1e12  # torch alone takes some hundred million
