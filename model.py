"""The networks, written by hand, and a table of their layers.

    python model.py                               # ResNet18 and CustomResNet on 64x64 images
    python model.py --stem-stride 4 --image-size 224 --num-classes 1000     # ImageNet's ResNet18

prints for each layer its output shape, parameters, receptive field and multiply-adds, and last
`ResNet18: 11,279,112 parameters, 2,253 million multiply-adds per image`.
"""
import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import UsageError, run_command

# --------------------------------------------------------------------------------------------------
# ResNet18 (He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, out, H/stride, W/stride).

    The block learns what to add to its input. Gradients pass the sum unchanged, so deep stacks of
    blocks can be trained.
    """

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:  # both terms of the sum need the same shape
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)


class ResNet18(nn.Module):
    """Images (N, 3, H, W) float -> logits (N, num_classes).

    The state_dict is interchangeable with torchvision.models.resnet18's, for every stem_stride.

    stem_stride 4 is the original, made for 224x224 images; 2 omits the pooling, 1 the stride of
    conv1 as well, each for about four times the multiply-adds.
    """

    def __init__(self, num_classes=200, stem_stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 1 if stem_stride == 1 else 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem_stride == 4 else nn.Identity()
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))        # (N, 64, H/stem, W/stem)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))   # (N, 512, H/8/stem, W/8/stem)
        return self.fc(self.avgpool(x).flatten(1))


# --------------------------------------------------------------------------------------------------
# CustomResNet: the assignment's second network, in the style of DAWNBench


def conv_bn_relu(in_channels, out_channels, kernel_size, stride=1, padding=0, pool=False):
    layers = [nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)]
    if pool:
        layers.append(nn.MaxPool2d(4, stride=2))
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class CustomLayer(nn.Module):
    """The sum of two parallel paths: (N, in, H, W) -> (N, out, H/2 - 1, W/2 - 1)."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.pooled = conv_bn_relu(in_channels, out_channels, 3, padding=1, pool=True)
        self.strided = nn.Sequential(conv_bn_relu(in_channels, out_channels, 3),
                                     conv_bn_relu(out_channels, out_channels, 2, stride=2))

    def forward(self, x):
        return self.pooled(x) + self.strided(x)


class CustomResNet(nn.Module):
    """Images (N, 3, H, W) float, H and W at least 22 -> logits (N, num_classes)."""

    def __init__(self, num_classes=200):
        super().__init__()
        self.prep = conv_bn_relu(3, 64, 3, padding=1)
        self.layer1 = CustomLayer(64, 128)
        self.layer2 = conv_bn_relu(128, 256, 3, padding=1, pool=True)
        self.layer3 = CustomLayer(256, 512)
        initialise(self)
        # the last two layers keep PyTorch's initialisation: no ReLU follows them
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1x1 = nn.Conv2d(512, 256, 1)
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))     # (N, 512, 6, 6) for 64x64
        return self.classifier(self.conv1x1(self.avgpool(x))).flatten(1)


# --------------------------------------------------------------------------------------------------
# Initialisation, forward pass, devices, checkpoints


def initialise(network):
    """He initialisation of the convolutions, as in torchvision (arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


MODELS = ("resnet18", "customresnet")


def create(name, num_classes, stem_stride=1):
    """Returns one of MODELS; stem_stride is for resnet18 only."""
    return ResNet18(num_classes, stem_stride) if name == "resnet18" else CustomResNet(num_classes)


def forward(network, images, dtype=torch.float32):
    """Logits (N, classes) float32; the network's convolutions compute in dtype."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return network(images).float()


def choose_device(name="auto"):
    """Returns a torch.device; "auto" is the GPU, if there is one. Raises UsageError."""
    if name == "auto":
        gpu = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator() if gpu else "cpu"
    if str(name) == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # set by torchrun
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}: try --device cpu"
                         ) from error


