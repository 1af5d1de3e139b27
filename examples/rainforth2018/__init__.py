"""The Gaussian study of Rainforth et al. (2018), https://arxiv.org/abs/1802.04537: the parts of ``tighter_bounds.py``."""
