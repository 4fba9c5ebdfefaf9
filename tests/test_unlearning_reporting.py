"""Figures and tables of unlearning: what they draw and say, and what a report puts together."""

import copy
import os
import re
import statistics

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from clfed.config import compose
from clfed.errors import RunFolderError
from clfed.evaluation.evidence import MEASURES
from clfed.jobs.report import run as run_report
from clfed.reporting import unlearning, unlearning_chart
from clfed.reporting.commands import Recipe, command_lines, recipe
from clfed.reporting.report import markdown, tables
from clfed.reporting.results import SCHEMA_VERSION, validate
from clfed.reporting.run_folder import RunFolder
from clfed.reporting.run_groups import find_runs
from clfed.reporting.unlearning import (
    accuracy_trace,
    attack_histograms,
    embedding_maps,
    sequence_curves,
)
from clfed.reporting.unlearning_chart import evidence_chart
from clfed.reporting.unlearning_tables import (
    REPORTED,
    cost_line,
    evidence_table,
    sequence_table,
)

KNOWN = {measure.name: measure for measure in MEASURES}
NAMES = ("ua", "ra", "ta", "mia_confidence", "avg_gap", "tow", "js_forget", "cka")


def request(number=0, kind="class", what="Bag"):
    return {"id": f"r{number}", "kind": kind, "what": what, "images": 450}


def results(name="salun", seed=0, gap=0.05, spread=None, what="Bag", requests=1, **unlearner):
    """What the unlearning job writes, with numbers drawn by seed and name."""
    rng = np.random.default_rng([seed, *name.encode()])
    draw = dict(zip(NAMES, rng.uniform(0.2, 0.8, len(NAMES)).round(4).tolist(), strict=True))
    draw["avg_gap"] = gap
    levels = np.linspace(0.95, 0.05, 5).tolist()
    return {
        "job": "unlearning",
        "version": SCHEMA_VERSION,
        "seed": seed,
        "protocol": {"data": "Ten digits.", "forget": {"_target_": "a.classes"}, "seeds": [seed]},
        "unlearner": {
            "name": name,
            "options": {"_target_": f"clfed.{name}", "lr": 0.1},
            "exact": False,
            "scope": "outputs, approximately",
            "needs": ["forget images", "forget labels"],
            "reads": "head",
            "own_original": False,
            **unlearner,
        },
        "requests": [request(number, what=what) for number in range(requests)],
        "steps": [
            {
                "step": 1,
                "classes": 9,
                "accuracy": {"test": draw["ta"]},
                "bytes": {"up": 0, "down": 0},
                "seconds": 2.0,
            }
        ],
        "final": {
            "accuracy": {name: draw["ta"]},
            "memory_sha256": "0" * 64,
            "memory_bytes": 1,
            "seconds": 2.0,
        },
        "unlearning": {
            "kind": "class",
            "measures": {
                key: {"mean": value, "original_spread": spread, "unlearning_spread": None}
                for key, value in draw.items()
            },
            "original": {
                "ua": {"mean": 0.01, "spread": None},
                "ra": {"mean": 0.97, "spread": None},
                "avg_gap": {"mean": 0.4, "spread": None},
            },
            "oracle": {
                "ua": {"mean": 0.98, "spread": 0.01},
                "ra": {"mean": 0.96, "spread": 0.004},
                "ta": {"mean": 0.9, "spread": 0.002},
                "avg_gap": {"mean": 0.006, "spread": 0.001},
            },
            "ideals": {key: KNOWN[key].ideal for key in NAMES},
            "cost": {
                "seconds": 2.0 + seed,
                "spread": None,
                "oracle_seconds": 40.0,
                "ratio": (2.0 + seed) / 40,
                "steps": 30.0,
            },
            "runs": [
                {
                    "original_seed": seed,
                    "unlearning_seed": 7,
                    "seconds": 2.0,
                    "steps": 30,
                    "touched": {"forget images": 450},
                    "evidence": draw,
                }
            ],
            "trace": [
                {"step": 10 * step, "forget": level, "retain": 0.9, "test": 0.8}
                for step, level in enumerate(levels)
            ],
            "sequence": [
                {
                    "id": f"r{number}",
                    "kind": "class",
                    "forget": 0.01 * number,
                    "retain": 0.9 - 0.05 * number,
                    "test": 0.8,
                    "earlier": 0.02 * number if number else None,
                    "hmean": 0.85,
                    "seconds": 1.5,
                }
                for number in range(requests)
            ],
        },
    }


