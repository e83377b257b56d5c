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


@pytest.fixture
def graded(tmp_path) -> list[Run]:
    """Runs whose items have grades; "few" is worse on what is small, and only there."""
    grades = {"size": [(20, 26, 32)[number % 3] for number in range(60)], "things": [1 + n % 6 for n in range(60)]}
    runs = [
        read_run(write_points(write_run(tmp_path / "graded" / name, name), grades=grades))
        for name in ("few", "standard")
    ]
    for own in runs[0].points.values():
        own.scores[::3] = [0.0] * 20
    return runs
