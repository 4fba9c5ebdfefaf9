"""The report over runs of federated methods: rows, columns, commands and the figure."""

import copy
import re
import shlex
import statistics

import pytest
from omegaconf import OmegaConf
from test_report import plain, report, results, rows_of, text_of, write

from clfed.config import compose
from clfed.reporting import federated_chart
from clfed.reporting.commands import command_lines, recipe
from clfed.reporting.federated_chart import methods_chart
from clfed.reporting.results import validate
from clfed.reporting.run_groups import find_runs

LEAVES = "class names and counts"


def method(name="fedncm", union=0.8, own=0.9, seed=0, accuracy=None, options=None, **more):
    """What the federated job writes for one method."""
    found = results(name, union, seed)
    for key in ("accuracy_matrix", "continual", "learner"):
        del found[key]
    found |= {
        "job": "federated",
        "method": {"name": name, "options": options or {"wait": 600.0}, "leaves": LEAVES} | more,
        "accuracy_by_mission": [[union], [union, union]],
    }
    found["final"] |= {
        "accuracy": {"union": union, "own": own, **(accuracy or {})},
        "forgetting": 0.125,
        "bytes": {"up": 1500 + 1000 * seed, "down": 2500},
        "node_seconds": 3.0 + seed,
        "peak_bytes": 20_000_000,
    }
    validate(found)
    return found


def labels(text):
    return [row["method"] for row in rows_of(text)]


# --- rows and columns -------------------------------------------------------------------------


def test_rows_are_means_and_sample_deviations_over_seeds_best_first(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.74, 0.81)):
        write(tmp_path / f"a{seed}", method("fedncm", accuracy, seed=seed))
    write(tmp_path / "b", method("fedavg", 0.5))
    write(tmp_path / "c", method("fed3r", 0.9))
    text = text_of(tmp_path)
    assert "## Table 1: federated, split" in text
    assert labels(text) == ["fed3r", "fedncm", "fedavg"]
    assert rows_of(text)[1] == {
        "method": "fedncm",
        "accuracy %": f"75.00 ± {statistics.stdev([70, 74, 81]):.2f}",
        "own %": "90.00 ± 0.00",
        "forgetting %": "12.50 ± 0.00",
        "kB up": "2.5",
        "kB down": "2.5",
        "node seconds": "4.0",
        "peak MB": "20",
        "what leaves a node": LEAVES,
        "epsilon": "-",
        "seeds": "0, 1, 2",
    }
    assert "epsilon:" not in text and "last 10" not in text


def test_what_was_not_measured_is_a_dash(tmp_path):
    found = method()
    found["final"] |= {"forgetting": None, "peak_bytes": None}
    write(tmp_path / "a", found)
    (row,) = rows_of(text_of(tmp_path))
    assert row["forgetting %"] == row["peak MB"] == row["epsilon"] == "-"


def test_looks_within_a_mission_have_columns_of_their_own(tmp_path):
    often = {"union_last10": 0.75, "own_last10": 0.5, "own_best": 0.625}
    write(tmp_path / "a", method("fedre", 0.9, accuracy=often))
    write(tmp_path / "b", method("local", 0.6))
    text = text_of(tmp_path)
    first, second = rows_of(text)
    assert [first[key] for key in ("accuracy %, last 10", "own %, last 10", "own %, best")] == [
        *("75.00", "50.00", "62.50")
    ]
    assert second["accuracy %, last 10"] == "-"
    assert "\n- last 10: " in text and "chosen by test images" in text


def test_tiers_curricula_and_settings_make_rows_of_their_own(tmp_path):
    noise = {"epsilon": 8.0, "delta": 1e-5}
    vanilla = OmegaConf.to_container(compose(["job=federated", "curriculum=vanilla"]).curriculum)
    less = noise | {"epsilon": 1.0}
    cases = [
        method("fedncm", 0.90),
        method("fedncm", 0.89, privacy="plain", curriculum=None),
        method("fedncm", 0.88, privacy="minimum_count"),
        method(
            "fedncm",
            0.87,
            privacy="noise",
            privacy_options=noise,
            epsilon=7.5,
            delta=1e-5,
            unit="example",
        ),
        method("fedncm", 0.86, privacy="noise", epsilon=0.9512, delta=1e-5, privacy_options=less),
        method("fedavg", 0.50, options={"local": {"lr": 0.1}}, curriculum=vanilla),
        method("fedavg", 0.40, options={"local": {"lr": 0.1}}),
        method("fedavg", 0.30, options={"local": {"lr": 0.2}}),
    ]
    for number, found in enumerate(cases[:1] + cases[2:]):
        write(tmp_path / f"{number}", found)
    text = text_of(tmp_path)
    assert labels(text) == [
        "fedncm",
        "fedncm + minimum_count",
        "fedncm + noise privacy.epsilon=8.0",
        "fedncm + noise privacy.epsilon=1.0",
        "fedavg + vanilla",
        "fedavg local.lr=0.1",
        "fedavg local.lr=0.2",
    ]
    assert [row["epsilon"] for row in rows_of(text)][:4] == ["-", "-", "7.5", "0.951"]
    assert "\n- epsilon: of the whole run, delta = 1e-05, one example; -: no bound" in text
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "plain", cases[1])
    assert labels(text_of(tmp_path / "other")) == ["fedncm"]


