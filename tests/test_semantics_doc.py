"""docs/semantics.md names a test for each sentence; these tests hold it to that."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "semantics.md"


def sentences():
    """{"2.7": its text, lines joined} of every numbered sentence."""
    found, section, number = {}, None, None
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.match(r"## (\d+)\. ", line):
            section, number = heading[1], None
        elif section and (item := re.match(r"(\d+)\. +(.*)", line)):
            number = f"{section}.{item[1]}"
            found[number] = item[2]
        elif number and line.strip():
            found[number] += " " + line.strip()
    return found


def existing_tests():
    """Names of the functions that pytest collects from tests/."""
    return {
        node.name
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def named_tests(text):
    return re.findall(r"\btest_\w+", text)


def test_every_named_test_exists():
    """A test that is renamed or gone takes its sentence's proof with it."""
    tests = existing_tests()
    assert "test_every_named_test_exists" in tests
    missing = sorted(set(named_tests(DOCUMENT.read_text())) - tests)
    assert not missing, f"docs/semantics.md names tests that do not exist: {missing}"


def test_every_sentence_names_a_test():
    """A sentence without a test is a wish."""
    found = sentences()
    assert len(found) > 70
    bare = [number for number, text in found.items() if not named_tests(text)]
    assert not bare, f"sentences of docs/semantics.md without a test: {bare}"


def test_sentences_are_numbered_in_order():
    """The numbers are what other texts refer to."""
    previous = (0, 0)
    for number in sentences():
        section, sentence = map(int, number.split("."))
        assert (section, sentence) in ((previous[0], previous[1] + 1), (previous[0] + 1, 1))
        previous = section, sentence
