"""Upstream's ReContrast (https://github.com/guojiajeremy/ReContrast), written independently for parity tests.

It does not use the classes of `recontrast.models`, but plain layers with the names of torchvision. The sources are
`models/resnet.py` (``ResNet``, ``BN_layer``), `models/de_resnet.py` (``ResNet``), `models/partialnormv2.py`
(``PartialNorm2D``) and `models/recontrast.py` (``ReContrast``). As upstream, both heads run on the whole batch and half
of each result is discarded, and the bottleneck has an unused conv4 and bn4.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # expansion, base width, blocks of layer1 to layer3, blocks of the bottleneck
    "resnet18": SimpleNamespace(expansion=1, width=64, blocks=(2, 2, 2), fuse=2),
    "resnet50": SimpleNamespace(expansion=4, width=64, blocks=(3, 4, 6), fuse=3),
    "wide_resnet50_2": SimpleNamespace(expansion=4, width=128, blocks=(3, 4, 6), fuse=3),
}
UNUSED = ("bottleneck.conv4", "bottleneck.bn4")


class Block(nn.Module):
    """Residual block; ``side`` names the shortcut and the direction of stride 2: "downsample" or "upsample"."""

    def __init__(self, cin, planes, size, stride, side):
        super().__init__()
        cout, up = planes * size.expansion, side == "upsample" and stride == 2

        def spatial(a, b, s):
            if up and s == 2:
                return nn.ConvTranspose2d(a, b, kernel_size=2, stride=2, bias=False)
            return nn.Conv2d(a, b, kernel_size=3, stride=s, padding=1, bias=False)

        self.deep, self.act = size.expansion == 4, F.relu
        if self.deep:
            mid = planes * size.width // 64
            self.conv1, self.bn1 = nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid)
            self.conv2, self.bn2 = spatial(mid, mid, stride), nn.BatchNorm2d(mid)
            self.conv3, self.bn3 = nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout)
        else:
            self.conv1, self.bn1 = spatial(cin, planes, stride), nn.BatchNorm2d(planes)
            self.conv2, self.bn2 = spatial(planes, planes, 1), nn.BatchNorm2d(planes)
        self.side = None
        if stride == 2 or cin != cout:
            kind, kernel = (nn.ConvTranspose2d, 2) if up else (nn.Conv2d, 1)
            shortcut = kind(cin, cout, kernel, stride, bias=False)
            self.side = side
            self.add_module(side, nn.Sequential(shortcut, nn.BatchNorm2d(cout)))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.deep:
            y = self.bn3(self.conv3(self.act(y)))
        return self.act(y + (getattr(self, self.side)(x) if self.side else x))


def build_layer(cin, planes, count, size, stride, side):
    first = Block(cin, planes, size, stride, side)
    return nn.Sequential(first, *(Block(planes * size.expansion, planes, size, 1, side) for _ in range(count - 1)))


class Encoder(nn.Module):
    """``ResNet`` of models/resnet.py up to layer3."""

    def __init__(self, size):
        super().__init__()
        e = size.expansion
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.layer1 = build_layer(64, 64, size.blocks[0], size, 1, "downsample")
        self.layer2 = build_layer(64 * e, 128, size.blocks[1], size, 2, "downsample")
        self.layer3 = build_layer(128 * e, 256, size.blocks[2], size, 2, "downsample")

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        a = self.layer1(x)
        b = self.layer2(a)
        return [a, b, self.layer3(b)]


class BNLayer(nn.Module):
    """``BN_layer`` of models/resnet.py."""

    def __init__(self, size):
        super().__init__()
        c = [64 * size.expansion, 128 * size.expansion, 256 * size.expansion]
        self.conv1, self.bn1 = nn.Conv2d(c[0], c[1], 3, 2, 1, bias=False), nn.BatchNorm2d(c[1])
        self.conv2, self.bn2 = nn.Conv2d(c[1], c[2], 3, 2, 1, bias=False), nn.BatchNorm2d(c[2])
        self.conv3, self.bn3 = nn.Conv2d(c[1], c[2], 3, 2, 1, bias=False), nn.BatchNorm2d(c[2])
        self.conv4, self.bn4 = nn.Conv2d(4 * c[2], 2 * c[2], 1, bias=False), nn.BatchNorm2d(2 * c[2])  # never called
        self.bn_layer = build_layer(3 * c[2], 512, size.fuse, size, 2, "downsample")

    def forward(self, x):
        first = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x[0]))))))
        second = F.relu(self.bn3(self.conv3(x[1])))
        return self.bn_layer(torch.cat([first, second, x[2]], 1))


class Decoder(nn.Module):
    """``ResNet`` of models/de_resnet.py with output_conv=2."""

    def __init__(self, size):
        super().__init__()
        e = size.expansion
        self.layer1 = build_layer(512 * e, 256, size.blocks[0], size, 2, "upsample")
        self.layer2 = build_layer(256 * e, 128, size.blocks[1], size, 2, "upsample")
        self.layer3 = build_layer(128 * e, 64, size.blocks[2], size, 2, "upsample")
        self.out1 = nn.ModuleList(nn.Conv2d(64 * e, 64 * e, 1) for _ in range(2))
        self.out2 = nn.ModuleList(nn.Conv2d(128 * e, 128 * e, 1) for _ in range(2))
        self.out3 = nn.ModuleList(nn.Conv2d(256 * e, 256 * e, 1) for _ in range(2))

    def forward(self, x):
        f3 = self.layer1(x)
        f2 = self.layer2(f3)
        f1 = self.layer3(f2)
        return [out[i](f) for i in range(2) for out, f in ((self.out1, f1), (self.out2, f2), (self.out3, f3))]


class UpstreamReContrast(nn.Module):
    """``ReContrast`` of models/recontrast.py: forward returns (six teachers, six students)."""

    def __init__(self, name):
        super().__init__()
        size = SIZES[name]
        self.encoder, self.encoder_freeze = Encoder(size), Encoder(size)
        self.bottleneck, self.decoder = BNLayer(size), Decoder(size)

    def forward(self, x):
        en = self.encoder(x)
        with torch.no_grad():
            en_freeze = self.encoder_freeze(x)
        de = self.decoder(self.bottleneck([torch.cat(pair, 0) for pair in zip(en, en_freeze, strict=True)]))
        half = [d.chunk(2, 0)[0 if i < 3 else 1] for i, d in enumerate(de)]
        return en_freeze + en, half

    def train(self, mode=True, encoder_bn_train=True):
        self.training = mode
        self.encoder.train(mode and encoder_bn_train)
        self.encoder_freeze.train(False)
        self.bottleneck.train(mode)
        self.decoder.train(mode)
        return self


class PartialNorm2D(nn.Module):
    """``PartialNorm2D`` of models/partialnormv2.py, created from a pretrained BatchNorm."""

    def __init__(self, bn, var_thresh, eps):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.detach().clone()) for p in (bn.weight, bn.bias))
        self.register_buffer("running_mean", bn.running_mean.clone())
        self.register_buffer("running_var", bn.running_var.clone())
        self.eps, self.var_thresh, self.min_var = eps, var_thresh, None

    def forward(self, x):
        w, b = self.weight, self.bias
        if self.min_var is None:  # in the first forward pass, as upstream
            self.min_var = torch.minimum(self.running_var.clone(), torch.full_like(self.running_var, self.var_thresh))
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, w, b, False, 0.1, self.eps)
        mean, var = torch.zeros_like(self.min_var), torch.zeros_like(self.min_var)
        by_batch = F.batch_norm(x, mean, var, w, b, True, 1.0, self.eps)  # momentum 1 stores the batch statistics
        centred = x - x.mean((0, 2, 3), keepdim=True)
        by_pretraining = F.batch_norm(centred, torch.zeros_like(mean), self.min_var, w, b, False, 0.1, self.eps)
        use = (var > self.min_var).float()
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        self.running_var = 0.9 * self.running_var + 0.1 * (var * use + self.min_var * (1 - use))
        use = use.view(1, -1, 1, 1)
        return by_batch * use + by_pretraining * (1 - use)


def replace_layers(decoder):
    """Use the exact GELU, as `replace_layers(decoder, nn.ReLU, nn.GELU())` in recontrast_mvtec_multiclass.py."""
    for block in decoder.modules():
        if isinstance(block, Block):
            block.act = F.gelu


def replace_norms(module, var_thresh, eps):
    """Use `PartialNorm2D`, as ``norm_layer=partial(PartialNorm2D, var_thresh=...)`` in recontrast_mvtec_stable.py."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PartialNorm2D(child, var_thresh, eps))
        else:
            replace_norms(child, var_thresh, eps)


