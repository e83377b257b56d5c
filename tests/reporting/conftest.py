import pytest
from synthetic import write_run

from sparsight.reporting import Run, read_run


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    return [read_run(write_run(tmp_path / name, name)) for name in ("sparsight", "standard")]
