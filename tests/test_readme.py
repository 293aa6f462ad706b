"""The README says what is so."""

import pathlib
import re

from lineage_jax import lineage

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_milestones_is_the_lineage():
    assert lineage.markdown_table() in README, "python -m lineage_jax.lineage prints the table"


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    links += re.findall(r'src="(?!https?://)([^"]+)"', README)
    assert links
    assert not [link for link in links if not (ROOT / link.split("#")[0]).exists()]


def test_the_first_screen_shows_the_two_commands():
    first = README[:2500]
    assert "python -m pip install -e . && lineage sweep laptop" in first
    assert "python -m pip install -e '.[test]' && python -m pytest" in first
