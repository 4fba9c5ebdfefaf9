"""Secure aggregation: the exact sum, what the server sees on the way, and what is refused."""

import secrets
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    FederationError,
    InvalidMessage,
    UnknownClass,
    UnsupportedStatistics,
)
from clfed.privacy.aggregator import Aggregator
from clfed.privacy.masking import SEAL, agree, digest, expand, public_key, seal, unseal
from clfed.privacy.roster import ADVERTISEMENT, Roster
from clfed.privacy.secure_aggregation import SEALED, SHARE, Client
from clfed.privacy.terms import Terms, from_words, majority, to_words
from clfed.prototypes import PrototypeMemory

CLASSES = ("elk", "fox", "owl")
DIM = 4
STEPS = ("keys", "shares", "masked", "unmask")


def terms(members=5, threshold=None, round_id="r1", **changes):
    settings = {"classes": CLASSES, "dim": DIM, "embedding_id": "e", "cap": 1000} | changes
    return Terms(round_id, members=members, threshold=threshold or majority(members), **settings)


def memory(table, classes=CLASSES):
    """A memory of a table of rows (count, sums...)."""
    table = torch.as_tensor(table, dtype=torch.int64)
    return PrototypeMemory.of(classes, table[:, 0], table[:, 1:], "e")


def tables(members, seed=0, classes=3, dim=DIM):
    rng = np.random.default_rng(seed)
    sums = rng.integers(-(2**30), 2**30, (members, classes, 1 + dim))
    sums[..., 0] = rng.integers(-9, 10, (members, classes))
    return {f"node{k:02d}": sums[k] for k in range(members)}


class Session:
    """One round among clients, of which some are lost at some step; keeps all that was sent."""

    def __init__(self, terms, deltas, lost=None):
        self.deltas = deltas
        self.lost = {step: set((lost or {}).get(step, ())) for step in STEPS}
        self.clients = {name: Client(name, terms) for name in deltas}
        self.server = Aggregator(terms)

    def here(self, step):
        gone = set().union(*(self.lost[s] for s in STEPS[: STEPS.index(step) + 1]))
        return [name for name in self.clients if name not in gone]

    def until(self, last):
        self.keys = self.server.take_keys(
            {n: self.clients[n].advertise() for n in self.here("keys")}
        )
        if last == "keys":
            return self
        self.sealed = {n: self.clients[n].share(self.keys) for n in self.here("shares")}
        self.dealt = self.server.take_shares(self.sealed)
        if last == "shares":
            return self
        self.masked = {
            n: self.clients[n].mask(self.dealt[n], self.deltas[n]) for n in self.here("masked")
        }
        self.arrived = self.server.take_masked({n: t.copy() for n, t in self.masked.items()})
        if last == "masked":
            return self
        self.told = {n: self.clients[n].unmask(self.arrived) for n in self.here("unmask")}
        return self

    def total(self):
        self.until("unmask")
        return self.server.take_unmasked(self.told)


def summed(tables, names):
    """The oracle: Python's integers, which never wrap."""
    shape = next(iter(tables.values())).shape
    total = [[0] * shape[1] for _ in range(shape[0])]
    for name in names:
        for row, line in zip(total, tables[name].tolist(), strict=True):
            row[:] = [a + b for a, b in zip(row, line, strict=True)]
    return total


