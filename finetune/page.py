"""A page that is one file: its figures, pictures, style and script are inside, and a policy forbids it to ask for more."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.durations import duration
from finetune.errors import ConfigError
from finetune.figures import svg
from finetune.files import write_atomically
from finetune.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **content: Any) -> str:
    """Fill a template; whatever a class or a file is called, it stays text.

    Args:
        template: The name of a file among the templates.
        **content: What it shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "count": lambda number: f"{number:,}", "value": value_text}
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **content,
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=digest,
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def drawn(figures: dict[str, Figure]) -> dict[str, Any]:
    """Return figures as elements of a page."""
    from markupsafe import Markup

    return {name: Markup(svg(figure, f"{name}-figure")) for name, figure in figures.items()}


def write_page(path: Path, html: str) -> Path:
    """Write a page; letters that no text can hold, as in the name of a file in another encoding, become question marks.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        write_atomically(path, html.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}. Give another place with --out.") from error
    return path


def value_text(value: Any) -> str:
    """Say the value of an option as it is typed.

    >>> value_text(True), value_text(None), value_text(1e-5), value_text([{"train": "head"}])
    ('true', 'null', '1.0e-05', '[{train: head}]')
    """
    import yaml

    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
