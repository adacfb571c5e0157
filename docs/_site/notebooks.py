"""Hooks of mkdocs: each tutorial, a notebook with its outputs, becomes a page, its figures files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for notebook in [each for each in files if each.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        markdown, figures = page_of(
            json.loads(Path(notebook.abs_src_path).read_text(encoding="utf-8")), Path(name).name
        )
        files.append(File.generated(config, f"{name}.md", content=markdown))
        for figure, svg in figures.items():
            files.append(File.generated(config, f"{Path(name).parent}/{figure}", content=svg))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to notebooks lead to their pages; each such page offers its notebook."""
    markdown = re.sub(r"\.ipynb(?=[)#])", ".md", markdown)
    if page.file.src_uri.startswith("tutorials/"):
        notebook = Path(page.file.src_uri).with_suffix(".ipynb").name
        title, rest = markdown.split("\n", 1)
        return f"{title}\n\n[Download this notebook]({notebook}){{ download }}\n{rest}"
    return markdown


def page_of(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, str]]:
    """Markdown of a notebook, and its figures by file name."""
    parts, figures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/svg+xml" in output["data"]:
                figure = f"{name}-{len(figures) + 1}.svg"
                figures[figure] = "".join(output["data"]["image/svg+xml"])
                parts.append(f"![Figure {len(figures)}: what this cell draws]({figure})")
            else:
                parts.append(f"```text\n{''.join(output['data']['text/plain'])}\n```")
    return "\n\n".join(parts) + "\n", figures
