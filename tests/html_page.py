"""A parsed HTML page, for the tests of what faceprior writes as HTML."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Its elements as (name, attributes), its text, and whether every tag was closed in order."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.pieces, self.open, self.balanced = [], [], [], True
        self.feed(path.read_text(encoding="utf-8"))
        self.balanced = self.balanced and not self.open
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == name

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.pieces.append(data)

    def all(self, name, class_=None):
        return [a for n, a in self.elements if n == name and (class_ is None or class_ in a.get("class", "").split())]

    def count(self, name, class_):
        return len(self.all(name, class_))
