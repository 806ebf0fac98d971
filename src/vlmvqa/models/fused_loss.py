"""Cross-entropy without logits in memory: cut-cross-entropy's kernel (Wijmans et al. 2024), for `loss: fused`.

Legend: S supervised tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.models.language import LanguageModel


def fused_losses(language: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropies of the output head's logits: `float[S, D], int64[S] -> float32[S]`.

    Raises:
        InputError: the package is not installed, or the output head has a bias.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise InputError(
            "model.language.loss=fused needs cut-cross-entropy; install it with: pip install 'vlmvqa[fused]'"
        ) from error
    head = language.decoder.get_input_embeddings() if language.head is None else language.head
    if getattr(head, "bias", None) is not None:
        raise InputError(
            "model.language.loss=fused does not support a bias of the output head; use model.language.loss=chunked"
        )
    if torch.is_autocast_enabled(hidden.device.type):  # autocast does not cast a custom kernel's inputs
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    losses: Tensor = linear_cross_entropy(
        hidden,
        head.weight.to(hidden.dtype),
        targets,
        softcap=getattr(language.config, "final_logit_softcapping", None),
        reduction="none",
        filter_eps=None,  # every gradient, however small
        impl="cce" if hidden.is_cuda else "torch_compile",  # the library's reference, for tests
    )
    return losses.float()
