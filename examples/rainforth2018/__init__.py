"""Parts of ``tighter_bounds.py``: the Gaussian study of Rainforth et al. (2018), https://arxiv.org/abs/1802.04537."""
