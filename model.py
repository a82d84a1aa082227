"""The networks, written out by hand, and a table that says what each of their layers does.

    python model.py                               # ResNet18 and CustomResNet on 64x64 images, layer by layer
    python model.py --stem-stride 4 --image-size 224 --num-classes 1000     # the ResNet18 of ImageNet

prints for each layer its output shape, parameters, receptive field and multiply-adds, and says
`ResNet18: 11,279,112 parameters` and `CustomResNet: 4,106,952 parameters`.
"""
import argparse
import copy
import math
import zipfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # most laptops'; a server's may be AVX512


# ---------------------------------------------------------------------------------------------------------------------
# ResNet18 (He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: (N, in, H, W) -> (N, out, H/stride, W/stride).

    The block learns what to add to its input rather than what to put in its place, and through the sum gradients pass
    unhindered, so that deep stacks of blocks learn as well.
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:  # the shortcut must have the shape of what it is added to
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)


class ResNet18(nn.Module):
    """ResNet18: images (N, 3, H, W) float -> logits (N, num_classes).

    Layer for layer, and name for name, torchvision.models.resnet18: weights of one load into the other.

    stem_stride: by how much the stem (conv1 and maxpool) shrinks the image before the first block. 4 is the original,
    made for 224x224 images; on 64x64 ones it throws away 15 of 16 positions before any block has seen them. 2 leaves
    out the pooling, 1 the stride of conv1 as well. Neither has weights to lose, so all three share their state_dict,
    but each halving of the stride takes about four times the multiply-adds.
    Raises ValueError for another stem_stride.
    """

    def __init__(self, num_classes=200, stem_stride=4):
        super().__init__()
        if stem_stride not in (4, 2, 1):
            raise ValueError(f"stem_stride must be 4, 2 or 1, not {stem_stride}")
        self.conv1 = nn.Conv2d(3, 64, 7, stride=1 if stem_stride == 1 else 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))     # (N, 64, H/stem_stride, W/stem_stride)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 512, H/8/stem_stride, W/8/stem_stride)
        return self.fc(self.avgpool(x).flatten(1))               # (N, num_classes)


def conv3x3(x, weight, stride):
    """A convolution with 3x3 weights and padding 1: F.conv2d, or where that is slow, a matrix product per position.

    A convolution *is* that: at each position, the patch under the kernel times the weights. Where the output is only
    1x1 or 2x2, CPUs with AVX2 but without AVX-512 compute the gradient of the weights image by image, and go through
    all 2.4 million weights for each image. A matrix product goes through them once per position for the whole batch,
    and can leave out those weights that lie on the padding: on a 1x1 map, eight of nine.
    Forward and backward of 128 images on one core, 512 channels: on 2x2 74 ms instead of 235, on 1x1 7 instead of 134.
    """
    height, width = x.shape[2:]
    if not AVX2 or x.device.type != "cpu" or max(height, width) > 2 * stride:
        return F.conv2d(x, weight, stride=stride, padding=1)
    x, weight, outputs = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), []  # channels last, as they are in memory
    for i in range(0, height, stride):
        for j in range(0, width, stride):  # the kernel's centre is on (i, j)
            patch = x[:, max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].flatten(1)                    # (N, taps * in)
            taps = weight[:, max(1 - i, 0):height + 1 - i, max(1 - j, 0):width + 1 - j].flatten(1)  # (out, taps * in)
            outputs.append(F.linear(patch, taps))                                                # (N, out)
    outputs = torch.stack(outputs, dim=1).unflatten(1, (-(-height // stride), -(-width // stride)))
    return outputs.permute(0, 3, 1, 2)                                                           # (N, out, H, W)


class Conv3x3(nn.Conv2d):
    """The blocks' convolution; it has no bias, since the BatchNorm behind it would subtract any."""

    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)

    def forward(self, x):
        return conv3x3(x, self.weight, self.stride[0])


# ---------------------------------------------------------------------------------------------------------------------
# CustomResNet: a small network of the DAWNBench kind, as the course assignment gave it


def conv_bn_relu(in_channels, out_channels, kernel_size, stride=1, padding=0, pool=False, dropout=0.0):
    """A convolution with bias, a 4x4 max-pool of stride 2 if asked for, BatchNorm, ReLU and dropout."""
    layers = [nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)]
    if pool:
        layers.append(nn.MaxPool2d(4, stride=2))
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True), nn.Dropout(dropout))


