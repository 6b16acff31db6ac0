"Small networks and images, on which training is compared bit by bit."

import torch
from darkdistill_nb.core.data import ArrayData
from darkdistill_nb.exits.networks import cnn, vit, wrn

SHAPE = 1, 8, 8
NETS = {
    "cnn": lambda: cnn(SHAPE, 4, stages=2, width=4),
    "wrn": lambda: wrn(10, 1, SHAPE, 4, exits=(1, 3)),
    "vit": lambda: vit(exits=(1, 2), img_size=8, in_chans=1, n_classes=4, patch_size=4, embed_dim=24, depth=2, num_heads=3),
}


def images(n=44):
    g = torch.Generator().manual_seed(1)
    return ArrayData(torch.randn(n, *SHAPE, generator=g), torch.arange(n) % 4, range(4))