def session(members=5, lost=None, seed=0, **options):
    return Session(
        terms(members, **options), {n: memory(t) for n, t in tables(members, seed).items()}, lost
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_sum_is_exact_whoever_is_lost_or_there_is_none(data):
    members = data.draw(st.integers(3, 8))
    threshold = data.draw(st.integers(majority(members), members))
    kinds = st.sampled_from(["", "", "", "", *STEPS])
    fate = data.draw(st.lists(kinds, min_size=members, max_size=members))
    limit = 1000 * 2**31
    entries = st.integers(-limit, limit) | st.sampled_from([-limit, 0, limit])
    filled = {
        f"node{k}": np.array(
            [
                [data.draw(st.integers(-1000, 1000)), *data.draw(st.tuples(*[entries] * DIM))]
                for _ in CLASSES
            ]
        )
        for k in range(members)
    }
    lost = {step: [n for n, f in zip(filled, fate, strict=True) if f == step] for step in STEPS}
    run = Session(terms(members, threshold), {n: memory(t) for n, t in filled.items()}, lost)
    if len(run.here("unmask")) < threshold:
        with pytest.raises(FederationError):
            run.total()
        return
    total = run.total()
    contributors = run.here("masked")
    assert run.server.contributors == tuple(contributors)
    assert total == memory(summed(filled, contributors))
    assert run.server.refused == {}


@pytest.mark.parametrize("members", range(3, 11))
@pytest.mark.parametrize("step", STEPS)
def test_as_many_as_the_threshold_allows_may_be_lost_at_any_step(members, step):
    spare = members - majority(members)
    names = [*tables(members)]
    run = session(members, {step: names[:spare]})
    expected = names if step == "unmask" else names[spare:]
    assert run.total() == memory(summed(tables(members), expected))
    one_more = session(members, {step: names[: spare + 1]})
    left = members - spare - 1
    with pytest.raises(FederationError, match=f"at least {majority(members)} nodes, got {left}"):
        one_more.total()


def test_losses_at_every_step_together():
    names = [*tables(10)]
    lost = {step: [names[3 * k % 10]] for k, step in enumerate(STEPS)}
    run = session(10, lost)
    assert run.total() == memory(summed(tables(10), [n for n in names if n not in names[0:7:3]]))
    assert len(run.told) == 6


def test_largest_entries_do_not_wrap_and_larger_caps_are_refused():
    cap = (2**32 - 1) // 3
    limits = terms(3, cap=cap)
    extreme = np.full((len(CLASSES), 1 + DIM), cap * 2**31)
    extreme[:, 0] = cap
    extreme[1] *= -1
    deltas = {f"node{k}": extreme for k in range(3)}
    total = Session(limits, {n: memory(t) for n, t in deltas.items()}).total()
    assert total.sums.abs().max() == 3 * cap * 2**31 > 2**62
    assert total == memory(summed(deltas, deltas))
    for members, cap in ((4, 2**30), (3, 2**31), (2**32, 1)):
        with pytest.raises(ConfigError, match="4,294,967,296"):
            terms(members, cap=cap)


def test_deletions_are_summed_like_additions():
    table = tables(3)["node00"]
    deltas = {"a": memory(table), "b": memory(-table), "c": memory(table)}
    assert Session(terms(3), deltas).total() == memory(table)
    deltas["c"] = memory(0 * table)
    assert not Session(terms(3), deltas).total()


@pytest.mark.parametrize(
    ("members", "threshold"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 6), (9, 4), (3, 1), (0, 0)]
)
def test_sums_that_protect_nobody_are_refused(members, threshold):
    with pytest.raises(ConfigError):
        Terms("r", CLASSES, DIM, "e", members, threshold)


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ()},
        {"classes": ("owl", "fox")},
        {"classes": ("fox", "fox")},
        {"classes": ("a\n",)},
        {"round_id": ""},
        {"embedding_id": ""},
    ],
)
def test_terms_with_wrong_names_are_refused(wrong):
    with pytest.raises(InvalidMessage):
        terms(**wrong)


def test_terms_survive_the_wire_and_nothing_else_does():
    given = terms()
    assert Terms.from_bytes(given.to_bytes()) == given
    assert Terms.from_bytes(given.to_bytes()).digest == given.digest
    assert given.digest != terms(round_id="r2").digest
    data = given.to_bytes()
    for wrong in (b"", b"{}", b"[]", b"\xff", data[:-1], data + b" ", data.replace(b"dim", b"din")):
        with pytest.raises(InvalidMessage):
            Terms.from_bytes(wrong)
    with pytest.raises(ConfigError):
        Terms.from_bytes(data.replace(b'"threshold":3', b'"threshold":1'))


def test_deltas_that_do_not_fit_are_refused_and_can_be_mended():
    run = session(3).until("shares")
    name, client = next(iter(run.clients.items()))
    wrong = [
        (EmbeddingMismatch, PrototypeMemory.empty(DIM, "other")),
        (EmbeddingMismatch, PrototypeMemory.empty(DIM + 1, "e")),
        (UnsupportedStatistics, PrototypeMemory.empty(DIM, "e", "shared")),
        (UnknownClass, memory(np.ones((3, 5)), ("elk", "fox", "yak"))),
        (InvalidMessage, memory(np.full((3, 5), 1001))),
        (InvalidMessage, memory([[1, 0, 0, 0, -1000 * 2**31 - 1]] * 3)),
        (InvalidMessage, memory([[0, -(2**63), 0, 0, 0]] * 3)),
    ]
    for error, delta in wrong:
        with pytest.raises(error):
            client.mask(run.dealt[name], delta)
    assert client.mask(run.dealt[name], run.deltas[name]).shape == (15,)


