"""Fixtures for all tests: factories of tiny real models (`tiny.py`). Nothing here reaches the network."""

import os
import signal

# Before torch is loaded, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# As in a terminal, also where a shell runs this in the background: else Ctrl-C is ignored, by what tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Times vary on shared machines; a slow example is not a fault.
settings.register_profile("sparsight", deadline=None)
settings.load_profile("sparsight")


@pytest.fixture(scope="session")
def tiny_language():
    """Factory: `tiny_language(**ScratchLanguage keys)` -> (causal language model, tokenizer), the same every time."""
    from tiny import make_language

    return make_language


@pytest.fixture(scope="session")
def tiny_vlm():
    """Factory: `tiny_vlm(bridge, **build options)` -> (model in eval mode, processor), the same every time."""
    from tiny import make_vlm

    return make_vlm


@pytest.fixture(scope="session")
def fresh():
    """`fresh.run(code, *arguments, cwd=, env=, timeout=)`: ``python -c`` with torch imported already; see forked.py."""
    from forked import Forks

    forks = Forks()
    yield forks
    forks.close()
