"""The ReContrast network and its parts: backbones, bottleneck, decoders, pretrained weights and BatchNorm folding."""
