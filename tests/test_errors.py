"""Every error has a code, a remedy and a section that explains it."""

import re

import pytest
from conftest import ROOT

from clfed import errors
from clfed.errors import ClfedError

DOCS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def all_errors(base=ClfedError):
    return [base, *(error for child in base.__subclasses__() for error in all_errors(child))]


@pytest.fixture(params=all_errors(), ids=lambda error: error.__name__)
def error(request):
    return request.param


def test_code_is_an_exit_code_of_its_own(error):
    assert 2 <= error.code <= 125  # 0 and 1 are taken, a shell uses those from 126 on
    assert [other for other in all_errors() if other.code == error.code] == [error]


def test_code_and_remedy_are_the_class_own(error):
    assert {"code", "remedy"} <= vars(error).keys()
    assert error.remedy.strip() and error.remedy.endswith(".")


def test_has_a_section_of_two_to_four_sentences(error):
    section = re.search(
        rf"^## {error.code} {error.__name__}\n\n(.*?)(?=\n## |\Z)", DOCS, re.M | re.S
    )
    assert section, f"docs/errors.md has no section '## {error.code} {error.__name__}'"
    assert 2 <= len(re.findall(r"\.(?=\s|$)", section[1])) <= 4


def test_table_is_sorted_and_complete():
    rows = [(int(code), name) for code, name in re.findall(r"^\| (\d+) \| (\w+) \|$", DOCS, re.M)]
    assert rows == sorted((error.code, error.__name__) for error in all_errors())


def test_sections_are_sorted_and_none_is_left_over():
    heads = [(int(code), name) for code, name in re.findall(r"^## (\d+) (\w+)$", DOCS, re.M)]
    assert heads == sorted((error.code, error.__name__) for error in all_errors())


def test_all_errors_live_in_one_module():
    assert {error.__module__ for error in all_errors()} == {errors.__name__}


def test_a_remedy_can_be_narrower_than_the_class_one():
    assert ClfedError("x", remedy="Do y.").remedy == "Do y."
    assert ClfedError("x").remedy == ClfedError.remedy
    assert str(ClfedError("x")) == "x"
