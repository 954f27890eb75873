"""Whether an HTML page is whole: every element closed where it should be, and nothing fetched from elsewhere."""

from html.parser import HTMLParser

VOID = {"meta", "img", "link", "br"}
OWN = {"line", "circle", "polyline"}  # of SVG, closed in themselves


class _Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.found = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in OWN, tag
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def elements(page):
    """All elements of a page, (name, attributes), in their order."""
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open, checker.open
    return checker.found


def assert_whole(page):
    """The page is well-formed, runs no script, and shows only what is in it."""
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in elements(page):
        assert tag not in ("script", "iframe", "object", "link"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        assert attributes.get("src", "data:image/").startswith("data:image/"), attributes
        assert attributes.get("href", "report.json") == "report.json", attributes
    assert "url(" not in page and "@import" not in page
