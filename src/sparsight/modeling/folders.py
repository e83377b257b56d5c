"""The files of a model's folder, checked before anything is loaded from them.

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
from sparsight.safety import check_manifest

# As transformers calls them; each holds a mapping.
_JSON = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"),
    "model.safetensors.index.json",
)


def read_json(file: str | Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises UserError, with the file's name, if it holds none."""
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise UserError(f"{file} is cut short or damaged, no valid JSON: {error}. Get it anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def check_files(folder: str | Path) -> None:
    """Compare a folder with its manifest, if it has one, and read its small files and the headers of its weights;
    UserError names a damaged one."""
    folder = Path(folder)
    check_manifest(folder)
    for file in (folder / name for name in _JSON):
        if file.is_file():
            read_json(file)
    for file in (*sorted(folder.glob("*.safetensors")), *folder.glob("chat_template.jinja")):
        try:
            if file.suffix == ".jinja":
                render_jinja_template([[]], chat_template=file.read_text(encoding="utf-8"))
            else:
                with safe_open(file, framework="pt"):
                    pass
        except (SafetensorError, jinja2.TemplateSyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is cut short or damaged: {error}. Get it anew") from None
        except Exception:  # a sound template may refuse a conversation without turns
            pass


def model_type(folder: str | Path) -> str | None:
    """``model_type`` of a folder's config.json; None where there is no such file."""
    file = Path(folder) / "config.json"
    return str(read_json(file).get("model_type")) if file.is_file() else None


def complete(kind: Any, name: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained``. Raises UserError for weights that are missing: transformers draws them at random."""
    model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{len(missing)} weights are missing, such as {missing[0]}; they would be random. Get it anew")
    return model


@contextmanager
def loading(part: str, name: str) -> Iterator[None]:
    """Around what transformers loads: its errors say neither which part they are about, nor what to do."""
    check_files(name)
    where = "" if Path(name).is_dir() else "there is no such folder here, and from a hub "
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = (
                f"{name} contains custom code. Sparsight runs no code that comes with a model: choose one that "
                "transformers itself knows, or load it in Python and give it to sparsight.build"
            )
        raise UserError(f"{part} '{name}': {where}it cannot be loaded: {reason:.500}") from None
