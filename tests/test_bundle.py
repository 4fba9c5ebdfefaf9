"""The file that travels: the same bytes, nothing believed, and the word unknown."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.backbones import Conv4, Encoder, Identity
from clfed.errors import (
    ConfigError,
    EmbeddingMismatch,
    EncoderError,
    InvalidEmbedding,
    InvalidMessage,
    MissingData,
    NotEnoughData,
    RunFolderError,
)
from clfed.federated.bundle import BUNDLE, Bundle, Prediction
from clfed.prototypes import PrototypeMemory
from clfed.prototypes.storage import pack, unpack

IDENTITY = {"_target_": "clfed.backbones.Identity"}
CONV4 = {"_target_": "clfed.backbones.Conv4", "widths": [4, 4, 4, 8]}
FEATURES = Encoder(Identity(2), IDENTITY, input_shape=(2,))
SEEN = {"owl": [[0.0, 0.0], [2.0, 0.0]], "fox": [[9.0, 0.0]], "λύκος": [[0.0, 9.0], [0.0, 9.0]]}


def memory(encoder: Encoder = FEATURES, seen=SEEN) -> PrototypeMemory:
    known = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    for name, rows in seen.items():
        known += known.observe(torch.tensor(rows), [name] * len(rows))
    return known


def bundle(threshold: float | None = -4.0, **changes) -> Bundle:
    return Bundle(FEATURES, memory(), threshold, **{"federation": "forest", "round": 3} | changes)


def picture_bundle() -> Bundle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = Conv4(1, 28, (4, 4, 4, 8))
    encoder = Encoder(network, CONV4, input_shape=(1, 28, 28), mean=(0.1,), std=(0.3,))
    known = PrototypeMemory.empty(encoder.dim, encoder.embedding_id)
    known = known.observe(encoder.embed(pictures(30)), [f"class {i:02d}" for i in range(30)])
    return Bundle(encoder, known, -1.0)


def pictures(number: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 1, 28, 28), generator=g, dtype=torch.uint8)


WHOLE = bundle().to_bytes()


@pytest.mark.parametrize(
    "made",
    [
        bundle(),
        bundle(None, federation="", round=0),
        bundle(-0.1 - 0.2),
        Bundle(FEATURES, PrototypeMemory.empty(2, FEATURES.embedding_id, "class"), -1.0),
        picture_bundle(),
    ],
    ids=["features", "no threshold", "long fraction", "nothing known", "pictures"],
)
def test_round_trip(made, tmp_path):
    data = made.to_bytes()
    read = Bundle.from_bytes(data)
    assert read.to_bytes() == data
    assert read.memory == made.memory
    assert read.encoder.embedding_id == made.encoder.embedding_id
    assert (read.threshold, read.federation, read.round) == (
        made.threshold,
        made.federation,
        made.round,
    )
    made.save(tmp_path / BUNDLE)
    assert Bundle.load(tmp_path / BUNDLE).to_bytes() == data
    assert Bundle.load(str(tmp_path)).to_bytes() == data  # the folder that holds it
    assert [file.name for file in tmp_path.iterdir()] == [BUNDLE]


def test_bytes_do_not_depend_on_how_the_memory_came_about():
    order = [*reversed(SEEN)]
    other = Bundle(FEATURES, memory(seen={name: SEEN[name] for name in order}), -4.0, "forest", 3)
    assert other.to_bytes() == WHOLE


def test_another_process_writes_the_same_bytes():
    program = (
        "import hashlib, sys; sys.path.insert(0, 'tests')\n"
        "from test_bundle import WHOLE; print(hashlib.sha256(WHOLE).hexdigest())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.strip() == hashlib.sha256(WHOLE).hexdigest(), said.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -4.5},
        {"threshold": None},
        {"federation": "wood"},
        {"round": 4},
        {"memory": memory().without(["fox"])},
    ],
    ids=str,
)
def test_everything_that_it_says_is_in_its_bytes(change):
    assert dataclasses.replace(bundle(), **change).to_bytes() != WHOLE


def test_another_embedding_is_one_sentence():
    other = Encoder(
        Identity(2),
        IDENTITY,
        input_shape=(2,),
        feature_map={
            "_target_": "clfed.prototypes.features.RandomProjection",
            "dim_out": 2,
            "seed": 3,
        },
    )
    with pytest.raises(EmbeddingMismatch) as caught:
        Bundle(other, memory(), None)
    said = str(caught.value)
    assert other.embedding_id[:8] in said and FEATURES.embedding_id[:8] in said
    assert said.count(".") == 1 and "\n" not in said


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": float("nan")},
        {"threshold": float("-inf")},
        {"threshold": "-4"},
        {"threshold": True},
        {"threshold": -4},
        {"round": -1},
        {"round": 1.0},
        {"round": True},
        {"federation": "x" * 129},
        {"federation": "a\nb"},
        {"federation": None},
        {"memory": -memory()},
        {"memory": PrototypeMemory.empty(3, FEATURES.embedding_id)},
    ],
    ids=str,
)
def test_bad_values_are_refused(change):
    with pytest.raises(InvalidMessage):
        dataclasses.replace(bundle(), **change)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        WHOLE[:7],
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        WHOLE + b"x",
        b"\xff" * len(WHOLE),
        memory().to_bytes(),
        FEATURES.to_bytes(),
        WHOLE.replace(b"forest", b"desert"),
        WHOLE.replace(b"-4.0", b"-9.0"),
        WHOLE.replace(b'\\"schema\\":1', b'\\"schema\\":2'),
    ],
    ids=[
        "empty",
        "head",
        "half",
        "cut",
        "longer",
        "ones",
        "memory",
        "encoder",
        "name",
        "threshold",
        "schema",
    ],
)
def test_damage_is_named(tmp_path, damaged):
    assert damaged != WHOLE
    (tmp_path / BUNDLE).write_bytes(damaged)
    with pytest.raises(InvalidMessage, match=r"bundle\.safetensors") as caught:
        Bundle.load(tmp_path)
    assert "Copy the bundle again" in caught.value.remedy


def test_no_flipped_byte_goes_unnoticed():
    whole = bytearray(WHOLE)
    for place in range(len(whole)):
        whole[place] ^= 1
        try:
            # What the digest leaves out is the layout, which says the same when it can be read.
            same = Bundle.from_bytes(bytes(whole)).to_bytes() == WHOLE
        except InvalidMessage:
            same = True
        assert same, place
        whole[place] ^= 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_say_the_same(data):
    whole = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = Bundle.from_bytes(bytes(whole))
    except (InvalidMessage, EmbeddingMismatch, EncoderError):
        return
    assert read.to_bytes() == WHOLE


def forged(**changes) -> bytes:
    """A bundle whose digest is right and whose parts are not."""
    from clfed.federated.bundle import _digest

    tensors, header = unpack(WHOLE, "bundle", "test")
    parts = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    fields = {name: header[name] for name in ("threshold", "federation", "round", "embedding_id")}
    for name, value in changes.items():
        (parts if name in parts else fields)[name] = value
    packed = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in parts.items()
    }
    return pack(packed, "bundle", fields | {"sha256": _digest(fields, parts)})


def test_a_forgery_without_change_is_the_bundle():
    assert forged() == WHOLE


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"embedding_id": "0" * 64}, EmbeddingMismatch),
        ({"embedding_id": None}, EmbeddingMismatch),
        ({"memory": PrototypeMemory.empty(2, "other").to_bytes()}, EmbeddingMismatch),
        ({"memory": PrototypeMemory.empty(3, FEATURES.embedding_id).to_bytes()}, InvalidMessage),
        ({"memory": (-memory()).to_bytes()}, InvalidMessage),
        ({"memory": WHOLE}, InvalidMessage),
        ({"encoder": b"x"}, EncoderError),
        ({"encoder": memory().to_bytes()}, EncoderError),
        ({"threshold": "nan"}, InvalidMessage),
        ({"threshold": float("nan")}, InvalidMessage),
        ({"threshold": 10**400}, InvalidMessage),
        ({"threshold": [-1.0]}, InvalidMessage),
        ({"federation": "\ud800"}, InvalidMessage),
        ({"federation": {"a": 1}}, InvalidMessage),
        ({"round": -1}, InvalidMessage),
        ({"round": 2.5}, InvalidMessage),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "+".join(value),
)
def test_parts_that_do_not_belong_together_are_refused(changes, error):
    with pytest.raises(error, match="the mail") as caught:
        Bundle.from_bytes(forged(**changes), "the mail")
    assert "Copy the bundle again" in caught.value.remedy


def test_incomplete_bundles_are_refused():
    tensors, header = unpack(WHOLE, "bundle", "test")
    plain = {key: value for key, value in header.items() if key not in ("kind", "schema")}
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(InvalidMessage, match="complete"):
            Bundle.from_bytes(pack(rest, "bundle", plain))
        with pytest.raises(InvalidMessage, match="expected bytes"):
            Bundle.from_bytes(pack(tensors | {name: torch.zeros(2, 2)}, "bundle", plain))
    for name in plain:
        rest = {other: value for other, value in plain.items() if other != name}
        with pytest.raises(InvalidMessage, match="complete"):
            Bundle.from_bytes(pack(tensors, "bundle", rest))


def test_any_reader_of_safetensors_finds_both_parts(tmp_path):
    bundle().save(tmp_path / BUNDLE)
    tensors = safetensors.torch.load_file(tmp_path / BUNDLE)
    assert PrototypeMemory.from_bytes(bytes(tensors["memory"].tolist())) == memory()
    with safetensors.safe_open(tmp_path / BUNDLE, "pt") as file:
        header = json.loads(file.metadata()["clfed"])
    assert header["embedding_id"] == FEATURES.embedding_id
    assert (header["federation"], header["round"], header["threshold"]) == ("forest", 3, -4.0)


def test_missing_bundles_have_a_remedy(tmp_path):
    for path in (tmp_path / "absent", tmp_path, tmp_path / "absent" / BUNDLE):
        with pytest.raises(MissingData, match="Expected a bundle at") as caught:
            Bundle.load(path)
        assert "folder of a node or server" in caught.value.remedy
    with pytest.raises(RunFolderError):
        bundle().save(tmp_path / "absent" / BUNDLE)


def test_what_fits_is_named_and_what_does_not_is_unknown():
    # The means are (1, 0) of two images, (9, 0) of one and (0, 9) of two.
    images = torch.tensor([[1.0, 2.0], [1.0, 2.5], [9.0, -2.0], [9.0, 2.9], [100.0, 0.0]])
    said = bundle(-4.0).predict(images)
    assert [one.label for one in said] == ["owl", None, "fox", None, None]
    assert [one.nearest for one in said] == ["owl", "owl", "fox", "fox", "fox"]
    expected = [-4 / 1.5, -6.25 / 1.5, -4 / 2, -8.41 / 2, -8281 / 2]
    assert [one.score for one in said] == pytest.approx(expected)
    assert bundle().scores(images).tolist() == [one.score for one in said]


def test_a_score_at_the_threshold_is_known():
    image = torch.tensor([[9.0, 2.0]])
    assert bundle(-2.0).predict(image)[0].label == "fox"
    assert bundle(-1.999).predict(image)[0].label is None


def test_without_threshold_nothing_is_unknown():
    said = bundle(None).predict(torch.tensor([[1e4, 1e4]]))
    assert said[0].label is not None and said[0].label == said[0].nearest


def test_the_ranking_is_nearest_first():
    said = bundle().predict(torch.tensor([[1.0, 1.0]]), top=9)
    assert said == [Prediction("owl", (("owl", -1 / 1.5), ("fox", -65 / 2), ("λύκος", -65 / 1.5)))]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(70)), st.integers(1, 70))
def test_order_and_batches_do_not_matter(order, size):
    made = PICTURES
    images = IMAGES[list(order)]
    said = [one for k in range(0, 70, size) for one in made.predict(images[k : k + size], 3)]
    assert said == [PREDICTIONS[place] for place in order]


PICTURES = picture_bundle()
IMAGES = pictures(70, seed=2)
PREDICTIONS = PICTURES.predict(IMAGES, 3)


def test_learned_pictures_are_found_again():
    said = PICTURES.predict(pictures(30))
    assert [one.label for one in said] == [f"class {i:02d}" for i in range(30)]
    assert [one.score for one in said] == pytest.approx([0] * 30, abs=1e-6)
    assert PICTURES.predict(IMAGES[:0]) == []


def test_bad_input_is_refused():
    with pytest.raises(InvalidEmbedding):
        PICTURES.predict(torch.zeros(2, 28, 28, dtype=torch.uint8))
    with pytest.raises(InvalidEmbedding):
        bundle().scores(torch.zeros(2, 3))
    with pytest.raises(ConfigError):
        bundle().predict(torch.zeros(1, 2), top=0)
    empty = Bundle(FEATURES, PrototypeMemory.empty(2, FEATURES.embedding_id), None)
    with pytest.raises(NotEnoughData):
        empty.predict(torch.zeros(1, 2))
