"""Tests of the HTML pages that all commands share: one head, nothing loaded from elsewhere, text as text."""

from html.parser import HTMLParser
from pathlib import Path

from recontrast.data.html_page import read_style, render_page, render_single_file, render_today

ROOT = Path(__file__).parents[2]


class Elements(HTMLParser):
    """Lists the elements of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def read_meta(page):
    metas = [attributes for tag, attributes in Elements(page).found if tag == "meta"]
    return {meta.get("name") or meta.get("http-equiv"): meta["content"] for meta in metas if "content" in meta}


def test_a_page_of_one_file_has_its_style_and_no_script():
    page = render_single_file("a <b> & c", "<p>text</p>", generator="A comparison", style="p { margin: 0 }")
    meta = read_meta(page)
    assert meta["generator"] == "A comparison"
    assert meta["Content-Security-Policy"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "<title>a &lt;b&gt; &amp; c</title>" in page and "<style>p { margin: 0 }</style>" in page
    assert "<script" not in page and page.endswith("<body>\n<p>text</p>\n</body>\n</html>\n")
    assert page.index("Content-Security-Policy") < page.index("<style")  # it holds for what follows


def test_a_page_with_a_script_allows_scripts_in_the_page_alone():
    page = render_single_file("a", "<p>text</p>", generator="A report", style="", script="let a = 1")
    assert read_meta(page)["Content-Security-Policy"].endswith("; script-src 'unsafe-inline'")
    assert "<p>text</p>\n<script>let a = 1</script>\n</body>" in page


def test_a_page_of_a_server_has_what_it_names():
    page = render_page("a", "<main></main>", '<link rel="stylesheet" href="/page.css">')
    tags = [tag for tag, _ in Elements(page).found]
    assert tags == ["html", "head", "meta", "meta", "meta", "link", "title", "link", "body", "main"]
    assert "Content-Security-Policy" not in read_meta(page)  # the server sends it


def test_styles_are_joined_in_order():
    first, second = (read_style(f"recontrast.app.{name}") for name in ("report", "compare"))
    assert first and second and read_style("recontrast.app.report", "recontrast.app.compare") == first + second


def test_today_has_its_machine_readable_date():
    ((tag, attributes),) = Elements(render_today()).found
    assert tag == "time" and len(attributes["datetime"]) == len("2026-01-02T03:04:05+00:00")


def test_no_other_module_writes_a_head():
    files = [path for path in ROOT.glob("recontrast/**/*.*") if path.suffix in (".py", ".html")]
    assert [path.name for path in files if "<!doctype" in path.read_text(encoding="utf-8").lower()] == ["html_page.py"]
