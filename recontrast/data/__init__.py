"""Images, data sets and everything that prepares, caches or writes them.

`listing` finds image files, `datasets` turns folders into samples, and `images` decodes files to uint8 arrays. `cache`
keeps decoded images, `in_memory` accepts images from a caller, and `sources` defines their common interface.
`prepare` converts original downloads to MVTec AD layout: those of the paper's data sets (read by `downloads`), and
those of `described_sets`. `synthetic` draws a small data set. The folder imports torch, NumPy and Pillow, and nothing
from other folders of the package.
"""
