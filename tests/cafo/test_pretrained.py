"""An encoder with ImageNet's weights, on photos."""

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images

from cafo.encoders import EncoderSpec, load_encoder

PALACE, DAISY = 698, 985
"""ImageNet's classes for scikit-learn's two photos, of a Chinese temple and of a flower."""


@pytest.mark.slow
def test_an_imagenet_encoder_equals_timms_and_knows_photos(efficientnet_lite0):
    name = "tf_efficientnet_lite0"
    encoder = load_encoder(EncoderSpec(kind="timm", name=name, weights=str(efficientnet_lite0)))
    reference = timm.create_model(name).eval()
    reference.load_state_dict(torch.load(efficientnet_lite0, weights_only=True), strict=False)  # no counters
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    pixels = torch.stack([encoder.preprocess(photo) for photo in photos])
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(pixels), pre_logits=True)
        classes = reference.get_classifier()(expected).argmax(1)
    torch.testing.assert_close(encoder.encode_image(pixels), F.normalize(expected), rtol=0, atol=1e-5)
    assert classes.tolist() == [PALACE, DAISY]
