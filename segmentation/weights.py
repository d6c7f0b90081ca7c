"""Loading the weights of segmentation networks: our own, and the released ones."""

from functools import partial

from dense.networks import load_network

load_segmentor = partial(load_network, kind="segmentation network")
