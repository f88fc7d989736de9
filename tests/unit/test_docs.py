"""What the documents point at is there, and nothing in them waits to be written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "deploy").glob("*.md")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page):
    assert re.findall(r"^[A-Z][A-Z_0-9]+$|TODO|FIXME", page.read_text(), re.MULTILINE) == []


def test_every_metric_that_is_explained_exists():
    known = (ROOT / "deploy/METRICS.md").read_text()
    named = set(re.findall(r"tta_[a-z_]+", (ROOT / "deploy/OPERATING.md").read_text()))
    assert [name for name in sorted(named) if f"`{name}`" not in known] == []