class CustomLayer(nn.Module):
    """Shrinks and widens along two paths at once: (N, in, H, W) -> (N, out, H/2 - 1, W/2 - 1), their sum."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.pooled = conv_bn_relu(in_channels, out_channels, 3, padding=1, pool=True)
        self.strided = nn.Sequential(
            conv_bn_relu(in_channels, out_channels, 3), conv_bn_relu(out_channels, out_channels, 2, stride=2))

    def forward(self, x):
        return self.pooled(x) + self.strided(x)


class CustomResNet(nn.Module):
    """The assignment's second network: images (N, 3, H, W) float -> logits (N, num_classes).

    H and W are at least 22.
    """

    def __init__(self, num_classes=200):
        super().__init__()
        self.prep = conv_bn_relu(3, 64, 3, padding=1)
        self.layer1 = CustomLayer(64, 128)
        self.layer2 = conv_bn_relu(128, 256, 3, padding=1, pool=True)
        self.layer3 = CustomLayer(256, 512)
        initialise(self)
        # On a 1x1 image a 1x1 convolution is a linear layer. No ReLU halves the signal of these two: with weights drawn
        # as if one did, 200 classes begin with a loss of 9 instead of 5.3, and training breaks as the rate rises.
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1x1 = nn.Conv2d(512, 256, 1)
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))  # (N, 512, 6, 6) for 64x64 images
        return self.classifier(self.conv1x1(self.avgpool(x))).flatten(1)


def initialise(network):
    """Draws convolution weights so that a gradient keeps its variance on its way back through the ReLUs.

    That is fan_out, as in torchvision's ResNet; for the signal on its way forward there is BatchNorm (He et al. 2015,
    arXiv:1502.01852).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MODELS = ("resnet18", "customresnet")


def create(name, num_classes, stem_stride=2):
    """The network of that name, one of MODELS; only ResNet18 has a stem whose stride can be chosen."""
    return ResNet18(num_classes, stem_stride) if name == "resnet18" else CustomResNet(num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and checkpoints


FORMAT = 3  # of checkpoints: goes up whenever a checkpoint of before would no longer do
CONTENT = {"config": dict, "classes": list, "epoch": int, "history": list, "model": dict, "optimizer": dict,
           "scaler": dict}


class UsageError(ValueError):
    """Something that the user can put right, in words for the user: the file, the place and the cure."""


def memory_is_full(error):
    """Is that what a RuntimeError says? Only CUDA has a class of its own for it."""
    return "out of memory" in str(error) or "DefaultCPUAllocator" in str(error)


def choose_device(name="auto", index=0):
    """The torch.device of that name; auto takes CUDA (the GPU with that index), else MPS, else the CPU.

    Raises UsageError if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{index}"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # fails on a device that holds no data, "meta"
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}: try --device cpu") from error


def load_checkpoint(path):
    """Reads what train.py wrote: a dict whose "config" says which network it is and whose "model" holds its weights.

    torch.load is told to accept weights and plain values only: a pickle from a stranger can run code (weights_only).
    It does not look at the checksums that the file, a zip archive, keeps of its members; zipfile does.
    Raises UsageError that names the file and says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile and torch.load have a dozen kinds of errors for a damaged file
        raise UsageError(f"{path}: not a checkpoint, or a damaged one") from error
    if damaged:
        raise UsageError(f"{path}: damaged, the checksum of {damaged} is wrong")
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UsageError(f"{path}: not a checkpoint of this train.py")
    if checkpoint["format"] != FORMAT:
        raise UsageError(f"{path}: has format {checkpoint['format']}, this train.py reads {FORMAT}: use the version "
                         "that wrote it, or train anew")
    for key, kind in CONTENT.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UsageError(f"{path}: not a checkpoint of this train.py: {key!r} is missing or no {kind.__name__}")
    return checkpoint


def place(network, device):
    """The network on the device, with the channels last in memory, as tensor cores and oneDNN like them.

    Not so on MPS, where several releases of PyTorch then computed wrong gradients (pytorch/pytorch issue 175189).
    """
    mps = torch.device(device).type == "mps"
    return network.to(device, memory_format=torch.contiguous_format if mps else torch.channels_last)


def restore(checkpoint, path, device="cpu"):
    """The network of a checkpoint, in eval mode; raises UsageError that names path if the weights do not fit it."""
    config = checkpoint["config"]
    network = create(config["model"], len(checkpoint["classes"]), config["stem_stride"])
    try:
        network.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UsageError(f"{path}: its weights do not fit {config['model']}: {reason}") from error
    return place(network, device).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The table


class Layer(NamedTuple):
    """A row of the table."""
    name: str
    shape: tuple  # of the output for one image
    parameters: int
    receptive_field: float  # side in pixels, infinite where the whole image is seen
    multiply_adds: int  # for one image


class Layers(fx.Interpreter):
    """Runs a network one operation at a time and notes of each layer its shape, parameters, receptive field and cost.

    torch.fx has turned the network into a graph of operations; the interpreter visits them in order. Beside each value
    it keeps which input pixels can reach it, in one dimension: (first, last) pixel that position 0 sees, and the jump
    in pixels from one position to the next. A kernel widens that span by its extent in jumps, a stride multiplies the
    jump, and where two paths meet the span is the union of theirs: layers on *parallel* paths do not add up. (Araujo
    et al. 2019, https://distill.pub/2019/computing-receptive-fields) It knows layers that are modules: what a forward()
    does with functions, such as F.max_pool2d, counts for nothing here.
    """

    def __init__(self, network):
        tracer = fx.Tracer()
        tracer.is_leaf_module = lambda module, name: not list(module.children())  # what has no parts is one operation
        super().__init__(fx.GraphModule(network, tracer.trace(network)))
        self.rows = []   # of type Layer
        self.spans = {}  # node -> (first, last, jump)

    def run_node(self, node):
        output = super().run_node(node)
        spans = [self.spans[parent] for parent in node.all_input_nodes] or [(0, 0, 1)]  # nothing led to it: the image
        firsts, lasts, jumps = zip(*spans)
        first, last, jump = min(firsts), max(lasts), max(jumps)
        if node.op == "call_module":
            layer = self.fetch_attr(node.target)
            if isinstance(layer, (nn.AdaptiveAvgPool2d, nn.Linear)):
                first, last = -math.inf, math.inf
            elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                kernel, stride, padding, dilation = (
                    v[0] if isinstance(v, tuple) else v
                    for v in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)))
                first, last = first - padding * jump, last + ((kernel - 1) * dilation - padding) * jump
                jump *= stride
            if not isinstance(layer, (nn.ReLU, nn.Dropout, nn.Identity)):
                multiply_adds = 0
                if isinstance(layer, (nn.Conv2d, nn.Linear)):  # each output value takes the weights of its channel
                    multiply_adds = output[0].numel() * layer.weight[0].numel()
                parameters = sum(p.numel() for p in layer.parameters())
                self.rows.append(Layer(node.target, tuple(output.shape[1:]), parameters, last - first + 1,
                                       multiply_adds))
        self.spans[node] = first, last, jump
        return output


