"""Certificates: what holds is confirmed, and every change of anything is found."""

import copy
import hashlib
import json
import random
import shutil
import sys
from dataclasses import fields, replace

import pytest
import torch
from omegaconf import OmegaConf

from clfed.cli import main
from clfed.config import build, compose
from clfed.errors import CertificateError, ConfigError
from clfed.federated.field import open_benchmark
from clfed.jobs.verify import run as verify_job
from clfed.learners import state
from clfed.learners.fitting import learn
from clfed.learners.options import TrainerOptions
from clfed.learners.training import initial_backbone, make_learner
from clfed.scenarios.streams import Experience
from clfed.unlearning import Request, forget, make_context
from clfed.unlearning.certificate import Certificate, certify, issue, read
from clfed.unlearning.exact import Exact
from clfed.unlearning.model_file import load_model, read_model, save_model
from clfed.unlearning.report import Report
from clfed.unlearning.requests import resolve
from clfed.unlearning.statistics import Statistics
from clfed.unlearning.verification import verify

OPTIONS = TrainerOptions(precision="32", threads=1, loop="fast")
SETTINGS = [
    "data=digits",
    "scenario=holdings",
    "scenario.train_images=20",
    "scenario.contributors=3",
    "backbone=identity",
    "seed=5",
]
NCM = ("learner=ncm", "learner.train=none")
REQUESTS = [
    Request("r1", "class", classes=("3",)),
    Request("r2", "contributor", contributor="contributor01"),
    Request("r3", "class", classes=("7", "8")),
]


def untrained(holdings, *chosen):
    """A learner on pixels, nearest class mean unless another is chosen."""
    plain = OmegaConf.to_container(compose([*SETTINGS, *(chosen or NCM)]))
    shape = tuple(holdings.train.images.shape[1:])
    backbone = initial_backbone(plain["backbone"], shape, 0)
    benchmark = open_benchmark(plain["data"])
    return make_learner(plain["learner"], backbone, benchmark, dim=64, seed=0)


def trained(holdings, *chosen):
    model = untrained(holdings, *chosen)
    learn(model, Experience(0, holdings.train, phase=0, upcoming=0), OPTIONS)
    return model


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """A pair of keys, made by the library itself."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder, made = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate()
    private = made.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public = made.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pem").write_bytes(private)
    (folder / "public.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, key):
    """The folder of a run with three requests, the last one signed, and its data."""
    run = tmp_path_factory.mktemp("run")
    cfg = compose(SETTINGS)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    plain = OmegaConf.to_container(cfg)
    benchmark = open_benchmark(plain["data"])
    holdings = build(plain["scenario"], benchmark=benchmark, seed=plain["seed"])
    model = trained(holdings)
    owners = [holdings.contributors[owner] for owner in holdings.owners.tolist()]
    found = Statistics.of(model, holdings.train, holdings.ids, owners)
    gone, issued = holdings.ids[:0], []
    for number, request in enumerate(REQUESTS, 1):
        ids = resolve(request, holdings, gone)
        around = make_context(
            request, model, holdings.train, holdings.ids, gone=ids, statistics=found
        )
        unlearner = Exact(model, name="exact")
        model, report = forget(unlearner, around, OPTIONS)
        found = unlearner.statistics
        certificate = certify(
            run / "requests" / f"{number:02d}-{request.id}",
            model=model,
            request=request,
            gone=ids,
            holdings=holdings,
            settings={"name": "exact", "deep": {"lr": 0.1, "list": (1, None, True)}},
            report=report,
            evidence={"ua": 1.0, "attack": float("nan"), "ra": 0.9},
            oracle={"ua": {"mean": 0.98, "spread": None}},
            previous=issued,
            signing_key=key / "key.pem" if number == 3 else None,
        )
        issued.append(certificate)
        gone = torch.cat([gone, ids])
    return run, holdings, issued


@pytest.fixture
def again(made, tmp_path):
    """A copy of the run's folder that may be damaged."""
    return shutil.copytree(made[0], tmp_path / "run")


def place(run, number):
    return run / "requests" / f"{number:02d}-r{number}"