def test_a_bound_that_follows_the_draw_does_not_divide_seeds(tmp_path):
    for seed in range(2):
        found = method(seed=seed, privacy="noise", epsilon=1.0 + seed, delta=1e-5)
        write(tmp_path / f"{seed}", found)
    (row,) = rows_of(text_of(tmp_path))
    assert row["seeds"] == "0, 1" and row["epsilon"] == "1.5"


def test_changed_curricula_have_the_name_of_the_nearest_choice(tmp_path):
    vanilla = OmegaConf.to_container(compose(["job=federated", "curriculum=vanilla"]).curriculum)
    write(tmp_path / "a", method("fedavg", curriculum=vanilla | {"more": 1}))
    assert labels(text_of(tmp_path)) == ["fedavg + vanilla"]


def test_other_answers_of_the_same_seed_are_told(tmp_path):
    write(tmp_path / "a", method(), age=10)
    changed = method()
    changed["accuracy_by_mission"][1][0] = 0.25
    write(tmp_path / "b", changed)
    assert "**Warning:** fedncm, seed 0" in text_of(tmp_path)


def test_another_protocol_is_another_table(tmp_path):
    write(tmp_path / "a", method())
    other = method()
    other["protocol"]["nodes"] = 9
    write(tmp_path / "b", other)
    assert "2 tables" in text_of(tmp_path)


def test_encoders_that_were_trained_otherwise_do_not_mix(tmp_path):
    trained, untrained = method(), method()
    trained["protocol"]["training"] = {"steps": 5, "seconds": 1.0}
    for name in ("protonet", "cross_entropy"):
        config = compose(["job=federated", f"learner={name}"])
        write(tmp_path / "trained" / name, trained, config)
        write(tmp_path / "untrained" / name, untrained, config)
    assert "2 tables" in text_of(tmp_path / "trained")
    assert "1 table," in text_of(tmp_path / "untrained")


BROKEN = {
    "no method": lambda r: r.pop("method"),
    "a method without a name": lambda r: r["method"].pop("name"),
    "options that are no object": lambda r: r["method"].update(options="none"),
    "nothing said about what leaves": lambda r: r["method"].pop("leaves"),
    "an epsilon in words": lambda r: r["method"].update(epsilon="8"),
    "no own accuracy": lambda r: r["final"]["accuracy"].pop("own"),
    "no forgetting": lambda r: r["final"].pop("forgetting"),
    "forgetting in words": lambda r: r["final"].update(forgetting="none"),
    "bytes without a direction": lambda r: r["final"].update(bytes={"up": 1}),
    "bytes that are a number": lambda r: r["final"].update(bytes=7),
    "seconds that are true": lambda r: r["final"].update(node_seconds=True),
    "no memory": lambda r: r["final"].pop("peak_bytes"),
}


# --- embeddings that a federation has trained ---------------------------------------------------

WAYS = {"before": 0.8, "recomputed": 0.9, "carried": 0.85, "moved": 0.75, "stale": 0.5}


def embedding(reached=0.9, seed=0, replaced=True, name="fedavg", **protocol):
    """What the embedding job writes."""
    found = method(name, seed=seed)
    del found["accuracy_by_mission"], found["final"]["forgetting"]
    found["job"] = "embedding"
    found["protocol"] |= protocol
    found["final"]["accuracy"] = {"validation": reached}
    if replaced:
        found["replacement"] = {"accuracy": dict(WAYS)}
    validate(found)
    return found


