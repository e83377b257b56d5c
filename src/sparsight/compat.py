"""What differs between the versions of transformers that Sparsight runs with.

Each entry names the version that made it needed.
"""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

# 5.24 renamed `past_key_values` to `cache`: in outputs, and in the arguments of forward.
CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"
