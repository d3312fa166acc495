from cafo import paper_results
from cafo.dataset_layouts import LAYOUTS, TEST_ONLY


def test_the_published_figures_name_our_data_sets():
    assert set(paper_results.RN50) == set(LAYOUTS)
    assert all(len(row) == len(paper_results.SHOTS) for row in paper_results.RN50.values())
    assert set(paper_results.SHIFT) == set(TEST_ONLY)
    assert (
        paper_results.RN50["imagenet"][-1]
        == paper_results.IMAGENET_16_SHOT["RN50"]
        == paper_results.IMAGENET_CASCADE["all"][-1]
    )