def checks(made, number, certificate=None, *, previous=None, model=None, **options):
    run, _, issued = made
    return verify(
        certificate or issued[number - 1],
        model_file=model or place(run, number) / "model.pt",
        previous=issued[: number - 1] if previous is None else previous,
        **options,
    )


def failed(found):
    return [check.name for check in found if not check.ok]


def job(certificate, *more):
    return verify_job(compose(["job=verify", f"job.certificate='{certificate}'", *more]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_was_issued_holds(made, number):
    run, holdings, issued = made
    certificate = read(place(run, number) / "certificate.json")
    assert certificate == issued[number - 1]
    found = checks(made, number, certificate, holdings=holdings)
    assert not failed(found) and all(check.sentence.endswith(".") for check in found)
    names = {check.name for check in found}
    assert {"digest", "chain", "model", "file", "answers", "statistics", "classes"} <= names
    assert {"samples", "data before", "data after", "request"} <= names
    assert ("outputs" in names) == (REQUESTS[number - 1].kind == "class")
    assert ("signature" in names) == (number == 3)


def test_the_content_says_what_was_done(made):
    """Against hashes taken here by hand."""
    run, holdings, (first, second, third) = made
    assert first.number == 1 and first.previous is None and second.previous == first.digest
    assert third.request == {"id": "r3", "kind": "class", "classes": ["7", "8"]}
    rows = [i for i, label in enumerate(holdings.train.labels.tolist()) if label == 3]
    assert sorted(map(int, first.deleted)) == sorted(holdings.ids[rows].tolist())
    pixels = holdings.train.images[rows[0]].numpy()
    told = f"uint8 {pixels.shape} 3\n".encode() + pixels.tobytes()
    sample = str(int(holdings.ids[rows[0]]))
    assert first.deleted[sample] == hashlib.sha256(told).hexdigest()
    data = (place(run, 1) / "model.pt").read_bytes()
    assert first.model_file == hashlib.sha256(data).hexdigest()
    assert second.model_from == first.model_to != first.model_from
    assert second.statistics_from == first.statistics_to
    assert first.data_from == holdings.train.fingerprint
    assert second.data_from == first.data_to
    assert first.evidence["ua"] == {"value": 1.0, "oracle": 0.98}
    assert first.evidence["ra"] == {"value": 0.9, "oracle": None}
    assert first.evidence["attack"] == {"value": None, "oracle": None}
    assert first.settings == {"name": "exact", "deep": {"lr": 0.1, "list": [1, None, True]}}
    assert first.exact and "embedding keeps" in first.scope
    assert first.classifier == {"name": "ncm"} and first.time.endswith("+00:00")
    assert first.public_key is None and third.public_key and third.signature
    assert not set(first.deleted) & set(second.deleted)


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    if isinstance(value, dict):
        return {**value, "more": "x"}
    return "x"


@pytest.mark.parametrize("name", [field.name for field in fields(Certificate)])
@pytest.mark.parametrize("number", [1, 3])
def test_every_changed_field_is_found(made, number, name):
    certificate = made[2][number - 1]
    changed = replace(certificate, **{name: other(getattr(certificate, name))})
    assert failed(checks(made, number, changed))[0] == (
        "signature" if name == "signature" else "digest"
    )


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("number", "chain"),
        ("request", "files"),
        ("deleted", "samples"),
        ("model_from", "chain"),
        ("model_to", "model"),
        ("model_file", "file"),
        ("classifier", "answers"),
        ("statistics_to", "statistics"),
        ("data_from", "chain"),
        ("data_to", "data after"),
        ("previous", "chain"),
    ],
)
def test_a_change_with_a_new_digest_is_found_by_what_it_contradicts(made, name, check):
    certificate = made[2][1]
    changed = replace(certificate, **{name: other(getattr(certificate, name))})
    changed = replace(changed, digest=changed.computed_digest)
    found = failed(checks(made, 2, changed, holdings=made[1]))
    assert found[0] == check and "digest" not in found


def test_the_deleted_samples_are_those_that_the_request_means(made):
    """Here all hashes are recomputed for another request, as a careful forger would do."""
    _, holdings, issued = made
    certificate = replace(issued[0], request=Request("r1", "class", classes=("4",)).plain())
    certificate = replace(certificate, digest=certificate.computed_digest)
    found = failed(checks(made, 1, certificate, holdings=holdings))
    assert found == ["outputs", "classes", "request"]
    absent = replace(issued[0], request=Request("r1", "class", classes=("none",)).plain())
    assert "files" in failed(checks(made, 1, absent, holdings=holdings))


