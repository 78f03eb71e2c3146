"""The page says what the code has; and what comes with the program is in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shadowmmu.experiments.design import check_points
from shadowmmu.experiments.reference import with_reference
from shadowmmu.experiments.spec import SHIPPED, load_spec, parse_spec

PAGE = Path(__file__).parents[2] / "docs" / "EXPERIMENTS.md"


def test_the_page_lists_the_parameters_that_there_are() -> None:
    page = PAGE.read_text()
    assert with_reference(page) == page, "python -m shadowmmu.experiments.reference docs/EXPERIMENTS.md"
    with pytest.raises(ValueError, match="the page has no"):
        with_reference("another page")


def test_the_example_on_the_page_is_an_experiment() -> None:
    [example] = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    check_points(parse_spec(example, "the example"), "the example")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_in_order_and_ask_something(path: Path) -> None:
    spec = load_spec(path)
    check_points(spec, path.name)
    assert spec.question.strip()
