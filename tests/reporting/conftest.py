import pytest
from synthetic import write_points, write_run

from sparsight.reporting import Run, read_run


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    return [read_run(write_run(tmp_path / name, name)) for name in ("sparsight", "standard")]


@pytest.fixture
def tested(tmp_path) -> list[Run]:
    """Runs with the points of the same items."""
    return [
        read_run(write_points(write_run(tmp_path / "tested" / name, name), better))
        for name, better in (("mine", 0.1), ("standard", 0))
    ]
