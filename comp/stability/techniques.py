"""TECHNIQUES: what may steady a few-sample run, by the config key or name that turns it on. All are off by default."""

from __future__ import annotations

from comp.catalog import Row
from comp.model.backbone import Backbone
from comp.model.text_model import TextModel
from comp.stability.adversarial import AWP, FGM
from comp.stability.averaging import EMA, SWA, Soup
from comp.stability.consistency import disagreement
from comp.stability.contrast import SupCon
from comp.stability.mixout import mix_
from comp.stability.prior_decay import PriorDecay
from comp.stability.reinit import reinit_blocks_, reinit_linear_

__all__ = ["TECHNIQUES"]

ZHANG = "Zhang et al. 2020, arXiv:2006.05987"

TECHNIQUES: dict[str, Row] = {
    "reinit_layers": Row(reinit_blocks_, "draw the top blocks anew, in the architecture's own scheme", ZHANG),
    "reinit_pooler": Row(reinit_linear_, "draw the checkpoint's own pooler anew", ZHANG),
    "mixout": Row(mix_, "dropout towards the pretrained weights", "Lee et al. 2020, arXiv:1909.11299"),
    "prior_decay": Row(PriorDecay, "weight decay towards the pretrained weights", ZHANG),
    "swa": Row(SWA, "equal mean of points near the end, at a constant rate", "Izmailov et al. 2018, arXiv:1803.05407"),
    "ema": Row(EMA, "moving average of every step", "Polyak & Juditsky 1992"),
    "soup": Row(Soup, "mean of the fold's best checkpoints, all or those that help", "arXiv:2203.05482"),
    "fgm": Row(FGM, "a second pass at a worse word table, gradients added", "Miyato et al. 2017, arXiv:1605.07725"),
    "awp": Row(AWP, "a second pass at worse matrices, in place of the first", "Wu et al. 2020, arXiv:2004.05884"),
    "rdrop": Row(disagreement, "two passes with different dropout must agree", "Liang et al. 2021, arXiv:2106.14448"),
    "supcon": Row(SupCon, "texts with like targets draw together, by class or kernel", "arXiv:2004.11362, 2106.08808"),
    "multi_sample_dropout": Row(TextModel, "several masks of the head's dropout per pass", "arXiv:1905.09788"),
    "freeze_embeddings": Row(Backbone.freeze, "keep the embeddings, or the word table alone, fixed", "common practice"),
    "freeze_layers": Row(Backbone.freeze, "keep the lowest blocks fixed", "common practice"),
}
