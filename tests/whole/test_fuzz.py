"""The short form of the fuzz test."""
from tests.fuzz import main


def test_some_dozen_cases():
    assert main(["--cases", "80", "--seed", "7"]) == 0