def test_a_sum_that_no_honest_contributors_can_have_is_refused():
    run = session(3).until("masked")
    run.server._total[0] += 3 * 1000 + 30  # what a client that lies would have put in
    run.told = {n: c.unmask(run.arrived) for n, c in run.clients.items()}
    with pytest.raises(InvalidMessage, match="3 contributors together"):
        run.server.take_unmasked(run.told)


# What the server sees.


def uniformity(data: bytes) -> float:
    """p-value of a chi-square test that all byte values are equally likely."""
    return float(chisquare(np.bincount(np.frombuffer(data, np.uint8), minlength=256)).pvalue)


def wide(seed, members=3, dim=2000):
    limits = terms(members, classes=("owl",), dim=dim)
    filled = tables(members, seed, classes=1, dim=dim)
    return Session(limits, {n: memory(t, ("owl",)) for n, t in filled.items()})


@pytest.mark.parametrize("empty", [False, True])
def test_masked_tables_look_uniform_and_open_ones_do_not(empty):
    run = wide(0)
    if empty:
        run.deltas = dict.fromkeys(run.deltas, PrototypeMemory.empty(2000, "e"))
    run.until("masked")
    for name, table in run.masked.items():
        assert uniformity(table.tobytes()) > 1e-9
        assert uniformity(to_words(run.deltas[name], run.server.terms).tobytes()) < 1e-100


def test_consecutive_messages_cannot_be_differenced():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.standard_normal((6, 2000)))
    empty = PrototypeMemory.empty(2000, "e")
    before, after = (empty.observe(images[:n], ["owl"] * n) for n in (5, 6))
    secret = torch.round(images[5] * 65536).long()

    # In the open: cumulative rows one after the other, so one image more is that image.
    assert torch.equal((after - before).sums[0], secret)

    # Masked: what the server gets of the same client, with the rest of the world unchanged.
    seen = []
    for delta in (before, after):
        run = wide(1)
        run.deltas["node00"] = delta
        run.until("masked")
        seen.append(run.masked["node00"])
    difference = seen[1] - seen[0]
    assert uniformity(difference.tobytes()) > 1e-9
    guess = difference[1:].view(np.int64)
    assert not (guess == secret.numpy()).any()
    assert abs(np.corrcoef(guess.astype(float), secret.numpy().astype(float))[0, 1]) < 0.2


def test_but_sums_with_one_newcomer_can_be_differenced():
    """A limit that the documentation states, so that nobody counts on more."""
    without = session(4, {"keys": ["node03"]}).total()
    assert session(4).total() - without == session(4).deltas["node03"]


def test_a_table_that_comes_too_late_stays_masked():
    run = session(5, {"masked": []})
    run.until("shares")
    late = run.clients["node00"].mask(run.dealt["node00"], run.deltas["node00"])
    run.lost["masked"] = {"node00"}
    run.masked = {n: run.clients[n].mask(run.dealt[n], run.deltas[n]) for n in run.here("masked")}
    run.arrived = run.server.take_masked(run.masked)
    run.told = {n: run.clients[n].unmask(run.arrived) for n in run.masked}
    run.server.take_unmasked(run.told)
    # The server now has the key of the late one, and takes all pair masks off its table.
    roster = Roster(run.keys, run.server.terms)
    key = combine_shares([told["node00"] for told in run.told.values()])
    assert public_key(key) == roster.mask_key("node00")
    peeled = late.copy()
    for peer in run.masked:
        gone = np.zeros_like(peeled)
        roster.add_pair_mask(gone, key, "node00", peer)
        peeled -= gone
    truth = to_words(run.deltas["node00"], run.server.terms)
    assert not (peeled == truth).any()
    # Only its own mask is left, which nobody but itself could open.
    assert (peeled - truth == roster.self_mask(run.clients["node00"]._secrets[2])).all()


def opened(shares):
    """What shares give back, None where they say themselves that they are too few."""
    try:
        return combine_shares(shares)
    except ValueError:  # padding that is none
        return None


def test_the_threshold_is_what_separates_a_secret_from_noise():
    run = session(5).until("masked")
    shares = [run.clients[f"node0{k}"]._shares["node04"][SHARE:] for k in range(4)]
    seed = run.clients["node04"]._secrets[2]
    assert run.server.terms.threshold == 3
    for some in combinations(shares, 3):
        assert opened(some) == seed
    for few in combinations(shares, 2):
        assert opened(few) != seed