def layers(network, image_size=64):
    """The table's rows for images (1, 3, image_size, image_size), of type Layer. The network is left as it was."""
    # Tensors on "meta" have a shape and no numbers, so that nothing is computed, however large the image.
    interpreter = Layers(copy.deepcopy(network).to("meta").eval())
    interpreter.run(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return interpreter.rows


def receptive_field(network):
    """Side in pixels of the square of the input that one position of the last feature map depends on."""
    return max(row.receptive_field for row in layers(network) if row.receptive_field < math.inf)


def print_table(network, image_size):
    print(f"{type(network).__name__} on {image_size}x{image_size} images\n")
    print(f"{'layer':24}{'output shape':>16}{'parameters':>14}{'receptive field':>18}{'multiply-adds':>16}")
    rows = layers(network, image_size)
    for name, shape, parameters, field, multiply_adds in rows:
        field = field if field < math.inf else "whole image"
        print(f"{name:24}{' x '.join(map(str, shape)):>16}{parameters:14,}{field:>18}{multiply_adds:16,}")
    print(f"\n{type(network).__name__}: {sum(p.numel() for p in network.parameters()):,} parameters, "
          f"{sum(row.multiply_adds for row in rows) / 1e6:,.0f} million multiply-adds per image, "
          f"receptive field {receptive_field(network)} before the global average pool\n")


def main():
    parser = argparse.ArgumentParser(description="Prints the networks, layer by layer.")
    parser.add_argument("--num-classes", type=int, default=200, help="200, as Tiny ImageNet has")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels; 64, as Tiny ImageNet has")
    parser.add_argument("--stem-stride", type=int, default=2, choices=(4, 2, 1),
                        help="of ResNet18; 2, as train.py has it for Tiny ImageNet")
    args = parser.parse_args()
    if not (22 <= args.image_size <= 100_000 and 1 <= args.num_classes <= 100_000):
        parser.error("--image-size must be at least 22, --num-classes at least 1, both at most 100000")
    for name in MODELS:
        print_table(create(name, args.num_classes, args.stem_stride), args.image_size)
    print("CustomResNet's receptive field is often given as 122. That number comes from adding up every layer in the\n"
          "order in which it is printed, as if the two paths of a CustomLayer followed one another. They run side by\n"
          "side: a pixel reaches the sum through one or the other, and the longer path alone counts. That gives 38.")


if __name__ == "__main__":
    main()
