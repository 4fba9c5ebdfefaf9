"""The table of docs/unlearners.md, from conf/unlearner and the classes that it names.

python tests/golden/unlearners.py
"""

from pathlib import Path

from hydra.utils import get_class

from clfed.config import choices, compose
from clfed.reporting.tables import markdown_table
from clfed.unlearning.needs import names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "unlearners.md"
BEGIN, END = "<!-- table -->\n", "\n<!-- end of table -->"


def rows():
    """One row an unlearner, in alphabetical order."""
    for name, sentence in choices("unlearner"):
        settings = compose(["job=unlearning", f"unlearner={name}"]).unlearner
        cls = get_class(settings["_target_"])
        yield {
            "unlearner": f"`{name}`",
            "what it is": sentence.partition("  clfed ")[0].rstrip(". ") + ".",
            "touches": ", ".join(names(cls.needs)),
            "schedule": settings.get("schedule") or cls.schedule,
            "answers": "the head" if cls.reads == "head" else "class statistics",
            "exact": cls.scope if cls.exact else "no",
            "starts from": "a model of its own making" if cls.own_original else "any model",
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