def test_a_server_that_tells_each_half_something_else_opens_nothing():
    """No client colludes; the server asks some for the seed of one and the rest for its key."""
    for members in range(3, 9):
        run = session(members).until("masked")
        victim, *others = run.clients
        limit = run.server.terms.threshold
        for lie in range(members):
            seeds = keys = 0
            for k, name in enumerate(others):
                fates = dict.fromkeys(run.clients, True) | {victim: k >= lie}
                client = Client.from_bytes(run.clients[name].to_bytes())
                try:
                    told = client.unmask(fates)
                except InvalidMessage:  # a sum of too few
                    continue
                of_key, of_seed = (
                    run.clients[name]._shares[victim][:SHARE],
                    run.clients[name]._shares[victim][SHARE:],
                )
                assert told[victim] == (of_seed if fates[victim] else of_key)
                seeds += fates[victim]
                keys += not fates[victim]
            assert min(seeds + 1, keys) < limit  # the victim itself tells its seed at most


# What a client refuses.


def test_no_step_is_taken_twice_or_out_of_order():
    run = session(3)
    client = run.clients["node00"]
    for call in (
        lambda: client.share({}),
        lambda: client.mask({}, run.deltas["node00"]),
        lambda: client.unmask({}),
    ):
        with pytest.raises(InvalidMessage, match="no step is taken twice"):
            call()
    run.until("unmask")
    assert client.step == "end"
    for call in (
        client.advertise,
        lambda: client.share(run.keys),
        lambda: client.mask(run.dealt["node00"], run.deltas["node00"]),
        lambda: client.unmask(run.arrived),
    ):
        with pytest.raises(InvalidMessage, match="no step is taken twice"):
            call()
    run.server.take_unmasked(run.told)
    for again in (run.server.take_keys, run.server.take_shares, run.server.take_masked):
        with pytest.raises(InvalidMessage, match="each once"):
            again({})


def test_both_shares_of_one_client_are_never_told():
    run = session(5).until("masked")
    client = run.clients["node00"]
    told = client.unmask(run.arrived)
    with pytest.raises(InvalidMessage):
        client.unmask(run.arrived | {"node04": False})
    assert all(len(share) == SHARE for share in told.values())
    assert not any(run.clients["node00"]._secrets)  # nor kept


@pytest.mark.parametrize(
    "fates",
    [
        {},
        {"node00": True, "node01": True, "node02": True},
        {f"node0{k}": True for k in range(6)},
        {f"node0{k}": k > 0 for k in range(5)},
        {f"node0{k}": k < 2 for k in range(5)},
        {f"node0{k}": 1 for k in range(5)},
    ],
    ids=["nobody", "some unmentioned", "a stranger", "itself lost", "too few", "no answer"],
)
def test_a_server_that_lies_about_who_was_lost_is_refused(fates):
    run = session(5).until("masked")
    with pytest.raises(InvalidMessage):
        run.clients["node00"].unmask(fates)
    assert run.clients["node00"].unmask(run.arrived)  # the truth can still be told


