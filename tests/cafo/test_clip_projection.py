"""What comes before CLIP's last projection gives the embedding when it is projected."""

import pytest
import torch
from torch.nn import functional as F

from cafo.encoders import EncoderSpec, load_encoder
from cafo.errors import EncoderError
from tests.cafo.test_encoders import RESNET, VIT, folder

TIMM = VIT | {"vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token"}}


@pytest.mark.parametrize("config", [VIT, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_the_projection_of_what_comes_before_it_is_the_embedding(tmp_path, config):
    config = config | {"vision_cfg": config["vision_cfg"] | ({"timm_proj": "linear"} if config is TIMM else {})}
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path, config))))
    batch, before = torch.randn(3, 3, 32, 32), encoder.identity
    expected = encoder.network(batch)
    unprojected = encoder.encode_unprojected(batch)
    weight, bias = encoder.projection
    assert unprojected.shape == (3, weight.shape[1]) != (3, 13)
    torch.testing.assert_close(F.linear(unprojected, weight, bias), expected)
    assert encoder.encode_image(batch).shape == (3, 13)  # the encoder itself keeps its projection
    assert load_encoder(EncoderSpec(kind="clip", weights=str(tmp_path))).identity == before
    own = {p.data_ptr() for p in encoder.network.parameters()}
    assert sum(p.data_ptr() not in own for p in encoder._split[0].parameters()) <= 2  # no copy of the weights


def test_a_clip_that_ends_otherwise_has_no_features_before_a_projection(tmp_path):
    config = TIMM | {"vision_cfg": TIMM["vision_cfg"] | {"timm_proj": "mlp"}}
    encoder = load_encoder(EncoderSpec(kind="clip", weights=str(folder(tmp_path, config))))
    with pytest.raises(EncoderError, match="does not end with one linear projection"):
        encoder.encode_unprojected(torch.randn(1, 3, 32, 32))
