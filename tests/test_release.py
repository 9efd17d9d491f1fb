"""Version, changelog and citation tell of the same release, and CI runs the Pythons that are promised."""

import re
import tomllib
from pathlib import Path

import pytest

import dualgp

ROOT = Path(__file__).parents[1]


def the_only(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text, re.M)
    assert len(found) <= 1, f"{len(found)} lines match {pattern}"
    return found[0] if found else None


def releases(changelog: str) -> list[tuple[str, str]]:
    return re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)


def test_changelog_and_citation_name_the_version_and_its_date():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert the_only(r"^version: (.+)$", citation) == dualgp.__version__
    released = releases(changelog)
    assert the_only(r"^date-released: (.+)$", citation) == (released[0][1] if released else None)
    assert not released or released[0][0] == dualgp.__version__
    assert len(re.findall(r"^## ", changelog, re.M)) == len(released) + 1  # and one for what is not released,
    assert re.search(r"^## (.+)$", changelog, re.M)[1] == "[Unreleased]"  # which is the first
    assert sorted(released, key=lambda release: release[1], reverse=True) == released


def test_ci_runs_every_python_that_is_promised():
    workflows = ROOT / ".github" / "workflows"
    if not workflows.is_dir():
        pytest.skip("the source archive has no workflows")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    run = set(re.findall(r'"(3\.\d+)"', (workflows / "ci.yml").read_text(encoding="utf-8")))
    assert promised <= run
    assert project["requires-python"] == f">={min(promised, key=lambda v: int(v[2:]))}"
