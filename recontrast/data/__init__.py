"""Images in, uint8 arrays out: files, samples (datasets), pixels (images, kept by cache), drawn defects (synthetic).

`prepare` brings the paper's data sets from their original downloads (`originals`) into the layout that is read here.
Imports torch, NumPy and Pillow, nothing of ours outside this folder.
"""
