"""Requests to forget: files, which samples they mean, and everything that is refused."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clfed.config import build, choices, compose
from clfed.data.benchmark import ImageSet
from clfed.errors import RequestError, UnknownClass
from clfed.scenarios.holdings import Holdings
from clfed.unlearning.requests import Request, read_requests, resolve, to_file

NONE = torch.empty(0, dtype=torch.int64)
CLASSES = ("ant", "bee", "cat", "7")


def make_holdings() -> Holdings:
    """Twelve images with ids 100, 103, ..; three a class, in turn; two owners and an idle one."""
    labels = torch.arange(12) % 4
    train = ImageSet(torch.arange(12.0)[:, None], labels, CLASSES)
    owners = (torch.arange(12) >= 8).long()
    nobody = train.subset(NONE)
    ids = 100 + 3 * torch.arange(12)
    return Holdings(train, ids, owners, ("ann", "bob", "idle"), nobody, nobody, "twelve")


def written(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


SEQUENCE = [
    Request("r1", "class", classes=("bee", "7")),
    Request("r2", "sample", samples=(100, 112)),
    Request("r3", "contributor", contributor="bob"),
]
AS_YAML = """
requests:
- {id: r1, kind: class, classes: [bee, '7']}
- id: r2
  kind: sample
  samples: [112, 100]