def _copy_block(source, target, state, out):
    """Copy a residual block, whose layers have the positions 0, 1, 3, 4 (6, 7) in `recontrast.models`."""
    for position, name in zip((0, 1, 3, 4, 6, 7), ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), strict=True):
        _copy(f"{source}.body.{position}", f"{target}.{name}", state, out)
    for position in (0, 1):
        for side in ("downsample", "upsample"):
            _copy(f"{source}.shortcut.{position}", f"{target}.{side}.{position}", state, out)


def _copy(source, target, state, out):
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if f"{source}.{kind}" in state and f"{target}.{kind}" in out:
            out[f"{target}.{kind}"] = state.pop(f"{source}.{kind}").clone()


def upstream_from(model, name):
    """Build upstream's model with the weights of ``model``, all of which must be used."""
    with torch.device("meta"):  # every tensor is copied below
        upstream = UpstreamReContrast(name)
    state, out, size = model.state_dict(), upstream.state_dict(), SIZES[name]
    for source, target in (("encoder.extractor.", "encoder."), ("frozen.extractor.", "encoder_freeze.")):
        for key in [k for k in state if k.startswith(source)]:  # timm's ResNet uses the names of torchvision
            value = state.pop(key)
            if not key.endswith("min_var"):  # upstream computes it in the first forward pass
                out[target + key.removeprefix(source)] = value.clone()
    chains = {"0.0": "conv1", "0.1": "bn1", "0.3": "conv2", "0.4": "bn2", "1.0": "conv3", "1.1": "bn3"}
    for position, layer_name in chains.items():
        _copy(f"bottleneck.down.{position}", f"bottleneck.{layer_name}", state, out)
    for i in range(size.fuse):
        _copy_block(f"bottleneck.fuse.{i}", f"bottleneck.bn_layer.{i}", state, out)
    for stage, count in enumerate(size.blocks):
        for i in range(count):
            _copy_block(f"decoder.stages.{stage}.{i}", f"decoder.layer{stage + 1}.{i}", state, out)
    for head in range(2):
        for level in range(3):
            _copy(f"decoder.heads.{head}.{level}", f"decoder.out{level + 1}.{head}", state, out)
    if state:
        raise KeyError(f"upstream has no tensors for {list(state)[:3]}")
    out |= {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in out.items() if key.startswith(UNUSED)}
    upstream.load_state_dict(out, assign=True)
    return upstream
