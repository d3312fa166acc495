"""ProLIP without a sweep: on features that the encoder gives, without a feature store, a trial or a saved file."""

from collections.abc import Sequence

import torch

from cafo.encoders import ClipEncoder, load_encoder
from cafo.images import load_image
from cafo.methods import find_method
from cafo.methods.base import Features, FewShotImages
from cafo.methods.choice import fit_and_choose
from cafo.methods.saved import FewShotClassifier
from rayjobs.job_configs.cafo import Config

PROLIP = {"learning_rates": [1e-3, 1e-2], "penalties": [1.0], "steps": 4}
"""the constants that the sweep changes"""


def check_prolip(config: Config, saved: Sequence[FewShotClassifier]) -> None:
    """Compare each classifier of a sweep with what a script fits on the encoder's own features."""
    encoder, of_views, dataset = load_encoder(config.encoders["clip"]), config.features, config.data.open()
    assert isinstance(encoder, ClipEncoder)

    def features(paths: Sequence[str], view: int | None = None) -> Features:
        pixels = []
        for path in paths:
            image = load_image(dataset.image_root / path)
            if view is None:
                pixels.append(encoder.preprocess(image))
            else:
                how = {"min_area": of_views.min_area, "flips": of_views.flips}
                pixels.append(encoder.preprocess.view(image, path, view, of_views.seed, **how))
        batch = torch.stack(pixels)
        return Features(embeddings=encoder.encode_image(batch), unprojected=encoder.encode_unprojected(batch))

    val = features([item.path for item in dataset.val]), torch.tensor([item.label for item in dataset.val])
    test = features([item.path for item in dataset.open_test()])
    for one in saved:
        paths = [image.path for image in one.images]
        of_all = [features(paths, view) for view in range(of_views.views)]
        assert all(view.unprojected is not None for view in of_all)
        images = FewShotImages(
            views=Features(
                embeddings=torch.stack([view.embeddings for view in of_all]),
                unprojected=torch.stack([view.unprojected for view in of_all]),  # type: ignore[misc]
            ),
            plain=features(paths),
            labels=torch.tensor([dataset.class_names.index(image.class_name) for image in one.images]),
            classifier=one.fitted.tensors(one.setting)["text"].T.contiguous(),
            projection=encoder.projection,
        )
        direct = fit_and_choose(find_method("ProLIP", PROLIP), images, "val", val=val, seed=one.seed)
        assert one.setting == direct.setting
        assert test.unprojected is not None
        got = one.logits({"clip before projection": test.unprojected})
        torch.testing.assert_close(got, direct.logits(test), rtol=1e-4, atol=1e-3)
