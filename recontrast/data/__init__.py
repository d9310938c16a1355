"""Images in, uint8 arrays out: files, samples (datasets), pixels (images, kept by cache), drawn defects (synthetic).

Imports torch, NumPy and Pillow, nothing of ours outside this folder.
"""
