"""SBERT-WK: weigh each token's layers by how new they are, each token by how much it changes across layers.

Wang & Kuo 2020, arXiv 2002.06652; parity target is the authors' code (BinWang28/SBERT-WK-Sentence-Embedding utils.py),
which sentence-transformers 1.x carried as WKPooling. That code runs a QR decomposition per token and layer in Python.
Everything in it depends only on the Gram matrix of a token's layer vectors, so all tokens are done at once here:
with G = V V^T in float64, C the neighbours of layer k within the window and g = G[C, k],

    s^2 = g^T G[C,C]^-1 g          the part of |v_k|^2 that the neighbours explain
    alignment_k = mean_j G_jk / (|v_j| s), a_k = 1 / (2 (|C| + 1) alignment_k)
    novelty_k = sqrt(1 - s^2 / G_kk)
    alpha = norm1(norm1(a) + norm1(novelty)),   word = sum_k alpha_k v_k
    text = sum_t u_t word_t / sum_t u_t,   u_t = variance over k of cos(v_k, v_k+1)

Differences from the paper, kept because the published numbers come from the code: the alignment divides by the norm of
the projection, not of v_k, and carries the factor |C| + 1. `windows="repo"` also keeps its slice x[k-w:k], which for
0 < k < w wraps around and leaves the left side empty; `windows="paper"` takes the neighbours that the paper means.
"""

from __future__ import annotations

import torch

from comp.model.backbone import Backbone
from comp.model.layer_pooling import first_layer
from comp.model.token_pooling import Hidden, Pooler, cls_index, layer

__all__ = ["SBERTWK", "neighbours", "token_weights"]

TINY = 1e-12  # floor under novelty^2, whose root has an infinite slope at 0
ALIKE = 1e-20  # added to the variance of every token: a text whose layers are all alike becomes a plain mean
RIDGE = 1e-13  # of the diagonal: keeps Cholesky going where two layers are the same
CHUNK = 4096  # tokens whose Gram matrices are computed at a time


def neighbours(count: int, window: int, windows: str) -> list[list[int]]:
    """Return, for each of `count` layers, the layers it is compared with. `windows`: repo | paper."""
    places = list(range(count))
    left = [places[k - window : k] if windows == "repo" else places[max(0, k - window) : k] for k in places]
    return [left[k] + places[k + 1 : k + window + 1] for k in places]


def token_weights(states: torch.Tensor, window: int = 2, windows: str = "repo") -> tuple[torch.Tensor, torch.Tensor]:
    """Return alpha (N, K), the weights of a token's layers, and u (N,), the weight of the token, both float64.

    `states`: (N, K, H), N tokens with their K layer vectors, bottom layer first; K >= 3 and window < K.
    """
    # Apple's GPUs have no float64: there the small matrices are made on the CPU.
    wide = states.cpu().double() if states.device.type == "mps" else states.double()
    gram = wide @ wide.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    norm = square.sqrt()
    alignment, novelty = [], []
    for k, chosen in enumerate(neighbours(states.shape[1], window, windows)):
        inner = gram[:, chosen][:, :, chosen]
        inner = inner + torch.diag_embed(RIDGE * square[:, chosen])
        shadow = gram[:, chosen, k]
        factor, _ = torch.linalg.cholesky_ex(inner)
        half = torch.linalg.solve_triangular(factor, shadow[..., None], upper=False)[..., 0]
        explained = half.square().sum(1).clamp(min=TINY)
        mean = (shadow / norm[:, chosen]).mean(1) / explained.sqrt()
        alignment.append(1 / (2 * (len(chosen) + 1) * mean))
        novelty.append((1 - explained / square[:, k]).clamp(min=TINY).sqrt())
    aligned, new = torch.stack(alignment, 1), torch.stack(novelty, 1)
    alpha = aligned / aligned.sum(1, keepdim=True) + new / new.sum(1, keepdim=True)
    cosine = gram.diagonal(1, 1, 2) / (norm[:, 1:] * norm[:, :-1])
    return alpha / alpha.sum(1, keepdim=True), cosine.var(1, correction=0)


class SBERTWK(Pooler):
    """SBERT-WK over layers layer_start..L and over the real tokens but the last (the separator, in BERT's layout)."""

    def __init__(
        self, backbone: Backbone, *, layer_start: int | None = None, window: int = 2, windows: str = "repo"
    ) -> None:
        super().__init__(backbone)
        self.layers = first_layer(backbone, layer_start, "sbert_wk", least=3)
        if window >= len(self.layers):
            raise ValueError(
                f"pooler 'sbert_wk': window is {window}, but only {len(self.layers)} layers are compared (layers "
                f"{self.layers[0]} to {self.layers[-1]}); set model.pooler.window below {len(self.layers)}"
            )
        self.window, self.windows = window, windows

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        counted = mask.ne(0)
        if counted.shape[1] > 1:  # a text of one token keeps it
            last = cls_index(mask, cls_last=True)
            places = torch.arange(mask.shape[1], device=mask.device)
            counted = counted & ~((places == last[:, None]) & (counted.sum(1, keepdim=True) > 1))
        states = torch.stack([layer(hidden, index)[counted] for index in self.layers], 1)
        parts = [token_weights(part, self.window, self.windows) for part in states.split(CHUNK)]
        alpha = torch.cat([part[0] for part in parts]).to(states.dtype).to(states.device)
        words = torch.einsum("nkh,nk->nh", states, alpha)
        row = counted.nonzero()[:, 0]
        weight = torch.cat([part[1] for part in parts]) + ALIKE
        own = row.to(weight.device)
        total = weight.new_zeros(len(mask)).index_add(0, own, weight)
        share = (weight / total[own]).to(states.dtype).to(states.device)
        return states.new_zeros(len(mask), states.shape[2]).index_add(0, row, words * share[:, None])
