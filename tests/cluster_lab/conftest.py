"""One cluster of several hosts for the tests of this folder, and the table of what was timed on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_lab.cluster import Cluster, Timing
from tests.cluster_lab.hosts import lacking
from tests.cluster_lab.runs import Encoding, Labelling, Sweep, Training

TIMINGS: list[Timing] = []
MIDDLE = 60
"""Steps after which a fault comes: between the checkpoints at 50 and 75."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Half an hour for a test, since the first one also brings the cluster up and makes the undisturbed run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def onprem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The on-premises cluster, up."""
    if why := lacking():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("lab"), TIMINGS)
    try:
        cluster.up()
        yield cluster
        cluster.down()
    finally:
        cluster.hosts.down()
        cluster.slow.unmount()


@pytest.fixture(autouse=True)
def recovered(onprem: Cluster) -> Iterator[None]:
    """The cluster whole again after each test, also after one that failed."""
    yield
    onprem.recover()


@pytest.fixture(scope="session")
def undisturbed(onprem: Cluster) -> Training:
    """The undisturbed training, whose result every disturbed one must have."""
    run = Training(onprem, "undisturbed")
    with onprem.timed("adapter-train under ZeRO-3, two workers on two hosts"):
        run.submit()
        run.wait_for_step(1)
        assert len(run.workers_on()) == 2
        run.ends_well()
    return run


@pytest.fixture
def run(onprem: Cluster, undisturbed: Training, request: pytest.FixtureRequest) -> Training:
    """A run in the middle of its work."""
    made = Training(onprem, request.node.name)
    made.submit()
    made.wait_for_step(MIDDLE)
    return made


@pytest.fixture(scope="session")
def calm_sweep(onprem: Cluster) -> Sweep:
    """The undisturbed sweep, whose result every disturbed one must have."""
    run = Sweep(onprem, "calm")
    with onprem.timed("cafo-tune: 6 trials, features encoded first"):
        run.submit()
        run.ends_well()
    return run


@pytest.fixture(scope="session")
def calm_encoding(onprem: Cluster) -> Encoding:
    """The undisturbed cafo-features, whose result every disturbed one must have."""
    run = Encoding(onprem, "calm-features")
    with onprem.timed("cafo-features: 8,000 views"):
        run.submit()
        run.ends_well()
    return run


@pytest.fixture(scope="session")
def calm_labelling(onprem: Cluster) -> Labelling:
    """The undisturbed cafo-predict, whose result every disturbed one must have."""
    run = Labelling(onprem, "calm-predict")
    with onprem.timed("cafo-predict: 3,000 images"):
        run.submit()
        run.ends_well()
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TIMINGS:
        terminalreporter.section("measured")
        for what, seconds, note in TIMINGS:
            terminalreporter.write_line(f"{what:<64} {seconds:7.1f} s  {note}")