def write(folder, found, config=None, age=0):
    target = RunFolder(folder)
    target.write_results(found)
    if config is not None:
        target.write_config(OmegaConf.to_yaml(config))
    moment = target.results.stat().st_mtime - age
    os.utime(target.results, (moment, moment))
    return target.path


def text_of(folder):
    """The report as the job writes it, without its figure, which takes a second."""
    runs, refused = find_runs([folder])
    return markdown(tables(runs), refused)


def report(folder):
    cfg = compose(["job=report"])
    cfg.job.runs = [str(folder)]
    return run_report(cfg)


def rows_of(text, number=1):
    """The rows of a Markdown table, as dictionaries."""
    table = text.split(f"## Table {number}")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def shown(table):
    """A rich table as plain text, wide enough for everything."""
    from rich.console import Console

    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def size_of(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, before they became pixels."""
    figures = []
    for module in (unlearning, unlearning_chart):

        def keep(figure, path, save=module.save):
            figures.append(figure)
            save(figure, path)

        monkeypatch.setattr(module, "save", keep)
    return figures


def scores(seed=0, count=200):
    rng = np.random.default_rng(seed)
    return {group: rng.beta(5, 1, count) for group in ("retain", "test", "forget")}


def points(seed=0, count=90, size=8):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    before = rng.normal(size=(count, size)) + 4 * np.eye(3, size)[labels]
    after = before.copy()
    after[labels == 1] -= 4
    return before, after, labels, labels == 1, ["cat", "dog", "ox"]


def chart_rows(count=4):
    methods = [
        {"method": f"m{i}", "avg_gap": 0.02 * (i + 1), "spread": 0.01, "ratio": 0.01 * (i + 1)}
        for i in range(count)
    ]
    oracle = {"method": "oracle", "avg_gap": 0.01, "spread": None, "ratio": 1.0}
    original = {"method": "original", "avg_gap": 0.5, "spread": None, "ratio": None}
    return [oracle | {"reference": True}, *methods, original | {"reference": True}]


# --- the numbers that the tests use -----------------------------------------------------------


def test_the_numbers_keep_the_schema():
    validate(results(requests=3))


# --- figures ----------------------------------------------------------------------------------


def test_trace_draws_each_point_and_the_level_of_the_oracle(drawn, tmp_path):
    found = results()
    accuracy_trace(found, tmp_path / "t.png")
    assert size_of(tmp_path / "t.png") == (1200, 720)
    axes = drawn[0].axes[0]
    curves = {line.get_label().split("\n")[0]: line for line in axes.lines if line.get_marker()}
    trace = found["unlearning"]["trace"]
    for name, title in (("forget", "to forget"), ("retain", "to keep"), ("test", "test")):
        expected = [(point["step"], point[name]) for point in trace]
        assert np.array_equal(curves[title].get_xydata(), np.array(expected, dtype=float))
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert levels == pytest.approx([1 - 0.98, 0.96, 0.9])
    assert {"before", "after"} == {text.get_text() for text in axes.texts}
    (legend,) = drawn[0].legends
    assert "5%, oracle 2%" in legend.get_texts()[0].get_text()


@pytest.mark.parametrize("steps", [(0, 0), (0, 1)])
def test_a_closed_form_goes_straight_from_before_to_after(steps, drawn, tmp_path):
    found = results()
    ends = found["unlearning"]["trace"][:: len(found["unlearning"]["trace"]) - 1]
    found["unlearning"]["trace"] = [
        {**point, "step": step} for point, step in zip(ends, steps, strict=True)
    ]
    accuracy_trace(found, tmp_path / "t.png")
    axes = drawn[0].axes[0]
    places = [text.xy[0] for text in axes.texts]
    assert places[0] < places[1] and [text.get_text() for text in axes.texts] == ["before", "after"]


def test_levels_of_an_oracle_that_were_not_measured_are_not_drawn(drawn, tmp_path):
    found = results()
    found["unlearning"]["oracle"] = {}
    accuracy_trace(found, tmp_path / "t.png")
    assert not [line for line in drawn[0].axes[0].lines if line.get_linestyle() == "--"]


def test_histograms_share_their_scale_and_each_holds_all_images(drawn, tmp_path):
    before, after, oracle = scores(0), scores(1), scores(2)
    after["forget"] = np.array([0.0, 1.0])  # both ends lie inside
    attack_histograms(before, after, oracle, tmp_path / "h.png")
    assert size_of(tmp_path / "h.png") == (1200, 720)
    panels = drawn[0].axes
    assert len(panels) == 3 and len({axes.get_ylim() for axes in panels}) == 1
    top = panels[0].get_ylim()[1]
    for axes in panels:
        assert len(axes.patches) == 3
        for patch in axes.patches:
            values = patch.get_data().values
            assert values.sum() == pytest.approx(1) and values.max() < top
    ends = panels[1].patches[2].get_data().values
    assert ends[0] == ends[-1] == 0.5
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["trained on", "test", "to forget"]


def test_a_group_without_images_is_drawn_as_nothing(drawn, tmp_path):
    empty = {**scores(), "forget": np.array([])}
    attack_histograms(empty, scores(), scores(), tmp_path / "h.png")
    assert drawn[0].axes[0].patches[2].get_data().values.sum() == 0


def test_maps_show_both_on_one_plane(drawn, tmp_path):
    before, after, labels, gone, classes = points()
    embedding_maps(before, after, labels, gone, classes, tmp_path / "e.png")
    assert size_of(tmp_path / "e.png") == (1200, 720)
    clouds = [
        np.concatenate([part.get_offsets() for part in axes.collections if len(part.get_offsets())])
        for axes in drawn[0].axes
    ]
    assert clouds[0].shape == clouds[1].shape == (90, 2)
    # What did not move stays where it was: its coordinates occur on both maps.
    both = {tuple(xy) for xy in clouds[0].round(6)} & {tuple(xy) for xy in clouds[1].round(6)}
    assert len(both) == int((~gone).sum())
    assert drawn[0].axes[0].get_xlim() == drawn[0].axes[1].get_xlim()
    assert {"cat", "dog", "ox"} == {text.get_text() for text in drawn[0].axes[0].texts}


def test_maps_take_tensors_and_a_forget_set_across_classes(drawn, tmp_path):
    torch = pytest.importorskip("torch")
    before, after, labels, _, classes = points()
    gone = torch.arange(90) < 10
    tensors = (torch.tensor(before), torch.tensor(after), torch.tensor(labels), gone)
    embedding_maps(*tensors, classes, tmp_path / "e.png")
    marked = [
        len(part.get_offsets())
        for part in drawn[0].axes[0].collections
        if part.get_linewidths()[0] > 0 and len(part.get_offsets())
    ]
    assert sum(marked) == 10


def test_chart_has_a_bar_for_each_row_and_a_point_for_each_time(drawn, tmp_path):
    rows = chart_rows()
    evidence_chart(rows, tmp_path / "c.png")
    assert size_of(tmp_path / "c.png") == (1200, 720)
    bars, costs = drawn[0].axes
    assert [bar.get_width() for bar in bars.patches] == [row["avg_gap"] for row in rows]
    assert [t.get_text() for t in bars.get_yticklabels()] == [row["method"] for row in rows]
    assert costs.get_xscale() == "log"
    places = [tuple(part.get_offsets()[0]) for part in costs.collections]
    assert places == [(row["ratio"], row["avg_gap"]) for row in rows if row["ratio"]]
    assert {"m0", "oracle", "a tenth"} <= {text.get_text() for text in costs.texts}


def test_chart_has_a_pair_of_panels_for_each_table_and_grows_with_its_rows(drawn, tmp_path):
    rows = [{**row, "group": f"Table {n}"} for n in (1, 2) for row in chart_rows()]
    evidence_chart(rows, tmp_path / "c.png")
    assert len(drawn[0].axes) == 4 and size_of(tmp_path / "c.png") == (1200, 1440)
    evidence_chart(chart_rows(16), tmp_path / "c.png")
    assert size_of(tmp_path / "c.png")[1] > 900
    evidence_chart([{"method": "m", "avg_gap": 0.0, "ratio": 0.1}], tmp_path / "c.png")
    assert size_of(tmp_path / "c.png") == (1200, 720)


def test_sequence_draws_what_each_request_left(drawn, tmp_path):
    found = results(requests=4)
    sequence_curves(found, tmp_path / "s.png")
    assert size_of(tmp_path / "s.png") == (1200, 720)
    axes = drawn[0].axes[0]
    curves = {line.get_label().split("\n")[0]: line.get_ydata() for line in axes.lines}
    sequence = found["unlearning"]["sequence"]
    assert list(curves["forgotten just now"]) == [part["forget"] for part in sequence]
    earlier = curves["forgotten before"]
    assert np.isnan(earlier[0]) and list(earlier[1:]) == [part["earlier"] for part in sequence[1:]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["r0", "r1", "r2", "r3"]


def test_a_single_request_has_no_earlier_ones(drawn, tmp_path):
    sequence_curves(results(), tmp_path / "s.png")
    assert len(drawn[0].axes[0].lines) == 3


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: accuracy_trace(results(), path),
        lambda path: attack_histograms(scores(), scores(1), scores(2), path),
        lambda path: embedding_maps(*points(), path),
        lambda path: evidence_chart(chart_rows(), path),
        lambda path: sequence_curves(results(requests=3), path),
    ],
    ids=["trace", "histograms", "maps", "chart", "sequence"],
)
def test_the_same_numbers_give_the_same_bytes_and_what_cannot_be_written_is_told(draw, tmp_path):
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes() and len(first) > 5000
    with pytest.raises(RunFolderError, match="Expected to write"):
        draw(tmp_path / "absent" / "a.png")


# --- the table of one run ---------------------------------------------------------------------


def test_the_table_shows_both_spreads_and_the_oracle(tmp_path):
    found = results(spread=0.012)
    found["unlearning"]["measures"]["ua"] = {
        "mean": 0.975,
        "original_spread": 0.012,
        "unlearning_spread": 0.003,
    }
    found["unlearning"]["measures"]["own"] = {
        "mean": 1.25,
        "original_spread": None,
        "unlearning_spread": None,
    }
    text = shown(evidence_table(found))
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    head = ["ideal", "before", "after", "± originals", "± unlearning", "oracle"]
    assert head in lines
    assert ["UA", "oracle", "1.0%", "97.5%", "1.2%", "0.3%", "98.0% ± 1.0%"] in lines
    own = next(line for line in lines if line[0] == "own")
    assert own == ["own", "-", "-", "1.250", "-", "-", "-"]
    titles = [line[0] for line in lines]
    order = [titles.index(KNOWN[name].title) for name in NAMES]
    assert sorted(order) == [
        titles.index(measure.title) for measure in MEASURES if measure.name in NAMES
    ]
    words = " ".join(text.split())
    assert "forgotten: Bag (450 images) no guarantee: outputs, approximately;" in words
    assert "looks at forget images, forget labels 2.00 s, 5.0% of the 40.0 s" in words
    assert "± originals: standard deviation" in words


def test_a_table_without_repetitions_has_no_columns_of_spreads():
    text = shown(evidence_table(results(exact=True, scope="the memory", needs=[])))
    assert "exact: the memory; answers from its head; looks at no data" in " ".join(text.split())
    assert "±" not in text.split("forgotten:")[0].replace("% ± ", "") and "± o" not in text


@pytest.mark.parametrize(
    "ratio, told", [(0.02, ""), (0.1, ""), (0.25, ": 2.5 times the tenth")], ids=str
)
def test_who_misses_a_tenth_of_the_time_is_told_by_how_much(ratio, told):
    cost = {"seconds": 40 * ratio, "spread": None, "oracle_seconds": 40.0, "ratio": ratio}
    line = cost_line(cost)
    assert line.startswith(f"{40 * ratio:.2f} s, {ratio:.1%} of the 40.0 s")
    assert line.endswith(f"takes{told}")


def test_a_sequence_has_a_table_of_its_own():
    assert sequence_table(results()) is None
    text = shown(sequence_table(results(requests=3)))
    lines = [line.split() for line in text.splitlines()]
    assert ["r0", "class", "0.0%", "-", "90.0%", "80.0%", "85.0%", "1.50"] in lines
    assert ["r2", "class", "2.0%", "4.0%", "80.0%", "80.0%", "85.0%", "1.50"] in lines


# --- the report -------------------------------------------------------------------------------


def test_methods_stand_between_oracle_and_the_worst_nearest_first(tmp_path):
    for name, gap in (("salun", 0.05), ("finetune", 0.2), ("ascent", 0.6)):
        write(tmp_path / name, results(name, gap=gap))
    text = text_of(tmp_path)
    rows = rows_of(text)
    names = [row["unlearner"] for row in rows]
    # Worse than forgetting nothing stands below the original.
    assert names == ["oracle", "salun", "finetune", "original", "ascent"]
    assert [row["gap %"] for row in rows] == ["0.60 ± 0.10", "5.00", "20.00", "40.00", "60.00"]
    assert rows[0]["UA %"] == "98.00 ± 1.00" and rows[0]["x oracle"] == "1.000"
    assert rows[1]["seconds"] == "2.00" and rows[1]["x oracle"] == "0.050"
    assert rows[3]["seconds"] == rows[3]["x oracle"] == rows[3]["ToW"] == "-"
    expected = [m.title for m in MEASURES if m.name in {*REPORTED, "mia_confidence"} & {*NAMES}]
    assert [column.removesuffix(" %") for column in rows[0]][1:-4] == expected
    assert "CKA(f)" not in rows[0] and "**" not in text
    assert "## Table 1: unlearning, class: Bag\n" in text
    for column in ("UA %", "ToW", "x oracle"):
        assert f"\n- {column}: " in text
    assert (report(tmp_path) / "report.md").read_text(encoding="utf-8") == text
    assert size_of(tmp_path / "report.png") == (1200, 720)
    assert not (tmp_path / "unlearning.png").exists()


def test_rows_are_means_and_deviations_over_seeds_of_originals(tmp_path):
    found = [results("salun", seed, gap) for seed, gap in enumerate((0.05, 0.07, 0.12))]
    for seed, one in enumerate(found):
        write(tmp_path / str(seed), one)
    row = rows_of(text_of(tmp_path))[1]
    assert row["gap %"] == f"8.00 ± {statistics.stdev([5, 7, 12]):.2f}"
    values = [one["unlearning"]["measures"]["tow"]["mean"] for one in found]
    assert row["ToW"] == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert row["seconds"] == "3.00 ± 1.00" and row["x oracle"] == "0.075"
    assert row["seeds"] == "0, 1, 2" and row["originals"] == "3"


def test_a_run_over_several_originals_brings_its_own_spread(tmp_path):
    found = results(spread=0.03)
    found["unlearning"]["runs"] = [
        {**found["unlearning"]["runs"][0], "original_seed": seed} for seed in (5, 6, 5)
    ]
    write(tmp_path / "a", found)
    row = rows_of(text_of(tmp_path))[1]
    assert row["gap %"] == "5.00 ± 3.00" and row["originals"] == "2" and row["seeds"] == "0"
    # Of two such runs the spreads within count, not the distance between the two means.
    write(tmp_path / "b", results(seed=1, gap=0.25, spread=0.04))
    assert rows_of(text_of(tmp_path))[1]["gap %"] == f"15.00 ± {(12.5**0.5):.2f}"


def test_what_is_exact_or_starts_elsewhere_is_marked_and_not_the_original(tmp_path):
    special = results("sisa", gap=0.01, exact=True, scope="the shards", own_original=True)
    special["unlearning"]["original"]["ra"]["mean"] = 0.5
    write(tmp_path / "a", special)
    text = text_of(tmp_path)
    assert [row["RA %"] for row in rows_of(text) if row["unlearner"] == "original"] == ["50.00"]
    write(tmp_path / "b", results("salun"))
    text = text_of(tmp_path)
    names = [row["unlearner"] for row in rows_of(text)]
    assert names == ["oracle", "sisa (exact, own original)", "salun", "original"]
    assert rows_of(text)[3]["RA %"] == "97.00"
    for note in ("exact: ", "own original: ", "scope of sisa: the shards"):
        assert f"\n- {note}" in text
    assert "scope of salun" not in text


def test_another_protocol_is_another_table_and_drawn_classes_are_one(tmp_path):
    write(tmp_path / "a", results(seed=0, what="Bag"))
    write(tmp_path / "b", results(seed=1, what="Shirt"))
    text = text_of(tmp_path)
    assert "## Table 1: unlearning, class drawn by the seed\n" in text and "1 table," in text
    other = results()
    other["protocol"]["forget"] = {"_target_": "a.samples"}
    other["requests"] = [request(kind="sample", what="60 samples")]
    write(tmp_path / "c", other)
    long = results(what="a class of a rather long name")
    long["requests"] *= 5
    long["protocol"]["forget"] = {"_target_": "a.file"}
    write(tmp_path / "d", long)
    text = text_of(tmp_path)
    assert "## Table 2: unlearning, sample: 60 samples\n" in text
    (title,) = re.findall("## Table 3: (.*)", text)
    assert title.startswith("unlearning, class: a class of a") and len(title) < 80


def test_settings_make_rows_of_their_own(tmp_path):
    for lr in (0.1, 0.2):
        options = {"_target_": "clfed.salun", "lr": lr}
        write(tmp_path / str(lr), results(gap=lr, options=options))
    names = [row["unlearner"] for row in rows_of(text_of(tmp_path))]
    assert names == ["oracle", "salun lr=0.1", "salun lr=0.2", "original"]


def test_unequal_repetitions_are_told(tmp_path):
    write(tmp_path / "a", results(gap=0.05), age=10)
    write(tmp_path / "b", results(gap=0.06))
    text = text_of(tmp_path)
    assert rows_of(text)[1]["gap %"] == "6.00"
    assert "**Warning:** salun, seed 0" in text


def test_learners_and_unlearners_have_figures_of_their_own(tmp_path):
    write(tmp_path / "a", results())
    stream = {key: value for key, value in results("ncm").items() if key != "unlearning"}
    stream |= {"job": "continual", "learner": {"name": "ncm"}, "continual": {}}
    write(tmp_path / "b", stream)
    report(tmp_path)
    for name in ("report.png", "unlearning.png"):
        assert size_of(tmp_path / name) == (1200, 720)


def broken(change):
    found = copy.deepcopy(results())
    change(found)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("unlearning"),
        lambda found: found.pop("unlearner"),
        lambda found: found["unlearner"].pop("name"),
        lambda found: found.update(requests=[{"kind": "class"}]),
        lambda found: found["unlearning"].update(measures=[1]),
        lambda found: found["unlearning"]["measures"]["ua"].update(mean="0.5"),
        lambda found: found["unlearning"]["oracle"]["ua"].update(spread=True),
        lambda found: found["unlearning"]["cost"].pop("ratio"),
        lambda found: found["unlearning"].update(ideals={"ua": 1}),
        lambda found: found["unlearning"].update(runs=[{}]),
    ],
)
def test_results_that_break_their_promise_are_left_out(change, tmp_path):
    write(tmp_path / "good", results("good"))
    write(tmp_path / "bad", broken(change))
    text = text_of(tmp_path)
    assert "## Left out: 1 folder\n" in text and "expected the unlearner" in text
    assert len(rows_of(text)) == 3


# --- commands ---------------------------------------------------------------------------------


def test_unlearners_and_seeds_become_one_sweep():
    shared = ("job=unlearning", "forget=random")
    made = [
        (Recipe(shared, "salun", (), "unlearner"), [0, 1]),
        (Recipe(shared, "finetune", (), "unlearner"), [0, 1]),
        (Recipe(shared, "salun", ("unlearner.lr=0.5",), "unlearner"), [0]),
    ]
    assert command_lines(made) == [
        "clfed -m job=unlearning forget=random unlearner=salun,finetune seed=0,1",
        "clfed job=unlearning forget=random unlearner=salun unlearner.lr=0.5 seed=0",
    ]


@pytest.mark.parametrize("job", ["continual", "unlearning"])
def test_the_command_of_an_unlearner_is_found_again(job):
    words = [f"job={job}", "learner=naive", "forget=random", "unlearner=finetune"]
    config = compose([*words, "forget.share=0.25", "unlearner.lr=0.5"])
    (line,) = command_lines([(recipe(OmegaConf.to_container(config)), [3])])
    assert line == (
        f"clfed job={job} learner=naive forget=random forget.share=0.25 "
        "unlearner=finetune unlearner.lr=0.5 seed=3"
    )


def test_the_commands_stand_above_the_table(tmp_path):
    for name in ("finetune", "salun"):
        config = compose(["job=unlearning", f"unlearner={name}", "forget=random", "seed=4"])
        write(tmp_path / name, results(name, seed=4), config)
    (block,) = re.findall(r"```sh\n(.*?)```", text_of(tmp_path), re.DOTALL)
    assert block == "clfed -m job=unlearning forget=random unlearner=finetune,salun seed=4\n"