def test_embeddings_have_a_row_a_method_with_what_became_of_older_prototypes(tmp_path):
    for seed, reached in enumerate((0.90, 0.94)):
        write(tmp_path / f"a{seed}", embedding(reached, seed=seed))
    write(tmp_path / "b", embedding(0.95, name="fedprox", replaced=False))
    text = text_of(tmp_path)
    assert "## Table 1: embedding, split" in text
    first, second = rows_of(text)
    assert second == {
        "method": "fedavg",
        "accuracy %": f"92.00 ± {statistics.stdev([90, 94]):.2f}",
        **{f"{way} %": f"{100 * value:.2f} ± 0.00" for way, value in WAYS.items()},
        "kB up": "2.0",
        "kB down": "2.5",
        "node seconds": "3.5",
        "peak MB": "20",
        "what leaves a node": LEAVES,
        "seeds": "0, 1",
    }
    assert first["method"] == "fedprox" and first["before %"] == first["stale %"] == "-"
    assert "validation classes" in text and "carried: nodes without images" in text


def test_an_embedding_without_validation_classes_has_no_accuracy(tmp_path):
    found = embedding(replaced=False)
    found["final"]["accuracy"] = {}
    write(tmp_path / "a", found)
    (row,) = rows_of(text_of(tmp_path))
    assert row["accuracy %"] == "-" and row["kB up"] == "1.5"


def test_how_the_first_round_was_reached_divides_embeddings(tmp_path):
    for name in ("protonet", "cross_entropy"):
        config = compose(["job=embedding", "strategy=fedavg", f"learner={name}"])
        write(tmp_path / "trained" / name, embedding(learner=name[0]), config)
        write(tmp_path / "untrained" / name, embedding(learner="none"), config)
    assert "2 tables" in text_of(tmp_path / "trained")
    assert "1 table," in text_of(tmp_path / "untrained")


BROKEN_EMBEDDINGS = {
    "no method": lambda r: r.pop("method"),
    "a replacement without accuracies": lambda r: r["replacement"].pop("accuracy"),
    "a replacement in words": lambda r: r.update(replacement="done"),
    "a way in words": lambda r: r["replacement"]["accuracy"].update(stale="bad"),
    "no memory": lambda r: r["final"].pop("peak_bytes"),
}


CASES = [
    *((method, BROKEN, name) for name in BROKEN),
    *((embedding, BROKEN_EMBEDDINGS, name) for name in BROKEN_EMBEDDINGS),
]


@pytest.mark.parametrize(("make", "broken", "name"), CASES)
def test_results_that_do_not_say_enough_are_left_out(make, broken, name, tmp_path):
    write(tmp_path / "good", make())
    found = make(seed=1)
    broken[name](found)
    write(tmp_path / "broken", found)
    runs, refused = find_runs([tmp_path])
    assert [run.seed for run in runs] == [0]
    (sentence,) = refused
    assert "expected the method" in sentence and str(tmp_path / "broken") in sentence


# --- commands ---------------------------------------------------------------------------------


def command(*overrides):
    made = recipe(OmegaConf.to_container(compose(overrides)))
    (line,) = command_lines([(made, [0])])
    return shlex.split(line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["job=federated"],
        ["job=federated", "strategy=fed3r", "strategy.penalty=0.5", "job.every=2"],
        ["job=federated", "strategy=fedprox", "strategy.local.mu=0.1", "curriculum=vanilla"],
        ["job=federated", "strategy=fedncm", "+strategy.more=[1]", "scenario=dirichlet"],
        [
            "job=federated",
            "privacy=noise",
            "privacy.epsilon=8.0",
            "data=digits",
            "scenario.nodes=3",
        ],
    ],
    ids=" ".join,
)
def test_the_command_found_again_composes_to_the_same_configuration(overrides):
    program, *words = command(*overrides)
    assert program == "clfed" and plain(words) == plain(overrides)


def test_methods_and_seeds_become_one_sweep(tmp_path):
    common = ["job=federated", "data=digits", "curriculum=vanilla"]
    for name in ("prototype_averaging", "fedavg", "fed3r"):
        for seed in (0, 1):
            config = compose([*common, f"strategy={name}", f"seed={seed}"])
            # fed3r keeps second moments, which follow from the choice of the method.
            write(tmp_path / f"{name}{seed}", method(name, seed=seed), config)
    options = ["strategy=fedprox", "strategy.local.mu=1.0"]
    write(tmp_path / "prox", method("fedprox", 0.1), compose([*common, *options]))
    (block,) = re.findall(r"```sh\n(.*?)```", text_of(tmp_path), re.DOTALL)
    assert block.splitlines() == [
        "clfed -m job=federated data=digits curriculum=vanilla "
        "strategy=fed3r,fedavg,prototype_averaging seed=0,1",
        "clfed job=federated data=digits curriculum=vanilla strategy=fedprox "
        "strategy.local.mu=1.0 seed=0",
    ]


