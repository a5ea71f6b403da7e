"""The site: every public name is in its reference, every page in its tree, every promise has its tests; it builds."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray import answers, crypto, errors, testing
from pyworkflow_ray.engine import events
from pyworkflow_ray.storage.tables import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = "".join(text for page, text in PAGES.items() if page.startswith("reference/"))
DOCUMENTED = re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)$", REFERENCE, re.M)


def test_every_public_name_is_in_the_reference_once() -> None:
    public = {f"pyworkflow_ray.{name}" for name in pw.__all__}
    public |= {f"pyworkflow_ray.testing.{name}" for name in testing.__all__}
    known = {getattr(pw, name) for name in pw.__all__}
    public |= {
        f"pyworkflow_ray.errors.{name}"
        for name, one in vars(errors).items()
        if inspect.isclass(one) and issubclass(one, Exception) and one not in known
    }
    assert sorted(DOCUMENTED) == sorted(public)


def test_submodules_for_users_are_in_the_reference_and_say_what_is_public() -> None:
    for module in (answers, crypto):
        assert f".. automodule:: {module.__name__}\n" in REFERENCE
        assert module.__doc__


def test_every_event_type_is_in_the_reference() -> None:
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        from from_code import SORTS, event_classes
    finally:
        del sys.path[0]
    kept = {one for one in vars(events).values() if inspect.isclass(one) and issubclass(one, events.Event)}
    assert kept - set(event_classes()) == {events.Event, events.UnknownEvent}
    assert {name for name, sort in SORTS.items() if sort == "input"} >= {"StepCompleted", "BodyAbandoned"}
    assert {one.__name__ for one in event_classes()} >= SORTS.keys()


@pytest.mark.parametrize("view", SCHEMAS)
def test_every_column_of_the_views_is_documented_with_its_type(view: str) -> None:
    names = {
        "string": "VARCHAR",
        "int32": "INTEGER",
        "double": "DOUBLE",
        "bool": "BOOLEAN",
        "extension<arrow.json>": "JSON",
    }
    [table] = re.findall(rf"^\| `{view}` \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES["sql.md"], re.M)
    documented = {}
    for row in table.splitlines():
        _, columns, types, _ = row.split("|", 3)
        split = [one.strip() for one in types.split(",")]
        for number, column in enumerate(re.findall(r"`(\w+)`", columns)):
            documented[column] = split[min(number, len(split) - 1)].split()[0].replace("TIMESTAMPTZ", "TIMESTAMP")
    assert documented == {field.name: names.get(str(field.type), "TIMESTAMP") for field in SCHEMAS[view]}


def test_every_page_is_in_the_tree() -> None:
    listed = {"index.md", "decisions/README.md"}
    for page, text in PAGES.items():
        folder = Path(page).parent
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.M | re.S):
            for entry in (line for line in tree.splitlines() if line and not line.startswith(":")):
                listed |= {found.relative_to(DOCS).as_posix() for found in (DOCS / folder).glob(f"{entry}.md")}
    missing = sorted(PAGES.keys() - listed)
    assert not missing, f"{missing} are in no toctree: add them to docs/howto.md, docs/reference or docs/explanation.md"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them; the site has the same."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings_on_github_too() -> None:
    wrong = []
    pages = {**{DOCS / page: text for page, text in PAGES.items()}, ROOT / "README.md": README}
    for path, text in pages.items():
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for link in re.findall(r'\]\(([^)\s]+)(?: "\w+")?\)', text):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                wrong.append(f"{path.relative_to(ROOT)}: {link}")
    assert not wrong, wrong


def test_every_promise_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (?!promise|-|[^|]* \|$)([^|]+) \| ([^|]+) \|$", PAGES["guarantees.md"], re.M)
    assert len(rows) > 20
    for promise, proof in rows:
        links = re.findall(r'\]\(\.\./(tests/[\w/.]+)(?: "(\w+)")?\)', proof)
        assert links, promise
        for path, name in links:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {name or 'test'}" in text, f"{promise}: no {name} in {path}"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_without_a_network(tmp_path: Path) -> None:
    offline = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "sphinx", "--builder=html", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, "--doctree-dir", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")],
        env=offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    for name in pw.__all__:
        if not name[0].isupper():
            assert f'id="pyworkflow_ray.{name}"' in reference, name
    assert "<blockquote>" not in reference, "an example of a docstring is a block of code"
    assert "~P" not in reference, "signatures are readable"
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css))', page.read_text(encoding="utf-8"))
        assert not loaded, f"{page.name} loads {loaded}"
