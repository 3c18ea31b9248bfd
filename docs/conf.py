"""The pages as a site: ``python -m sphinx -W --keep-going -b html docs build/site``."""

import os
import re
import sys
import tomllib
import urllib.request
from pathlib import Path

import django
from django.conf import settings
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
settings.configure()
django.setup()

about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
urls = about.get("urls", {})

project = about["name"]
release = about["version"]
author = "the scoped project"
html_show_copyright = False
html_title = f"scoped {release}"

root_doc = "index"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Links in the pages are those that the forge shows: to files, and to headings as it names them.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True


def has_inventory(url: str) -> bool:
    """Other projects' names are linked where they can be had, and the site needs none of them."""
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 (https: see OTHERS)
    except OSError:
        return False
    return True


OTHERS = {
    "python": ("https://docs.python.org/3/", "https://docs.python.org/3/objects.inv"),
    "django": (
        "https://docs.djangoproject.com/en/stable/",
        "https://docs.djangoproject.com/en/stable/_objects/",
    ),
}
intersphinx_mapping = {name: other for name, other in OTHERS.items() if has_inventory(other[1])}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_theme_options = {"top_of_page_buttons": []}
if repository := urls.get("Repository"):
    html_theme_options |= {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
        "top_of_page_buttons": ["view", "edit"],
    }
copybutton_exclude = ".linenos, .gp, .go"


OUTWARD = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def link_outward(app: Sphinx, page: str, source: list[str]) -> None:
    """What is no page, a README beside code say, is linked in the repository if that is known."""

    def replace(link: re.Match[str]) -> str:
        path, _, anchor = link[2].partition("#")
        target = (Path(app.srcdir) / page).parent.joinpath(path).resolve()
        if target.is_relative_to(app.srcdir):
            return link[0]
        if not repository:
            return link[1]
        place = target.relative_to(ROOT).as_posix() + (f"#{anchor}" if anchor else "")
        return f"[{link[1]}]({repository}/blob/main/{place})"

    source[0] = OUTWARD.sub(replace, source[0])


def setup(app: Sphinx) -> None:
    app.add_lexer("mermaid", TextLexer)  # which the forge draws
    app.connect("source-read", link_outward)
