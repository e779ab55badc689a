"""Output by a template is what docker's users expect of it, as far as it goes; beyond, it is refused."""

import click
import pytest

from corral.cli import template

DOCUMENT = {
    "id": "sha256:ab",
    "size_bytes": 7,
    "config": {"working_dir": "/w", "env": ["A=1"]},
    "names": [],
    "on": True,
}
ROW = template.row_of(("REPOSITORY", "TAG", "IMAGE ID", "CREATED BY"), ("box", "1", "ab", "make"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{{.Repository}}:{{.Tag}}", "box:1"),
        ("{{ .ID }}", "ab"),
        ("{{.ImageID}} {{.CreatedBy}}", "ab make"),
        ("{{.SizeBytes}} {{.size_bytes}}", "7 7"),
        ("{{.Config.WorkingDir}}", "/w"),
        ("{{json .Config.Env}}", '["A=1"]'),
        ("{{.Config.Env}}", '["A=1"]'),
        ("{{.On}}", "true"),
        ("{{json .Names}}", "[]"),
        ("{{.Nothing}}{{.Tag.Deeper}}", "<no value><no value>"),
        (r"{{.Tag}}\t{{.Tag}}\n", "1\t1\n"),
        ("{{json .Tag}}", '"1"'),
        ("plain {{.Tag}}", "plain 1"),
        ('{{index .Config "working_dir"}}{{index .Config "none"}}', "/w"),
        ("{{index .Config.Env 0}} {{ index .id 0 }}", "A=1 <no value>"),
    ],
)
def test_names_are_filled_in(text: str, shown: str) -> None:
    assert template.render(text, DOCUMENT, ROW) == shown


def test_the_whole_thing_is_its_json() -> None:
    assert template.render("{{json .}}", {"a": "é"}) == '{"a": "é"}'


@pytest.mark.parametrize(
    "text",
    ["{{range .A}}x{{end}}", "{{.A", "{{}}", "{{.A | upper}}", "{{if .A}}", "}}", "{{..}}", "{{index .A}}"],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        template.render(text, DOCUMENT, ROW)


def test_a_number_past_the_end_is_told() -> None:
    with pytest.raises(ValueError, match="number 1 of 1"):
        template.render("{{index .Config.Env 1}}", DOCUMENT)


def test_a_table_has_headings() -> None:
    text = r"table {{.ID}}\t{{.CreatedBy}} x"
    assert template.is_table(text)
    assert template.headings(text) == ["ID", "CREATED BY x"]
    assert [template.render(cell, DOCUMENT, ROW) for cell in template.columns(text)] == ["ab", "make x"]


def test_a_word_that_would_be_printed_as_it_stands_is_refused() -> None:
    form = template.OutputForm()
    assert [form.convert(word, None, None) for word in ("table", "json", "{{.ID}}")] == ["table", "json", "{{.ID}}"]
    with pytest.raises(click.UsageError, match="template such as"):
        form.convert("yaml", None, None)