def choose_dtype(precision, device):
    """Returns the torch.dtype for convolutions; "auto" is 16 bits where they are fast."""
    if precision != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def read(path):
    """Reads a dict that torch.save wrote: a file, or last.pt in a run's folder. Never runs code
    from it. Raises UsageError.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else path
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        reason = "no such file"
    except Exception:  # damaged and foreign files raise a dozen types
        reason = "damaged, or not written by train.py"
    raise UsageError(f"{path}: {reason}: choose another file, or train again")


def load_checkpoint(path):
    """Reads a checkpoint of train.py. Raises UsageError."""
    checkpoint = read(path)
    if "config" not in checkpoint:
        raise UsageError(f"{path}: not a checkpoint of train.py: choose another file")
    return checkpoint


def load_weights(network, path, class_names):
    """Copies the weights of a run, a checkpoint or a state_dict into the network, those of the last
    layer only if the classes are the same. Returns that in words. Raises UsageError if others do
    not fit.
    """
    source, own = read(path), network.state_dict()
    same = source.get("classes") == class_names
    last = {} if same else dict(list(own.items())[-2:])  # weight and bias
    try:
        network.load_state_dict(source.get("model", source) | last)
    except RuntimeError as error:
        raise UsageError(f"--weights {path}: {str(error).splitlines()[1].strip()[:200]}: choose "
                         "weights of the same network") from error
    return f"the weights of {path}, all layers" + bool(last) * " but the last"


def restore(checkpoint, device="cpu"):
    """Returns the network of a checkpoint, in eval mode."""
    config = checkpoint["config"]
    network = create(config["model"], len(checkpoint["classes"]), config["stem_stride"])
    network.load_state_dict(checkpoint["model"])
    return place(network, device).eval()


def place(network, device):
    """Moves the network to the device; convolutions are faster with the channels last in memory.

    Not on MPS: wrong gradients in several releases (pytorch/pytorch issue 175189).
    """
    last = torch.device(device).type != "mps"
    return network.to(device, memory_format=torch.channels_last if last else torch.preserve_format)


# --------------------------------------------------------------------------------------------------
# The table


def print_table(network, image_size):
    """Prints a row for each layer but ReLU.

    Neighbours in a layer's input are `jump` pixels apart, so a kernel adds (kernel - 1) * jump to
    the receptive field. Of parallel paths the longest counts (Araujo et al.,
    https://distill.pub/2019/computing-receptive-fields).
    """
    from torch.fx.passes.shape_prop import ShapeProp  # here, as it imports sympy
    title, total, reach = type(network).__name__, 0, {}  # reach: operation -> (field, jump)
    print(f"{title:24}{'output shape':>16}{'parameters':>14}{'receptive field':>18}"
          f"{'multiply-adds':>16}")
    layers, traced = dict(network.named_modules()), torch.fx.symbolic_trace(network.eval())
    ShapeProp(traced).propagate(torch.zeros(1, 3, image_size, image_size))
    for node in traced.graph.nodes:
        layer, shape = layers.get(node.target), node.meta["tensor_meta"].shape[1:]
        kernel, stride = (np.max(getattr(layer, key, 1)) for key in ("kernel_size", "stride"))
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            kernel = math.inf
        field, jump = max(map(reach.get, node.all_input_nodes), default=(1, 1))
        field += (kernel - 1) * jump
        reach[node] = field, jump * stride
        if layer is None or isinstance(layer, (nn.ReLU, nn.Identity)):
            continue
        multiply_adds = 0
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # an output value uses its channel's weights
            multiply_adds = shape.numel() * layer.weight[0].numel()
        total += multiply_adds
        parameters = sum(map(torch.numel, layer.parameters()))
        print(f"{node.target:24}{' x '.join(map(str, shape)):>16}{parameters:14,}"
              f"{field if field < math.inf else 'whole image':>18}{multiply_adds:16,}")
    parameters = sum(map(torch.numel, network.parameters()))
    print(f"\n{title}: {parameters:,} parameters, {total / 1e6:,.0f} million multiply-adds per "
          "image\n")


def main():
    parser = argparse.ArgumentParser(description="Prints the networks' layers.")
    parser.add_argument("--num-classes", type=int, default=200, help="200")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels, from 22: 64")
    parser.add_argument("--stem-stride", type=int, default=1, choices=(4, 2, 1), help="1")
    args = parser.parse_args()
    for name in MODELS:
        print_table(create(name, args.num_classes, args.stem_stride), args.image_size)
    print("The assignment's 122 for CustomResNet's receptive field is the sum over all layers; of "
          "parallel paths, only the longest counts.")


if __name__ == "__main__":
    run_command(main)