def test_shares_that_were_changed_moved_or_replayed_are_refused():
    run, other = session(4).until("shares"), session(4).until("shares")
    client, dealt, delta = run.clients["node00"], run.dealt["node00"], run.deltas["node00"]
    sealed = dealt["node01"]
    wrong = [sealed[:-1], b"", sealed + b"\0", dealt["node02"], other.dealt["node00"]["node01"]]
    wrong.append(run.dealt["node02"]["node01"])  # sealed for another recipient
    wrong.append(run.sealed["node00"]["node01"])  # its own, sent back as the peer's
    for place in (0, 11, 12, SEALED // 2, SEALED - 1):
        changed = bytearray(sealed)
        changed[place] ^= 1
        wrong.append(bytes(changed))
    for bad in wrong:
        with pytest.raises(InvalidMessage, match="node01"):
            client.mask(dealt | {"node01": bad}, delta)
    for bad_set in ({**dealt, "stranger": sealed}, {**dealt, "node00": sealed}):
        with pytest.raises(InvalidMessage, match="peers of this round"):
            client.mask(bad_set, delta)
    with pytest.raises(InvalidMessage, match="at least 2 peers, got 1"):
        client.mask({"node01": sealed}, delta)
    assert len(client.mask(dealt, delta)) == run.server.terms.words


def test_clients_that_were_shown_different_keys_cannot_read_each_other():
    run = session(4).until("keys")
    stranger = Client("node03", run.server.terms).advertise()
    shown = {n: c.share(run.keys) for n, c in run.clients.items() if n != "node00"}
    run.clients["node00"].share(run.keys | {"node03": stranger})
    # Not even those whose keys were shown truly: one false key spoils the whole roster.
    dealt = {n: shown[n]["node00"] for n in ("node01", "node02")}
    with pytest.raises(InvalidMessage, match="changed, moved or replayed"):
        run.clients["node00"].mask(dealt, run.deltas["node00"])


def test_clients_with_other_terms_cannot_read_each_other():
    deltas = session(3).deltas
    run = Session(terms(3), deltas)
    run.clients["node00"] = Client("node00", terms(3, round_id="r2"))
    run.until("shares")
    with pytest.raises(InvalidMessage, match="changed, moved or replayed"):
        run.clients["node00"].mask(run.dealt["node00"], deltas["node00"])


def test_keys_that_are_wrong_weak_doubled_or_not_ones_own_are_refused():
    run = session(4).until("keys")
    client = run.clients["node00"]
    keys = run.keys
    zero = bytes(32)  # a point of small order: every key agreed with it is the same
    for bad in (
        {},
        {n: keys[n] for n in ("node00", "node01")},
        keys | {"node04": keys["node00"][::-1]},  # more than there are members
        keys | {"node01": keys["node01"][:-1]},
        keys | {"node01": keys["node02"]},
        keys | {"node01": keys["node00"][:32] + keys["node01"][32:]},
        keys | {"node01": keys["node01"][:32] + zero + keys["node01"][64:]},
        keys | {"node00": Client("node00", run.server.terms).advertise()},
        {n: keys[n] for n in ("node01", "node02", "node03")},
        {(n if n != "node03" else "\n"): key for n, key in keys.items()},
    ):
        with pytest.raises(InvalidMessage):
            client.share(bad)
    assert set(client.share(keys)) == {"node01", "node02", "node03"}


# What the server refuses.


def test_malformed_replies_count_as_lost_and_are_named():
    run = session(10)
    names = [*run.clients]
    advertised = {n: c.advertise() for n, c in run.clients.items()}
    weak = bytes(32) + advertised[names[0]][32:]
    keys = run.server.take_keys(advertised | {names[0]: weak, "late": b""})
    assert set(keys) == set(names[1:])
    sealed = {n: run.clients[n].share(keys) for n in names[1:]}
    sealed[names[1]].popitem()
    dealt = run.server.take_shares(sealed | {names[0]: sealed[names[2]]})
    assert set(dealt) == set(names[2:])
    masked = {n: run.clients[n].mask(dealt[n], run.deltas[n]) for n in names[2:]}
    of_the_lost = {names[1]: masked[names[3]], "stranger": masked[names[3]]}
    of_the_wrong_kind = {names[2]: masked[names[2]].astype(np.int64)}
    arrived = run.server.take_masked(masked | of_the_lost | of_the_wrong_kind)
    assert [n for n, came in arrived.items() if not came] == [names[2]]
    told = {n: run.clients[n].unmask(arrived) for n in names[3:]}
    told[names[3]] = dict.fromkeys(told[names[3]], b"")
    total = run.server.take_unmasked(told)
    assert set(run.server.refused) == {"late", "stranger", *names[:4]}
    assert total == memory(summed(tables(10), names[3:]))


def test_doubled_keys_are_refused_of_both():
    run = session(5)
    advertised = {n: c.advertise() for n, c in run.clients.items()}
    advertised["node01"] = advertised["node00"][:32] + advertised["node01"][32:]
    assert set(run.server.take_keys(advertised)) == {"node02", "node03", "node04"}
    assert set(run.server.refused) == {"node00", "node01"}


def test_more_nodes_than_the_terms_allow_are_refused():
    limits = terms(3)
    with pytest.raises(FederationError, match="at most 3 nodes in the sum, got 4"):
        Aggregator(limits).take_keys(
            {f"n{k}": Client(f"n{k}", limits).advertise() for k in range(4)}
        )


@pytest.mark.parametrize("lost", [[], ["node04"]], ids=["seed", "key"])
@pytest.mark.parametrize("kind", ["changed", "doubled"])
def test_false_shares_stop_the_round_and_name_the_secret(lost, kind):
    run = session(5, {"masked": lost}).until("unmask")
    honest = {n: dict(told) for n, told in run.told.items()}
    share = run.told["node00"]["node04"]
    run.told["node00"]["node04"] = (
        share[:10] + bytes([share[10] ^ 1]) + share[11:]
        if kind == "changed"
        else run.told["node01"]["node04"]
    )
    with pytest.raises(FederationError, match="secret of 'node04'"):
        run.server.take_unmasked(run.told)
    # Nothing was spoilt: the same server can still finish with honest answers.
    assert run.server.take_unmasked(honest) == memory(
        summed(tables(5), [n for n in run.deltas if n not in lost])
    )


# State and primitives.


def test_a_client_that_is_put_away_between_all_steps_gives_the_same_sum():
    run = session(4)

    def again():
        run.clients = {n: Client.from_bytes(c.to_bytes()) for n, c in run.clients.items()}

    again()
    keys = {n: c.advertise() for n, c in run.clients.items()}
    again()
    keys = run.server.take_keys(keys)
    sealed = {n: c.share(keys) for n, c in run.clients.items()}
    again()
    dealt = run.server.take_shares(sealed)
    masked = {n: c.mask(dealt[n], run.deltas[n]) for n, c in run.clients.items()}
    again()
    arrived = run.server.take_masked(masked)
    told = {n: c.unmask(arrived) for n, c in run.clients.items()}
    again()
    assert run.server.take_unmasked(told) == memory(summed(tables(4), run.clients))
    assert {c.step for c in run.clients.values()} == {"end"}


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"name": "a", "terms": 1}'])
def test_other_bytes_are_no_client(data):
    with pytest.raises(InvalidMessage):
        Client.from_bytes(data)


