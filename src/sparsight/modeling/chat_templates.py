"""Chat templates of composed models."""

from __future__ import annotations

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from sparsight.modeling.processing import IMAGE_TOKEN

# Put before a text-only template: contents given as lists of parts become text with image placeholders.
FLATTEN = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<image>\\n' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# ChatML with marks around what the assistant says, stop token included: only that is supervised.
CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# For language models from scratch: three marks a turn, where ChatML spends nine.
LEAN = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


def multimodal_template(template: str) -> str:
    """A language model's chat template, made to take images; plain ChatML also gets marks around what is supervised.

    Plain ChatML renders a conversation as ours does; where there is no system turn, its default one may differ.
    """
    marked = "generation %}" in template or "generation -%}" in template
    if "<|im_start|>" in template and not marked and _renders_as_chatml(template):
        template = CHATML
    return template if IMAGE_TOKEN in template else FLATTEN + template


def _renders_as_chatml(template: str) -> bool:
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    try:
        own, ours = (render_jinja_template([talk], chat_template=each)[0] for each in (template, CHATML))
    except jinja2.TemplateError:
        return False
    return own == ours
