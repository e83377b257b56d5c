"""What the folder of a model holds, looked at before anything is made of it.

transformers passes over some damaged files in silence, ends in a traceback at others, and asks on the terminal
whether to run code that it finds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError, safe_open
from transformers.utils.chat_template_utils import render_jinja_template

from sparsight.errors import UserError

# As transformers calls them; each holds a mapping.
_JSON = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "model.safetensors.index.json",
)


NO_CODE = (
    "Sparsight runs no code that comes with a model: choose one that transformers itself knows, or load it in Python "
    "and give it to sparsight.build"
)


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError, with the file's name, if it holds no mapping."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise UserError(f"{file} is cut short or damaged, no valid JSON: {error}. Get it anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def check_files(folder: Path) -> None:
    """Read every small file of a model, and the headers of its weights; nothing where there is no such folder.

    Raises:
        UserError: one of them is damaged; the message names it.
    """
    for file in (folder / name for name in _JSON):
        if file.is_file():
            read_json(file)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is cut short or damaged: {error}. Get it anew") from None
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            talk = [{"role": "user", "content": "?"}]
            render_jinja_template([talk], chat_template=template.read_text(encoding="utf-8"))
        except (jinja2.TemplateSyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{template} is cut short or damaged, no valid template: {error}. Get it anew") from None
        except Exception:
            pass


def model_type(folder: Path) -> str | None:
    """What the folder's config.json says that it is; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "config.json"
    return str(read_json(file).get("model_type")) if file.is_file() else None


@contextmanager
def loading(part: str, name: str) -> Iterator[None]:
    """Around what transformers loads: its errors say neither which part they are about, nor what to do.

    Raises:
        UserError: ``name`` cannot be loaded, or one of its files is damaged.
    """
    check_files(Path(name))
    where = "" if Path(name).is_dir() else "there is no such folder here, and from a hub "
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = f"{name} contains custom code. {NO_CODE}"
        raise UserError(f"{part} '{name}': {where}it cannot be loaded: {reason:.500}") from None
