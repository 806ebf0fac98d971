"""The projector: shapes, kinds, dropout, data types, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmvqa.errors import InputError
from vlmvqa.models.build import build_projector
from vlmvqa.models.projector import LAYERS, Projector
from vlmvqa.models.vision import FeatureShape
from vlmvqa.models.vlm import ProjectorSettings

VISION, LANGUAGE = 6, 10  # widths
FEATURES = FeatureShape(VISION, 5, (2, 2))


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, VISION, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_patch_becomes_an_embedding(kind: str) -> None:
    projector = Projector(FEATURES, LANGUAGE, kind)
    projected = projector(features())
    assert projected.shape == (2, 5, LANGUAGE)
    assert torch.allclose(projector(features()[:, 3:4]), projected[:, 3:4], atol=1e-6)  # each on its own


def test_linear_is_one_layer() -> None:
    projector = Projector(FEATURES, LANGUAGE)
    (layer,) = projector.layers
    assert isinstance(layer, nn.Linear)
    assert torch.equal(projector(features()), features() @ layer.weight.T + layer.bias)
    assert sum(p.numel() for p in projector.parameters()) == VISION * LANGUAGE + LANGUAGE


def test_mlp_is_two_layers_with_a_gelu() -> None:
    projector = Projector(FEATURES, LANGUAGE, "mlp")
    first, activation, second = projector.layers
    assert [type(layer) for layer in projector.layers] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.allclose(projector(features()), second(activation(first(features()))))
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (6, 10, 10, 10)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_active_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    projector = Projector(FEATURES, LANGUAGE, kind, dropout=0.5)
    trained = projector.train()(features())
    dropped = trained == 0
    assert 0.2 < dropped.float().mean() < 0.8
    evaluated = projector.eval()(features())
    assert torch.equal(evaluated, projector.layers(features())) and not (evaluated == 0).any()
    assert torch.allclose(trained[~dropped], 2 * evaluated[~dropped])  # scaled by 1 / (1 - p)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_data_type_is_that_of_the_weights(kind: str, dtype: torch.dtype) -> None:
    projector = Projector(FEATURES, LANGUAGE, kind).to(dtype)
    assert projector(features(dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):
        projector(features(torch.float16))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_features_and_every_weight(kind: str) -> None:
    projector, given = Projector(FEATURES, LANGUAGE, kind), features().requires_grad_()
    projector(given).square().sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_correct(kind: str) -> None:
    projector = Projector(FEATURES, LANGUAGE, kind).double()
    assert torch.autograd.gradcheck(projector, features(torch.float64).requires_grad_())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.projector\.kind=liner is unknown.*did you mean 'linear'\?"):
        build_projector(ProjectorSettings("liner"), FEATURES, LANGUAGE)
