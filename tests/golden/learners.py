"""The table of docs/learners.md, from conf/learner and the classes that it names.

python tests/golden/learners.py
"""

from pathlib import Path

from hydra.utils import get_class

from clfed.backbones import MLP
from clfed.backbones.encoder import Transform
from clfed.config import choices, compose
from clfed.learners.training import BaseTraining, initialisation
from clfed.reporting.tables import markdown_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learners.md"
BEGIN, END = "<!-- table -->\n", "\n<!-- end of table -->"


def rows():
    """One row a learner, in alphabetical order."""
    for name, sentence in choices("learner"):
        settings = dict(BaseTraining.from_config(compose([f"learner={name}"])).learner)
        if (target := settings.pop("_target_", None)) is None:
            continue
        cls = get_class(target)
        with initialisation(0, "table"):
            learner = cls(MLP(4, 0, (4,)), Transform((), ()), dim=4, seed=0, **settings)
        buffer = learner.buffer
        size = "none" if buffer is None else "all" if buffer.capacity is None else buffer.capacity
        yield {
            "learner": f"`{name}`",
            "what it is": sentence.partition("  clfed ")[0].rstrip(". ") + ".",
            "network learns in": {"all": "all", "first": "the first", "none": "none"}[
                learner.train_on
            ],
            "answers": "its own head"
            if learner.classifier is None
            else f"`{learner.classifier['name']}`",
            "images kept": size,
            "merges": learner.merges,
            "told of boundaries": "must be" if learner.needs_boundaries else "need not be",
        }


def table():
    """The whole table in Markdown."""
    return markdown_table(list(rows()))


def main():
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
