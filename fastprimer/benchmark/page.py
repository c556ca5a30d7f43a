"""The page of `fastprimer report`: one HTML file that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from jinja2 import Environment
from markdown_it import MarkdownIt

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastprimer: {{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.note { color: #555; font-size: .9rem; } p.wrong { color: #b00020; font-weight: bold; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; }
thead th { position: sticky; top: 0; background: #f6f6f6; } tbody tr:hover { background: #f4f8fc; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-size: .85rem; color: #555; }
summary { cursor: pointer; padding: .3rem 0; } nav a { display: inline-block; margin-right: .8rem; }
</style>
</head>
<body>
<h1>fastprimer, measured</h1>
<p class="note">{% for line in about %}{{ line }}<br>{% endfor %}</p>
<nav>{% for section in sections %}<a href="#{{ section.anchor }}">{{ section.title }}</a> {% endfor %}</nav>
{% for section in sections %}
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for text in section.wrong %}<p class="wrong">{{ text }}</p>{% endfor %}
{% for text in section.notes %}<p class="note">{{ text }}</p>{% endfor %}
{% if section.figures %}<div class="plots">
{% for caption, svg in section.figures %}<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
</div>{% endif %}
{% if section.text %}{% if section.folded %}<details><summary>{{ section.folded }}</summary>{% endif %}
{{ section.text | markdown | safe }}
{% if section.folded %}</details>{% endif %}{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass
class Section:
    """A heading, sentences, figures (caption, SVG), and Markdown, which may be folded away under a line."""

    title: str
    text: str = ""
    folded: str = ""
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


def html(title: str, about: list[str], sections: list[Section]) -> str:
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["markdown"] = _markdown
    return environment.from_string(TEMPLATE).render(title=title, about=about, sections=sections)


def _markdown(text: str) -> str:
    """Wide tables scroll by themselves, not the page."""
    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return rendered.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
