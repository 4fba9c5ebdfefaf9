"""The tables of docs/strategies.md, and docs/federated_results.md from folders of runs.

python tests/golden/strategies.py
python tests/golden/strategies.py federated_cifar100=runs/cifar100 federated_mini=runs/mini

Each section of the results is named after an experiment, or anything else.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

from hydra.utils import get_class

from clfed.config import choices, compose
from clfed.reporting.federated_chart import methods_chart
from clfed.reporting.report import tables
from clfed.reporting.run_groups import find_runs
from clfed.reporting.tables import markdown_table
from clfed.reporting.words import in_words
from clfed.strategies.prototype_averaging import PrototypeAveraging

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, RESULTS = DOCS / "strategies.md", DOCS / "federated_results.md"
BEGIN, END = "<!-- table -->\n", "\n<!-- end of table -->"
AROUND_BEGIN, AROUND_END = "<!-- around -->\n", "\n<!-- end of around -->"
PAPER = re.compile(r"(\w+ et al\. (?:[A-Z]\w+ )?\d{4})(?:\)?,? \(?arXiv (\d{4}\.\d{5}))?")

INTRODUCTION = """# Results of the federated methods

Each table is what `clfed job=report` makes of the run folders; the commands above a table make its
rows again. `data.root=PATH` names the folder of the data set.

Within a table everybody starts from the same network, meets the same images of the same classes in
the same missions, and is asked about the same test images, which choose nothing. Seeds draw classes,
images, missions and initial weights; ± is the sample standard deviation over them. Settings are those
of `conf/strategy` unless a row says otherwise: the papers' where one machine can afford them, else what
the YAML says beside them. No setting was chosen by these test images: the penalty of Fed3R and the
shrinkage of FedCOF are those that suit the validation classes of both photograph data sets
(`tests/benchmarks/head_settings.py`), and the learning rate of FedRE's head, the smaller one of the
paper's two, is the one that suits Fashion-MNIST (94.7 ± 0.7 % against 93.1 ± 0.5 % on what is like a
node's own, the first command below). Four designs were changed after a look at such a table, though:
that shrinkage became relative to the variance, noise is drawn around the mean of public images, FedRE's
head learned at 0.01 before, and `fedre_cifar10` began with 150 images a class, then had 500 and 48
rounds, and now takes all images that there are and the paper's 100 rounds. Published numbers belong to
larger networks, more rounds and more images, so these tables order methods under a small budget and say
nothing about who reproduces whose table.

```sh
clfed -m experiment=fedre_cifar10 data=fashion_mnist data.root=PATH strategy.lr=0.01,0.001 strategy.rounds_per_mission=48 scenario.train_images=500 scenario.test_images=100 seed=0,1,2
```

Bytes are those of the messages' records. Node seconds and memory were taken with other work on the same
machine: they tell orders of magnitude. Columns and methods are explained in [strategies.md](strategies.md).
"""


def classes():
    """Name, first sentence and class of every strategy, in alphabetical order."""
    for name, sentence in choices("strategy"):
        settings = compose(["job=federated", f"strategy={name}"]).strategy
        yield name, sentence, get_class(settings["_target_"])


def table():
    """One row a strategy, in Markdown."""
    return markdown_table(
        [
            {
                "strategy": f"`{name}`",
                "what it is": _plain(sentence),
                "paper": _paper(cls),
                "what leaves a node": cls.leaves,
                "who answers": _answers(cls),
            }
            for name, sentence, cls in classes()
        ]
    )


def around():
    """One row a curriculum and a privacy tier, in Markdown."""
    return markdown_table(
        [
            {"setting": f"`{group}={name}`", "what it does": _plain(sentence)}
            for group in ("curriculum", "privacy")
            for name, sentence in choices(group)
        ]
    )


def _plain(sentence):
    """A sentence of a YAML file without the command that may follow it."""
    return re.sub(r":?\s+clfed .*", "", sentence).rstrip(". ") + "."


def _paper(cls):
    """Authors and year as the module names them first."""
    found = PAPER.search(import_module(cls.__module__).__doc__)
    if found is None:
        return "none"
    authors, number = found.groups()
    return f"[{authors}](https://arxiv.org/abs/{number})" if number else authors


def _answers(cls):
    if issubclass(cls, PrototypeAveraging):
        return "class statistics"
    return "each node's own network" if cls.personal else "one network for all"


def section(name, folder, images):
    """The tables and the figure over one folder of runs, in Markdown.

    Args:
        name: Of an experiment, or anything else.
        folder: Searched for finished runs.
        images: Where the figure goes.
    """
    found = tables(find_runs([Path(folder)])[0])
    sentence = dict(choices("experiment")).get(name)
    title = name if sentence is None else f"`experiment={name}`"
    parts = [f"## {title}"] + ([sentence] if sentence else [])
    bars = []
    for number, one in enumerate(found, 1):
        heading = f"Table {number}: {one.title}"
        parts += [f"### {heading}"] if len(found) > 1 else []
        parts += [f"**Warning:** {warning}" for warning in one.warnings]
        commands = [re.sub(r"data\.root=\S+", "data.root=PATH", line) for line in one.commands]
        parts += ["\n".join(in_words(one.protocol)), "\n".join(["```sh", *commands, "```"])]
        parts += [markdown_table(one.rows), "\n".join(f"- {note}" for note in one.notes)]
        bars += [{**bar, "group": heading if len(found) > 1 else ""} for bar in one.bars]
    methods_chart(bars, images / f"federated_{name}.png")
    parts.append(f"![Accuracy against bytes](images/federated_{name}.png)")
    return "\n\n".join(parts)


def results(sections, docs=DOCS):
    """Write the page of results and its figures.

    Args:
        sections: Pairs of names and folders.
        docs: Where the page and the folder ``images`` lie.
    """
    parts = [section(name, folder, docs / "images") for name, folder in sections]
    text = "\n\n".join([INTRODUCTION.strip(), *parts]) + "\n"
    (docs / RESULTS.name).write_text(text, encoding="utf-8")


def between(text, begin, end, new):
    """Put a table between its marks."""
    head, _, rest = text.partition(begin)
    return head + begin + "\n" + new + "\n" + end + rest.partition(end)[2]


def main():
    """Write the tables into the page, and the results if runs are named."""
    text = PAGE.read_text(encoding="utf-8")
    text = between(text, BEGIN, END, table())
    PAGE.write_text(between(text, AROUND_BEGIN, AROUND_END, around()), encoding="utf-8")
    if sys.argv[1:]:
        results([argument.split("=", 1) for argument in sys.argv[1:]])


if __name__ == "__main__":
    main()
