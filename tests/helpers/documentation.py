"""Parse a page of documentation: links, inline code, and the commands of its code blocks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# A block of code indented by four spaces; deeper lines of a list are text.
_INDENTED = re.compile(r"(?:\A|\n)\n((?: {4}.*\n|\n(?= {4}))+)")
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


def prose(text: str) -> str:
    """Return the page without its code blocks."""
    return _INDENTED.sub("\n\n", _FENCED.sub("", text))


def links(text: str) -> list[str]:
    """Return the targets of the page's links and images."""
    return _LINK.findall(_INLINE.sub("", prose(text)))


def inline_code(text: str) -> list[str]:
    """Return the text between backticks, with line breaks as spaces."""
    return [" ".join(code.split()) for _, code in _INLINE.findall(prose(text))]


def blocks(text: str) -> list[str]:
    """Return the page's code blocks without their indentation."""
    found = [block.split("\n", 1)[1].rsplit("\n", 1)[0] for block in _FENCED.findall(text)]
    for block in _INDENTED.findall(_FENCED.sub("", text)):
        found.append("\n".join(line[4:] for line in block.splitlines()))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each shell command in the code blocks, without variable assignments."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # output, or a recipe
            while words and _ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                yield words


def own_commands(text: str) -> list[list[str]]:
    """Return the words after `nemo-care` of all such commands of a page."""
    lines = [*commands(text), *(code.split() for code in inline_code(text))]
    found = []
    for words in lines:
        for place, word in enumerate(words):
            if word.rpartition("/")[2] == "nemo-care":
                found.append(words[place + 1 :])
            if words[place : place + 2] == ["-m", "nemo_care.train"]:
                found.append(["train", *words[place + 2 :]])
    found = [[word for word in words if word != "..."] for words in found]
    return [words for words in found if words and words[0].islower()]


def modules(text: str) -> list[list[str]]:
    """Return the words after `python -m` of all such commands of a page."""
    lines = [*commands(text), *(code.split() for code in inline_code(text))]
    return [
        words[place + 1 :]
        for words in lines
        for place, word in enumerate(words)
        if word == "-m" and re.fullmatch(r"python[\d.]*", words[place - 1].rpartition("/")[2])
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(slug, -1) + 1
        found[slug] = count
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)
