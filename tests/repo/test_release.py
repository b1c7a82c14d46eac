"""What a release needs: a tag that agrees with version and changelog, workflows and templates that hold together."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import qkernels

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release_notes = load(ROOT / ".github" / "release_notes.py").release_notes
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))

VERSION = '__version__ = "1.2.0"'
CHANGELOG = "# Changelog\n\n## 1.2.0 (2026-01-31)\n\n- New.\n\n## 1.1.0 (2025-01-01)\n\n- Old.\n"


def test_release_notes_are_the_section_of_the_version():
    assert release_notes("v1.2.0", VERSION, CHANGELOG) == "- New.\n"


@pytest.mark.parametrize(
    "tag, version, changelog, message",
    [
        ("v1.3.0", VERSION, CHANGELOG, "the tag is v1.3.0; expected v1.2.0"),
        ("1.2.0", VERSION, CHANGELOG, "expected v1.2.0"),
        ("v1.2.0", VERSION, CHANGELOG.replace("(2026-01-31)", "(unreleased)"), "no section '## 1.2.0"),
        ("v1.2.0", "", CHANGELOG, "no __version__"),
    ],
)
def test_what_is_no_release(tag, version, changelog, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        release_notes(tag, version, changelog)


def test_version_and_changelog_agree():
    """The first section is that of the package's version, dated or not."""
    first = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == qkernels.__version__


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_what_exists(path):
    """Each `make` target and script of a workflow is there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    missing = set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)) - targets
    assert not missing, f"{path.name} runs make {', '.join(missing)}, which the Makefile does not have"
    for script in re.findall(r"(?:python3 |^)(\.(?:github|ci)/\S+)", commands, re.MULTILINE):
        assert (ROOT / script).is_file(), f"{path.name} runs {script}, which is not there"


def test_a_release_has_a_wheel_for_each_python_that_is_tested():
    """Those that cibuildwheel is told to build are those of the compatibility page, from `requires-python` on."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    built = re.findall(r"cp3(\d+)-\*", project)
    oldest = re.search(r'^requires-python = ">=3\.(\d+)"', project, re.MULTILINE)
    tested = re.findall(r"^\| 3\.(\d+) \|", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE)
    assert oldest and built[0] == oldest[1] and built == list(dict.fromkeys(tested))


def test_pre_commit_and_make_lint_are_the_same():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = {hook["entry"].removeprefix("make --silent ") for hook in hooks}
    lint = re.search(r"^lint: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint and entries == set(lint[1].split())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_ask_for_the_installation(path):
    fields = {field["id"]: field for field in yaml.safe_load(path.read_text())["body"]}
    assert "qkernels info" in fields["info"]["attributes"]["label"] and fields["info"]["validations"]["required"]