- {id: r3, kind: contributor, contributor: bob}
"""


def test_a_file_holds_one_request_or_a_list(tmp_path):
    assert read_requests(written(tmp_path, AS_YAML)) == SEQUENCE
    as_json = json.dumps({"requests": [r.plain() for r in SEQUENCE]}, indent="\t")
    assert read_requests(written(tmp_path, as_json, "r.json")) == SEQUENCE
    assert read_requests(written(tmp_path, "{id: r1, kind: sample, samples: [3]}")) == [
        Request("r1", "sample", samples=(3,))
    ]


NAMES = st.text(min_size=1, max_size=8).filter(str.isprintable)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.lists(NAMES, min_size=1, unique=True).map(
                lambda names: ("class", {"classes": tuple(names)})
            ),
            st.sets(st.integers(0, 2**63 - 1), min_size=1).map(
                lambda ids: ("sample", {"samples": tuple(sorted(ids))})
            ),
            NAMES.map(lambda name: ("contributor", {"contributor": name})),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read(tmp_path_factory, parts):
    requests = [Request(f"r{row}", kind, **what) for row, (kind, what) in enumerate(parts)]
    folder = tmp_path_factory.mktemp("requests")
    to_file(requests, folder / "a.yaml")
    assert read_requests(folder / "a.yaml") == requests
    to_file(read_requests(folder / "a.yaml"), folder / "b.yaml")
    assert (folder / "b.yaml").read_bytes() == (folder / "a.yaml").read_bytes()


REFUSED = {
    "not YAML": "{id: [",
    "no mapping": "just words",
    "nothing": "",
    "a list": "- {id: r, kind: class, classes: [bee]}",
    "requests that are no list": "requests: {id: r, kind: class, classes: [bee]}",
    "no requests": "requests: []",
    "a key beside requests": "{requests: [{id: r, kind: class, classes: [bee]}], when: now}",
    "an unknown key": "{id: r, kind: class, classes: [bee], when: now}",
    "a key that is no text": "{id: r, kind: class, classes: [bee], 3: 4}",
    "a key twice": "{id: r, kind: class, classes: [bee], classes: [ant]}",
    "no id": "{kind: class, classes: [bee]}",
    "no kind": "{id: r, classes: [bee]}",
    "an unknown kind": "{id: r, kind: galaxy, classes: [bee]}",
    "a kind that is a list": "{id: r, kind: [class], classes: [bee]}",
    "the key of another kind": "{id: r, kind: class, samples: [1]}",
    "keys of two kinds": "{id: r, kind: class, classes: [bee], samples: [1]}",
    "no classes": "{id: r, kind: class, classes: []}",
    "no samples": "{id: r, kind: sample, samples: []}",
    "no contributor": "{id: r, kind: contributor, contributor: ''}",
    "nothing named": "{id: r, kind: contributor}",
    "classes as one text": "{id: r, kind: class, classes: bee}",
    "a class that is a number": "{id: r, kind: class, classes: [7]}",
    "a class that is a truth value": "{id: r, kind: class, classes: [no]}",
    "a class that is a date": "{id: r, kind: class, classes: [2001-01-01]}",
    "a class twice": "{id: r, kind: class, classes: [bee, bee]}",
    "a class without a name": "{id: r, kind: class, classes: ['']}",
    "a class of two lines": '{id: r, kind: class, classes: ["a\\nb"]}',
    "a contributor of two lines": '{id: r, kind: contributor, contributor: "a\\nb"}',
    "a sample that is a text": "{id: r, kind: sample, samples: ['1']}",
    "a sample that is a fraction": "{id: r, kind: sample, samples: [1.0]}",
    "a sample that is a truth value": "{id: r, kind: sample, samples: [true]}",
    "a negative sample": "{id: r, kind: sample, samples: [-1]}",
    "a sample beyond 64 bits": "{id: r, kind: sample, samples: [9223372036854775808]}",
    "a sample twice": "{id: r, kind: sample, samples: [1, 1]}",
    "a contributor that is a number": "{id: r, kind: contributor, contributor: 3}",
    "an id that is a number": "{id: 3, kind: sample, samples: [1]}",
    "an id that leaves its folder": "{id: ../r, kind: sample, samples: [1]}",
    "an id that is empty": "{id: '', kind: sample, samples: [1]}",
    "an id of two lines": '{id: "r\\n", kind: sample, samples: [1]}',
    "one id twice": (
        "requests: [{id: r, kind: sample, samples: [1]}, {id: r, kind: sample, samples: [2]}]"
    ),
    "a list within itself": "{id: r, kind: sample, samples: &a [*a]}",
    "a tag": "{id: r, kind: sample, samples: !!python/object/apply:os.getcwd []}",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_a_file_with_a_mistake_is_refused_by_name_in_one_line(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    assert str(path) in str(caught.value) and "xpected" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def test_a_list_that_grows_without_end_is_refused_at_once(tmp_path):
    bomb = "a0: &a0 [1]\n" + "".join(
        f"a{row}: &a{row} [{', '.join([f'*a{row - 1}'] * 9)}]\n" for row in range(1, 30)
    )
    with pytest.raises(RequestError):
        read_requests(written(tmp_path, bomb))


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(RequestError) as caught:
            read_requests(path)
        assert str(path) in str(caught.value)
    for text in ("{", '{"id": "r", "id": "s", "kind": "sample", "samples": [1]}', "[" * 10_000):
        with pytest.raises(RequestError):
            read_requests(written(tmp_path, text, "r.json"))
    with pytest.raises(RequestError):
        to_file([SEQUENCE[0], SEQUENCE[0]], tmp_path / "twice.yaml")
    assert not (tmp_path / "twice.yaml").exists()


def meant(request, gone=NONE):
    return resolve(request, make_holdings(), gone).tolist()


def test_requests_mean_samples_by_id():
    assert meant(SEQUENCE[0]) == [103, 109, 115, 121, 127, 133]  # rows 1, 3, 5, 7, 9, 11
    assert meant(SEQUENCE[1]) == [100, 112]
    assert meant(SEQUENCE[2]) == [124, 127, 130, 133]


def test_a_later_request_means_what_is_left():
    gone = torch.tensor([103, 133, 9999])
    assert meant(SEQUENCE[0], gone) == [109, 115, 121, 127]
    assert meant(SEQUENCE[2], gone) == [124, 127, 130]
    for request in SEQUENCE:
        with pytest.raises(RequestError, match="still there"):
            meant(request, torch.tensor(meant(request)))


def test_what_the_data_do_not_hold_is_refused():
    with pytest.raises(UnknownClass, match="Bee"):
        meant(Request("r", "class", classes=("ant", "Bee")))
    with pytest.raises(RequestError, match="2 that are not, the first is 101"):
        meant(Request("r", "sample", samples=(100, 102, 101)))
    with pytest.raises(RequestError, match="'Bob'"):
        meant(Request("r", "contributor", contributor="Bob"))
    with pytest.raises(RequestError, match="still there"):
        meant(Request("r", "contributor", contributor="idle"))


def test_something_must_stay():
    everything = Request("r", "class", classes=CLASSES)
    with pytest.raises(RequestError, match="all 12"):
        meant(everything)
    with pytest.raises(RequestError, match="all 4"):
        meant(SEQUENCE[2], make_holdings().ids[:8])
    assert len(meant(Request("r", "sample", samples=tuple(range(100, 133, 3))))) == 11


@functools.cache
def configured(choice, *options):
    return compose([f"forget={choice}", *options]).forget


def requests(choice, *options, seed=0):
    settings = configured(choice, *options)
    return build(settings, holdings=make_holdings(), seed=seed, original=pytest.fail)


def test_choices_of_the_command_line(tmp_path):
    assert requests("class", "forget.classes=[bee,7]")[0].classes == ("bee", "7")
    assert requests("class", "forget.classes=bee")[0].classes == ("bee",)
    assert requests("samples", "forget.samples=[103,100]")[0].samples == (100, 103)
    assert requests("samples", "forget.samples=103")[0].samples == (103,)
    assert requests("contributor", "forget.contributor=ann")[0].contributor == "ann"
    path = written(tmp_path, AS_YAML)
    assert requests("file", f"forget.path={path}") == SEQUENCE


@pytest.mark.parametrize("choice", ["class", "random", "contributor"])
def test_draws_depend_on_the_seed_alone_and_mean_something(choice):
    for seed in range(30):
        found = requests(choice, seed=seed)
        torch.rand(3)
        assert found == requests(choice, seed=seed)
        assert [len(meant(request)) > 0 for request in found] == [True]
    drawn = {requests(choice, seed=seed)[0].what for seed in range(30)}
    assert len(drawn) == {"class": 4, "contributor": 2}.get(choice, len(drawn)) > 1


def test_random_shares():
    for share, size in ((0.001, 1), (0.25, 3), (0.5, 6), (0.95, 11)):
        found = requests("random", f"forget.share={share}")[0].samples
        assert len(found) == len(set(found)) == size
        assert set(found) <= set(make_holdings().ids.tolist())


@pytest.mark.parametrize(
    "words",
    [
        ["random", "forget.share=0"],
        ["random", "forget.share=1"],
        ["random", "forget.share=true"],
        ["random", "forget.share=half"],
        ["samples"],
        ["samples", "forget.samples=[a]"],
        ["class", "forget.classes=[]"],
        ["class", "forget.classes=[1.5]"],
        ["class", "forget.classes=[true]"],
        ["contributor", "forget.contributor=3"],
        ["file"],
        ["file", "forget.path=nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_choices_that_cannot_be_are_refused(words):
    with pytest.raises(RequestError):
        requests(*words)


def test_all_own_choices_are_tried_here():
    own = {"class", "random", "samples", "contributor", "file"}
    assert own <= {name for name, _ in choices("forget")}


def test_classes_can_go_one_by_one():
    options = {"_target_": "clfed.unlearning.selection.of_classes", "one_by_one": True}
    made = build(
        options | {"classes": ["bee", 7]}, holdings=make_holdings(), seed=0, original=lambda: None
    )
    assert [(request.id, request.classes) for request in made] == [
        ("class1", ("bee",)),
        ("class2", ("7",)),
    ]
    first = resolve(made[0], make_holdings(), NONE)
    assert not set(first.tolist()) & set(resolve(made[1], make_holdings(), first).tolist())
