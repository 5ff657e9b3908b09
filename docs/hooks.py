"""Pages of the site that stand elsewhere in the repository, with their links set right. MkDocs calls these functions."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "repository/examples.md",
    "kernels/README.md": "repository/kernels.md",
    "kernels/PERFORMANCE.md": "repository/performance.md",
    "kernels/TRIED.md": "repository/tried.md",
    "benchmarks/RESULTS.md": "repository/results.md",
    "benchmarks/gpu/README.md": "repository/gpu.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changelog.md",
}
"""Which page of the site a document of the repository is."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the repository's documents, and the pictures that they show."""
    for source, page in PAGES.items():
        if page != "index.md":
            text = _relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
            files.append(File.generated(config, page, content=text))
    for picture in sorted((ROOT / "benchmarks/results/plots").glob("*.png")):
        files.append(File.generated(config, f"repository/plots/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """A page in docs/ links to the repository's documents as they are seen there; on the site they are pages."""
    source = page.file.src_uri
    return markdown if source.startswith("repository/") else _relinked(markdown, f"docs/{source}", source)


def _relinked(text, source, page):
    """Links of ``source``, a path in the repository, as ``page``, a path on the site, must write them."""

    def to(match):
        picture, label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            place = PAGES[path]
        elif path.startswith("docs/"):
            place = path.removeprefix("docs/")
        elif picture and path.startswith("benchmarks/results/plots/"):
            place = f"repository/plots/{posixpath.basename(path)}"
        else:
            return label if label.startswith("`") else f"{label} (`{path}`)"
        return f"{picture}[{label}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor or ''})"

    return _LINK.sub(to, text)
