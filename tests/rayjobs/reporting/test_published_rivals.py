"""The authors' own figures of rivals stand beside the same data and encoder only."""

from cafo import paper_results
from cafo.methods import METHODS
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.reporting.accuracy_tables import accuracy_table, published_rows


def test_the_authors_figures_stand_beside_the_same_data_and_encoder_only() -> None:
    encoders = {
        "clip": VisionEncoderConfig(kind="clip", name="RN50-quickgelu", weights="openai"),
        "vit": VisionEncoderConfig(kind="clip", name="ViT-B-16", weights="openai"),
        "mine": VisionEncoderConfig(kind="clip", name="RN50", weights="mine.pt"),
    }
    names = ["GDA", "Tip-Adapter-F", "LP++"]
    of_clip, *others = [[{"rival": name, "encoders": (encoder,)} for name in names] for encoder in encoders]
    rows = published_rows("dtd", "dtd", encoders, of_clip)
    assert {name: row[16] for name, row in rows.items()} == {
        "GDA, published, chosen on all of val": 66.51,
        "Tip-Adapter-F, published, chosen on all of val, the epoch on test": 66.55,
    }
    assert not any(published_rows("dtd", "dtd", encoders, settings) for settings in others)
    assert not published_rows("dtd", "other", encoders, of_clip)
    assert not published_rows("food101", "food101", encoders, of_clip)
    measured = [{"method": "GDA", "shots": 16, "accuracy": 0.5, "images": 100}]
    _, lines = accuracy_table(measured, rows)
    assert [line[0] for line in lines] == ["GDA", *rows]


def test_every_rival_with_figures_is_a_method_and_every_data_set_the_papers() -> None:
    assert set(paper_results.RIVALS_RN50) <= set(METHODS)
    for of_data_set in paper_results.RIVALS_RN50.values():
        assert set(of_data_set) <= set(paper_results.RN50)
        assert all(len(row) == len(paper_results.SHOTS) for row in of_data_set.values())