# --- the figure -------------------------------------------------------------------------------

BARS = [
    {"method": "a", "accuracy": 0.9, "spread": 0.05, "own": 0.7, "bytes": 2e5},
    {"method": "b", "accuracy": 0.4, "spread": None, "own": 0.8, "bytes": 3e9},
    {"method": "c", "accuracy": 0.0, "spread": None, "own": 0.0, "bytes": 0},
]


def drawn(rows, monkeypatch):
    """The figure, in place of its file."""
    kept = []
    monkeypatch.setattr(federated_chart, "save", lambda figure, path: kept.append(figure))
    methods_chart(rows, None)
    return kept[0]


def test_the_figure_shows_accuracy_against_bytes(monkeypatch):
    left, right = drawn(BARS, monkeypatch).axes
    points = [
        (box[0].get_xdata()[0], box[0].get_ydata()[0]) for box in map(tuple, right.containers)
    ]
    assert points == [(2e5, 0.9), (3e9, 0.4), (1.0, 0.0)]
    assert right.get_xscale() == "log"
    low, high = right.get_xlim()
    assert low < 1.0 and high > 3e9
    assert {text.get_text() for text in right.texts} == {"a", "b", "c"}
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["a", "b", "c"]
    strokes = [line for line in left.lines if line.get_markersize() == 15]
    assert [line.get_xdata()[0] for line in strokes] == [0.7, 0.8, 0.0]
    bars = right.containers[0].lines[2][0].get_segments()[0]
    assert bars[:, 1].tolist() == pytest.approx([0.85, 0.95])


@pytest.mark.parametrize(
    ("accuracy", "spread", "own", "ends"),
    [
        (0.14, 0.02, 0.16, (0.2, 0.2)),
        (0.25, 0.03, 0.79, (0.8, 0.3)),
        (0.29, 0.05, 0.3, (0.4, 0.4)),
        (0.99, 0.05, 0.9, (1.0, 1.0)),
        (0.0, None, 0.0, (0.1, 0.1)),
    ],
)
def test_axes_of_accuracies_begin_at_zero_and_end_above_all(
    accuracy, spread, own, ends, monkeypatch
):
    row = {"method": "a", "accuracy": accuracy, "spread": spread, "own": own, "bytes": 10}
    left, right = drawn([row], monkeypatch).axes
    assert (left.get_xlim(), right.get_ylim()) == ((0.0, ends[0]), (0.0, ends[1]))


def test_each_table_has_a_pair_of_panels(monkeypatch):
    rows = [{**row, "group": group} for group in ("Table 1", "Table 2") for row in BARS]
    figure = drawn(rows, monkeypatch)
    assert len(figure.axes) == 4
    assert figure.axes[2].get_title(loc="left") == "Table 2"


def test_the_figure_is_the_same_again_and_grows_with_its_rows(tmp_path):
    from PIL import Image

    for name in ("one", "two"):
        methods_chart(BARS, tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    methods_chart([{**BARS[0], "method": f"m{n}"} for n in range(30)], tmp_path / "many.png")
    with Image.open(tmp_path / "one.png") as few, Image.open(tmp_path / "many.png") as many:
        assert few.size == (1500, 720) and many.size[0] == 1500 and many.size[1] > 1200


def test_each_kind_of_method_has_a_figure(tmp_path):
    write(tmp_path / "a", method())
    place = report(tmp_path, output=tmp_path / "alone")
    assert sorted(path.name for path in place.iterdir()) == ["report.md", "report.png"]
    write(tmp_path / "b", results())
    place = report(tmp_path, output=tmp_path / "both")
    names = sorted(path.name for path in place.iterdir())
    assert names == ["federated.png", "report.md", "report.png"]


def test_a_report_does_not_change_what_it_reads(tmp_path):
    found = method(privacy="noise", epsilon=1.0)
    before = copy.deepcopy(found)
    write(tmp_path / "a", found)
    first = text_of(tmp_path)
    assert text_of(tmp_path) == first and found == before
