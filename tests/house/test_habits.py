"""Files for contributors and services: they parse, and the things that they name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fastrnn
from tests.support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def parsed(file: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_workflows_have_pinned_steps_and_known_targets(file: Path) -> None:
    workflow = parsed(file)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert "latest" not in str(job["runs-on"]) + str(job.get("container", ""))
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", step["uses"])
            else:
                assert set(re.findall(r"\bmake ([a-z-]+) ", step["run"] + " ")) <= targets


def test_there_are_the_workflows() -> None:
    assert [file.stem for file in WORKFLOWS] == ["all", "docs", "lint", "tests", "wheels"]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda f: f.stem)
def test_issue_templates_have_what_a_form_needs(file: Path) -> None:
    template = parsed(file)
    if file.stem == "config":
        assert set(template) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(template)
    ids = [item["id"] for item in template["body"]]
    assert len(ids) == len(set(ids))
    assert all(item["type"] in ("input", "textarea") for item in template["body"])
    assert all(item["attributes"]["label"] for item in template["body"])


def test_hooks_have_the_versions_of_the_linters() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    hooks = {
        repository["repo"].rpartition("/")[2]: repository["rev"]
        for repository in parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    for hook, package in (("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")):
        (pinned,) = set(re.findall(rf'"{package}==(.*?)"', project))
        assert hooks[hook] == f"v{pinned}"


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == fastrnn.__version__
    assert citation["license"] == "Apache-2.0"


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for block in re.findall(r"^### .*\n\n((?:.+\n)+)", text, re.MULTILINE):
        assert all(line.startswith(("- ", "  ")) for line in block.splitlines())
