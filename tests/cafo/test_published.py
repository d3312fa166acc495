from cafo import published
from cafo.datasets import LAYOUTS, TEST_ONLY


def test_the_published_figures_name_our_data_sets():
    assert set(published.RN50) == set(LAYOUTS)
    assert all(len(row) == len(published.SHOTS) for row in published.RN50.values())
    assert set(published.SHIFT) == set(TEST_ONLY)
    assert published.RN50["imagenet"][-1] == published.IMAGENET_16_SHOT["RN50"] == published.IMAGENET_CASCADE["all"][-1]
