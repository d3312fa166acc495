"""One cluster of several hosts for the tests of this folder, and the table of what was timed on it."""

from collections.abc import Iterator

import pytest

from tests.cluster_lab.cluster import Cluster, Sweep, Timing, Training
from tests.cluster_lab.hosts import lacking

TIMINGS: list[Timing] = []


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


@pytest.fixture(autouse=True)
def recovered(onprem: Cluster) -> Iterator[None]:
    """The cluster whole again after each test, also after one that failed."""
    yield
    onprem.recover()


@pytest.fixture(scope="session")
def undisturbed(onprem: Cluster) -> Training:
    """What every disturbed run must come to."""
    run = Training(onprem, "undisturbed")
    with onprem.timed("adapter-train under ZeRO-3, two workers on two hosts"):
        run.submit()
        run.wait_for_step(1)
        assert len(run.workers_on()) == 2
        run.ends_well()
    return run


@pytest.fixture(scope="session")
def calm_sweep(onprem: Cluster) -> Sweep:
    """What every disturbed sweep must come to."""
    run = Sweep(onprem, "calm")
    with onprem.timed("cafo-tune: 6 trials, features encoded first"):
        run.submit()
        run.ends_well()
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TIMINGS:
        terminalreporter.section("measured")
        for what, seconds, note in TIMINGS:
            terminalreporter.write_line(f"{what:<64} {seconds:7.1f} s  {note}")