def test_masks_are_the_key_stream_of_chacha20():
    # RFC 8439, appendix A.1, test vector 1.
    stream = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    expected = [int.from_bytes(stream[k : k + 8], "little") for k in range(0, 32, 8)]
    assert expand(bytes(32), 4).tolist() == expected
    assert (expand(bytes(32), 1000)[:4] == expand(bytes(32), 4)).all()


def test_key_agreement_is_symmetric_and_separates_purposes():
    a, b = secrets.token_bytes(32), secrets.token_bytes(32)
    oracle = X25519PrivateKey.from_private_bytes(a).public_key().public_bytes_raw()
    assert public_key(a) == oracle
    made = {
        (purpose, context): agree(a, public_key(b), purpose, context)
        for purpose in ("mask", "seal")
        for context in (b"1", b"2")
    }
    assert len(set(made.values())) == 4
    for (purpose, context), key in made.items():
        assert agree(b, public_key(a), purpose, context) == key and len(key) == 32


def test_digests_tell_cuts_apart():
    cuts = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), ()]
    assert len({digest(*cut) for cut in cuts}) == len(cuts)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_sealed_texts_come_back_and_differ_every_time(text, context):
    key = bytes(32)
    one, two = seal(key, text, context), seal(key, text, context)
    assert one != two and len(one) == len(text) + SEAL
    assert unseal(key, one, context, "a") == unseal(key, two, context, "a") == text
    with pytest.raises(InvalidMessage):
        unseal(key, one, context + b"x", "a")


def test_sizes_are_as_documented():
    run = session(4).until("unmask")
    assert {len(keys) for keys in run.keys.values()} == {ADVERTISEMENT}
    assert {len(text) for sealed in run.sealed.values() for text in sealed.values()} == {SEALED}
    assert {len(text) for told in run.told.values() for text in told.values()} == {SHARE}


@given(st.integers(3, 10_000))
def test_a_majority_is_more_than_half_and_at_least_three(members):
    assert 2 * majority(members) > members >= majority(members) >= 3
    assert majority(members) == 3 or 2 * (majority(members) - 1) <= members


def test_words_are_twos_complement_in_rows_of_count_and_sums():
    delta = memory([[2, 1, -1, 0, 2**40]], ("fox",))
    words = to_words(delta, terms())
    assert words.reshape(3, 5)[1].tolist() == [2, 1, 2**64 - 1, 0, 2**40]
    assert not words.reshape(3, 5)[[0, 2]].any()
    assert from_words(words, terms(), 1) == delta


def test_no_two_rounds_share_a_mask():
    tables_seen = [session(3).until("masked").masked["node00"] for _ in range(3)]
    for one, two in pairwise(tables_seen):
        assert not (one == two).any()
