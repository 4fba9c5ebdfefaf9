"""The table of unlearners in the documentation is the one that the code gives."""

from golden.unlearners import BEGIN, END, PAGE, table


def test_the_table_of_unlearners_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(), "run python tests/golden/unlearners.py"