def test_every_changed_byte_is_found(made, again):
    """All positions, each with a random other byte, and a byte more or less."""
    rng = random.Random(0)
    path = place(again, 3) / "certificate.json"
    data = path.read_bytes()
    positions = range(0, len(data), max(1, len(data) // 400))
    damaged = [
        data[:i] + bytes([(data[i] + rng.randint(1, 255)) % 256]) + data[i + 1 :] for i in positions
    ]
    damaged += [data[:i] + data[i + 1 :] for i in positions[::8]]
    damaged += [data[:i] + b" " + data[i:] for i in positions[::8]]
    damaged += [data + b"\n", data[:-1], b"\xef\xbb\xbf" + data]
    for content in damaged:
        path.write_bytes(content)
        try:
            certificate = read(path)
        except CertificateError as error:
            assert str(path) in str(error)
            continue
        assert failed(checks(made, 3, certificate))


DAMAGE = {
    "nothing": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "no mapping": lambda text: "[1, 2]",
    "not JSON": lambda text: "number: 1",
    "NaN": lambda text: text.replace('"number": 1', '"number": NaN'),
    "a number beyond floats": lambda text: text.replace('"value": 0.9', '"value": 1e999'),
    "another order": lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=1),
    "another layout": lambda text: json.dumps(json.loads(text), sort_keys=True),
    "a key twice": lambda text: text.replace('"number": 1', '"number": 1,\n "number": 1'),
    "a key less": lambda text: text.replace(' "number": 1,\n', ""),
    "a key more": lambda text: text.replace('"number": 1', '"note": 1,\n "number": 1'),
    "another type": lambda text: text.replace('"number": 1', '"number": "1"'),
    "a newer form": lambda text: text.replace('"format": 1', '"format": 2'),
    "too deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_name(made, again, damage):
    path = place(again, 1) / "certificate.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(CertificateError) as caught:
        read(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_another_model_is_found(made, again):
    one, two = place(again, 1) / "model.pt", place(again, 2) / "model.pt"
    assert failed(checks(made, 1, model=two)) == ["model", "file", "statistics"]
    content = torch.load(one, weights_only=True)
    content["more"] = torch.zeros(3)  # such as an image that should be gone
    torch.save(content, two)
    assert failed(checks(made, 1, model=two)) == ["file"]
    data = bytearray(one.read_bytes())
    for i in random.Random(0).sample(range(len(data)), 40):
        two.write_bytes(bytes([*data[:i], data[i] ^ 1, *data[i + 1 :]]))
        assert {"file", "files"} & set(failed(checks(made, 1, model=two)))
    for content in (data[: len(data) // 2], b"", b"words"):
        two.write_bytes(content)
        assert failed(checks(made, 1, model=two)) == ["files"]
    two.unlink()
    found = [check for check in checks(made, 1, model=two) if not check.ok]
    assert [check.name for check in found] == ["files"] and "no such file" in found[0].sentence


def test_a_model_that_still_knows_the_class_is_found(made, again):
    """Certified in all honesty by a program that forgot to forget."""
    _, holdings, issued = made
    model = trained(holdings)
    path = again / "model.pt"
    save_model(path, model)
    file = read_model(path)
    certificate = replace(
        issued[0],
        model_to=file.state_sha256,
        model_file=file.sha256,
        statistics_to=model.memory.sha256(),
    )
    certificate = replace(certificate, digest=certificate.computed_digest)
    assert failed(checks(made, 1, certificate, model=path)) == ["outputs", "classes"]


def test_a_broken_chain_is_found(made):
    first, second, _ = made[2]
    for previous in ([], [first], [second, first], [first, first], [first, second, second]):
        assert failed(checks(made, 3, previous=previous)) == ["chain"]
    changed = replace(first, scope="everything")
    for forged in (changed, replace(changed, digest=changed.computed_digest)):
        assert failed(checks(made, 3, previous=[forged, second])) == ["chain"]
    assert failed(checks(made, 1, previous=[second])) == ["chain"]


def test_other_data_are_found(made):
    holdings = made[1]
    pixels = holdings.train.images.clone()
    row = int((holdings.train.labels == 3).nonzero()[0])
    pixels[row] ^= 1
    touched = replace(holdings, train=replace(holdings.train, images=pixels))
    assert failed(checks(made, 1, holdings=touched)) == ["samples", "data before"]
    pixels = holdings.train.images.clone()
    pixels[int((holdings.train.labels == 4).nonzero()[0])] ^= 1
    touched = replace(holdings, train=replace(holdings.train, images=pixels))
    assert failed(checks(made, 1, holdings=touched)) == ["data before", "data after"]
    fewer = replace(holdings, ids=holdings.ids + 1)
    assert "samples" in failed(checks(made, 1, holdings=fewer))


def test_signatures(made, key, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    third = made[2][2]
    assert not failed(checks(made, 3, public_key=third.public_key))
    assert failed(checks(made, 1, public_key=third.public_key)) == ["signer"]
    theirs = Ed25519PrivateKey.generate()
    public = theirs.public_key().public_bytes_raw().hex()
    # Somebody else changes a certificate and signs it, with the key's name left or replaced.
    for claimed in (third.public_key, public):
        forged = replace(third, scope="everything", public_key=claimed)
        digest = forged.computed_digest
        told = b"clfed unlearning certificate\n" + digest.encode()
        forged = replace(forged, digest=digest, signature=theirs.sign(told).hex())
        found = failed(checks(made, 3, forged, public_key=third.public_key))
        assert found == (["signature"] if claimed == third.public_key else ["signer"])
    for signature in (None, "", "zz", "00" * 64):
        assert failed(checks(made, 3, replace(third, signature=signature))) == ["signature"]
    bare = replace(third, public_key=None)
    bare = replace(bare, digest=bare.computed_digest)
    assert failed(checks(made, 3, bare)) == ["signature"]
    (tmp_path / "words").write_text("words")
    (tmp_path / "elliptic").write_bytes(_other_kind())
    for path in (
        tmp_path / "words",
        tmp_path / "absent",
        tmp_path / "elliptic",
        key / "public.pem",
    ):
        with pytest.raises(CertificateError, match="private key"):
            issue_again(made, signing_key=path)


def _other_kind():
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP256R1())
    return made.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def issue_again(made, **changes):
    run, holdings, issued = made
    report = Report(
        unlearner="exact",
        request="r1",
        exact=True,
        scope="",
        touched={},
        steps=0,
        seconds=0.0,
        before="",
        after=issued[0].model_to,
    )
    content = {
        "request": REQUESTS[0],
        "gone": holdings.ids[:1],
        "holdings": holdings,
        "settings": {},
        "report": report,
        "model_file": place(run, 1) / "model.pt",
        "evidence": {},
    }
    return issue(**{**content, **changes})


def test_only_the_model_of_the_report_is_certified(made):
    assert issue_again(made).model_to == made[2][0].model_to
    with pytest.raises(CertificateError, match="got another"):
        issue_again(made, model_file=place(made[0], 2) / "model.pt")
    with pytest.raises(CertificateError, match="no such file"):
        issue_again(made, model_file=made[0] / "absent.pt")


def test_nothing_is_deleted_twice(made):
    first, second, _ = made[2]
    both = torch.tensor([*map(int, [*first.deleted, *second.deleted])])
    certificate = issue_again(made, previous=[first], gone=both)
    assert certificate.deleted == second.deleted and certificate.data_to == second.data_to


def test_a_model_file_gives_the_model_back(made, tmp_path):
    """What a file says of a state needs no network, and is what the learner itself says."""
    holdings = made[1]
    naive = ("learner=naive", "+learner.moments=none", "learner.epochs=1")
    model = trained(holdings, *naive)
    model.classifier = {"name": "ncm"}
    model.retire(["3"])
    model.kept = {"half": torch.ones(3, dtype=torch.bfloat16)}
    save_model(tmp_path / "model.pt", model)
    found = load_model(tmp_path / "model.pt", untrained(holdings, *naive))
    expected = state.sha256(model)
    assert state.sha256(found) == expected == read_model(tmp_path / "model.pt").state_sha256
    assert torch.equal(found.scores_of(holdings.test.images), model.scores_of(holdings.test.images))
    changed = copy.deepcopy(state.state_of(model))
    assert state.sha256_of(changed) == expected
    next(iter(changed["model"].values())).view(-1)[0] += 1
    assert state.sha256_of(changed) != expected
    buffer = {"images": torch.zeros(1, 2), "labels": torch.zeros(1), "classes": [], "offered": 1}
    for part, value in (
        ("classes", ["x"]),
        ("number", 9),
        ("retired", []),
        ("memory", None),
        ("kept", {"half": torch.zeros(3, dtype=torch.bfloat16)}),
        ("buffer", buffer),
    ):
        assert state.sha256_of({**state.state_of(model), part: value}) != expected


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_command_prints_a_line_a_check(again, capsys, number):
    found = job(place(again, number) / "certificate.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) >= 11
    assert all(line.startswith("ok ") for line in lines)
    assert not any(line.startswith("failed") for line in lines)


def spoil_model(run):
    shutil.copy(place(run, 1) / "model.pt", place(run, 2) / "model.pt")


def spoil_content(run):
    path = place(run, 2) / "certificate.json"
    path.write_text(path.read_text().replace('"oracle": 0.98', '"oracle": 0.97'))


def other_seed(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 5", "seed: 6"))


def foreign_data(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("clfed.data.digits.load", "os.system"))


SPOILED = {
    "another model": (spoil_model, "model"),
    "other content": (spoil_content, "digest"),
    "other data": (other_seed, "samples"),
    "data of another program": (foreign_data, "'os.system'"),
    "no certificate": (lambda run: (place(run, 2) / "certificate.json").unlink(), "No such file"),
    "no predecessor": (lambda run: shutil.rmtree(place(run, 1)), "number 1"),
    "two predecessors": (
        lambda run: shutil.copytree(place(run, 1), run / "requests" / "01-copy"),
        "got 2",
    ),
    "no model": (lambda run: (place(run, 2) / "model.pt").unlink(), "no such file"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), "config.yaml"),
    "no words in the configuration": (
        lambda run: (run / "config.yaml").write_text("- 1"),
        "config.yaml",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_the_command_names_what_fails_first(again, spoil, words):
    spoil(again)
    with pytest.raises(CertificateError) as caught:
        job(place(again, 2) / "certificate.json")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_folders_that_changed_places_are_found(again):
    folder = again / "requests"
    (folder / "01-r1").rename(folder / "r1")
    (folder / "02-r2").rename(folder / "01-r2")
    (folder / "r1").rename(folder / "02-r1")
    for path in (folder / "01-r2", place(again, 3)):
        with pytest.raises(CertificateError, match="chain: "):
            job(path / "certificate.json")


def test_the_data_can_be_left_out(again, key):
    (again / "config.yaml").unlink()
    path = place(again, 3) / "certificate.json"
    assert "samples" not in {check.name for check in job(path, "job.data=false")}
    found = job(path, "job.data=false", f"job.public_key='{key / 'public.pem'}'")
    assert {"signer", "signature"} <= {check.name for check in found}
    with pytest.raises(CertificateError, match="public key"):
        job(path, "job.data=false", f"job.public_key='{key / 'key.pem'}'")
    unsigned = place(again, 1) / "certificate.json"
    with pytest.raises(CertificateError, match="signer"):
        job(unsigned, "job.data=false", f"job.public_key='{key / 'public.pem'}'")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["job.certificate=3"],
        ["job.certificate=x", "job.data=maybe"],
        ["job.certificate=x", "job.public_key=3"],
    ],
)
def test_options_of_another_kind_are_refused(words):
    with pytest.raises(ConfigError):
        verify_job(compose(["job=verify", *words]))


def test_exit_codes(again, monkeypatch, capsys):
    path = place(again, 1) / "certificate.json"
    monkeypatch.setattr(sys, "argv", ["clfed", "job=verify", f"job.certificate='{path}'"])
    main()
    assert "ok " in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 62
    assert str(path) in capsys.readouterr().err
