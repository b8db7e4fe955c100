"""Systems that Cropr is compared with, on the reference ViT, at the token counts of a schedule.

Written to be fast in PyTorch, with this package's ops where they fit. `registry` makes each by
name. A new one needs a file here, its line in the registry, and a test against a slow, obvious
version. `scorers` and `fusions` hold what the paper changes in Cropr itself: the scorer of its
modules, and the way back to a full map.
"""
