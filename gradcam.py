"""Grad-CAM: which part of an image spoke for a class, as a picture, and measured against the objects' boxes.

    python gradcam.py runs/shapes-resnet18                      # draws validation images that the network gets wrong
    python gradcam.py runs/shapes-resnet18 --target actual      # the same ones: what spoke for the right class?
    python gradcam.py runs/tiny-imagenet-resnet18 cat.jpg       # your own pictures, of any size
    python gradcam.py runs/tiny-imagenet-resnet18 --evaluate    # are the maps on the objects?

The first two write gradcam.png and gradcam-actual.png into the run's folder; the third prints the five likeliest
classes of each picture and writes pictures.png. The last prints a line for each layer: how often the map's maximum is
in the object's box, and how much of the map, beside what a map gets that has not looked at the image. For the 33,000
images of Tiny ImageNet one core of a CPU needs five minutes.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) asks a layer's feature maps: had you been a little stronger, how much
would the score of the class have grown? That gradient, averaged over positions, is the weight of a map; the weighted
sum of the maps, where it is positive, is what spoke for the class. Late layers have seen whole objects but are coarse,
early ones are sharp but know edges and colours only.
"""
import argparse
import os
import sys
import textwrap
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import data
import model
from model import UsageError


# ---------------------------------------------------------------------------------------------------------------------
# Grad-CAM


class GradCAM:
    """maps = GradCAM(network, ["layer3", "layer4"])(images, classes)

    layers: names as in network.named_modules(), or None for all of layer1, layer2, ... that there are. Their outputs
    must be (N, C, H, W); a Swin transformer's (N, H, W, C) cannot be told from that, and gives nonsense.
    images (N, 3, H, W) float, classes (N,) int64 or None for the predicted ones -> {layer: maps (N, H, W) in [0, 1]},
    each map 0 at its minimum and 1 at its maximum. A flat one is 0: nothing spoke for the class, or the layer has a
    single position. size, a pair, asks for maps of another size than the images. `logits` (N, classes): what the
    network said in the last call.

    Works on frozen weights, inside no_grad, in any train or eval mode, and leaves no trace of itself in the network.
    Raises UsageError for a layer that there is not, or that yields no feature maps, and for a network without logits.
    """

    def __init__(self, network, layers=None):
        self.network, self.logits = unwrap(network), None
        modules = dict(self.network.named_modules(remove_duplicate=False))
        del modules[""]  # the network itself
        if layers is None:
            layers = [name for name, _ in self.network.named_children() if name.startswith("layer")]
        if not layers:
            raise UsageError(f"no layer's name begins with 'layer': name some of {', '.join(modules)}")
        for name in layers:
            if name not in modules:
                raise UsageError(f"no layer is called {name!r}; there are {', '.join(modules)}")
        self.layers = {name: modules[name] for name in layers}

    def __call__(self, images, classes=None, size=None):
        features = {}  # layer -> (N, C, h, w)
        modes = [(module, module.training) for module in self.network.modules()]
        handles = [layer.register_forward_hook(catch(name, features)) for name, layer in self.layers.items()]
        try:
            for module, _ in modes:
                module.training = False  # else BatchNorm mixes the images of a batch, and remembers them
            # A graph is recorded even if the caller has switched that off, and even if all weights are frozen: it
            # starts at the image, which is what everything is computed from.
            with torch.inference_mode(False), torch.enable_grad():
                # .forward: calling the network itself would run the code that network.compile() made, without hooks.
                # The second clone may be overwritten by an inplace layer, which the start of a graph may not.
                logits = self.network.forward(images.detach().clone().requires_grad_().clone())
                if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
                    raise UsageError("the network yields no logits (N, classes)")
                missing = [name for name in self.layers if name not in features or not features[name].requires_grad]
                if missing:
                    raise UsageError(f"the network does not use its layer {missing[0]!r}, or computes it in no_grad")
                # A clone: a tensor made in inference_mode may not take part in a graph.
                classes = logits.argmax(1) if classes is None else classes.clone()
                # The sum is no mixture: no image's features reach the score of another. autograd.grad, unlike
                # backward(), touches no .grad, and it computes no gradients of weights, a third of the work.
                scores = logits[torch.arange(len(logits), device=logits.device), classes]
                gradients = torch.autograd.grad(scores.sum(), [features[name] for name in self.layers],
                                                materialize_grads=True)  # 0 where the score does not depend on a layer
            self.logits = logits.detach()
            return {name: combine(features[name].detach(), gradient, size or images.shape[2:])
                    for name, gradient in zip(self.layers, gradients)}
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training


def combine(features, gradient, size):
    """The formula itself, and its scaling: a layer's output and the gradient at it, (N, C, h, w) -> maps (N, *size)."""
    weights = gradient.mean((2, 3))                                        # (N, C)
    maps = torch.einsum("nc,nchw->nhw", weights, features).relu()          # (N, h, w)
    # Stretched twice: interpolate leaves rounding errors in a flat map (a 1x1 one, say), which the second stretch alone
    # would blow up to 0 ... 1. The first one makes a flat map exactly 0, and so it stays.
    return stretch(F.interpolate(stretch(maps)[:, None], size, mode="bilinear", align_corners=False)[:, 0])


def stretch(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def catch(name, features):
    """A forward hook that keeps a layer's output in features[name].

    No module backward hook for the gradient, as it hands out views that a later inplace ReLU may not overwrite
    (https://github.com/pytorch/pytorch/issues/61519): autograd.grad asks for it at what is caught here. And the
    network goes on with a clone: else that ReLU would overwrite what we have caught.
    """
    def hook(module, inputs, output):
        if not isinstance(output, torch.Tensor) or output.dim() != 4:
            raise UsageError(f"layer {name!r} yields no feature maps (N, C, H, W)")
        features[name] = output
        return output.clone()
    return hook


def unwrap(network):
    """The network inside DistributedDataParallel, DataParallel and torch.compile, in any order."""
    # _orig_mod: what torch.compile(network) wraps.
    while hasattr(network, "_orig_mod") or isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        network = network._orig_mod if hasattr(network, "_orig_mod") else network.module
    return network


# ---------------------------------------------------------------------------------------------------------------------
# The measures: is the map on the object?


def measure(maps, boxes):
    """Pointing game and energy in the box of maps (N, H, W) >= 0 and boxes (N, 4): x0, y0, x1, y1 -> (N, 2) in [0, 1].

    Pointing game (Zhang et al. 2016, arXiv:1608.00507): does the map's maximum lie in the box? Where pixels share the
    maximum, the share of them that does, so that a map that is flat, and points nowhere, gets what chance gets.
    Energy (Wang et al. 2020, arXiv:1910.01279): how much of the map's sum lies in the box?
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)                          # each (N, 1)
    row, column = (torch.arange(side, device=maps.device) for side in maps.shape[1:])
    inside = ((row >= y0) & (row < y1))[:, :, None] & ((column >= x0) & (column < x1))[:, None, :]
    top = maps.amax((1, 2), keepdim=True)
    maps = torch.where(top > 0, maps, torch.ones_like(maps))
    pointing, energy = ((heat * inside).sum((1, 2)) / heat.sum((1, 2)) for heat in ((maps >= top).float(), maps))
    return torch.stack((pointing, energy), dim=1)


def evaluate(cam, dataset, indices, resolution, min_crop, target="predicted", batch_size=128):
    """The table of the measures over the images of indices, as Markdown: a row for each layer, chance and the centre.

    The maps, of cam, are those of the predicted or of the actual class. resolution and min_crop: as the network was
    trained. Says on stderr how far it is.
    """
    device = next(cam.network.parameters()).device
    batches = data.Batches(dataset, indices, batch_size, device, False, min_crop)
    border = data.margin(min_crop)
    side = data.SIZE - 2 * border
    boxes = (dataset.boxes[indices] - border).to(device)  # as seen from what the network is shown
    flat = torch.ones(1, side, side, device=device)
    middle = F.pad(flat[:, :2, :2], [side // 2 - 1] * 4)  # no single pixel is in the middle
    scores, correct, progress, start = {}, [], data.Progress(), time.monotonic()
    for images, labels, *_ in batches.epoch(0, resolution):
        maps = cam(images, labels if target == "actual" else None, (side, side))
        maps["chance: a flat map"] = flat.expand(len(images), -1, -1)
        maps["a point at the centre"] = middle.expand(len(images), -1, -1)
        done = sum(map(len, correct))
        for name, heat in maps.items():
            scores.setdefault(name, []).append(measure(heat, boxes[done:done + len(images)]).cpu())
        correct.append((cam.logits.argmax(1) == labels).cpu())
        if progress.due():
            rate = (done + len(images)) / (time.monotonic() - start)
            progress.show(f"Grad-CAM of {done + len(images):,} of {len(indices):,} images, {rate:,.0f} images/s, "
                          f"{(len(indices) - done - len(images)) / rate:,.0f} s to go")
    return table({name: torch.cat(parts) for name, parts in scores.items()}, torch.cat(correct), target)


def table(scores, correct, target):
    """Markdown from {row: (N, 2) scores} and which of the N predictions are correct, (N,) bool."""
    groups = {"all": torch.ones_like(correct), "correct": correct, "wrong": ~correct}
    lines = [f"Grad-CAM of the {target} class on {len(correct):,} validation images, {correct.sum():,} of them "
             f"predicted correctly, {(~correct).sum():,} wrongly; in percent:", "",
             "| maps of | pointing game, all | correct | wrong | energy in box, all | correct | wrong |",
             "| --- |" + " ---: |" * 6]
    for name, score in scores.items():
        cells = [f"{100 * score[group, column].mean():.1f}" if group.any() else "-"
                 for column in (0, 1) for group in groups.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def draw(images, maps, titles, heading, path, boxes=None):
    """Writes a PNG: a column per image; a row of images (N, 3, H, W) uint8 and one for each layer of maps (N, H, W)."""
    lines = max(text.count("\n") + 1 for text in titles)
    cell, left, top = 1.5, 0.3 + 0.08 * max(map(len, maps)), 0.4 + 0.15 * lines  # inches
    width, height = left + cell * max(len(images), 4), top + cell * (1 + len(maps))
    figure = plt.figure(figsize=(width, height))
    figure.text(0.1 / width, 1 - 0.1 / height, heading, va="top", fontsize=11, parse_math=False)
    for row, (name, heat) in enumerate({"input": None, **maps}.items()):
        y = 1 - (top + cell * (row + 1)) / height
        label = name if heat is None or heat.any() else f"{name}\n(flat)"  # of a layer with one position, say
        figure.text(0.1 / width, y + cell / 2 / height, label, va="center", fontsize=9)
        for column, image in enumerate(images):
            axis = figure.add_axes(((left + cell * column) / width, y, cell * 0.95 / width, cell * 0.95 / height))
            axis.axis("off")
            if heat is not None:  # on grey, so that all colour is the map's
                axis.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
                axis.imshow(heat[column].cpu().numpy(), cmap="turbo", vmin=0, vmax=1, alpha=0.5)
            else:
                axis.imshow(image.permute(1, 2, 0).numpy())
                axis.set_title(titles[column], fontsize=8, parse_math=False)
            if boxes is not None:
                x0, y0, x1, y1 = (boxes[column] - 0.5).tolist()
                axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a file's name may have letters that the font lacks
        data.save_figure(figure, path)


def maps_of(cam, images, classes, resolution, min_crop):
    """Maps (N, 64, 64) of images (N, 3, 64, 64) uint8: 0 in the margin, which the network is not shown.

    Where classes (N,) is None, those of the predicted classes.
    """
    border = data.margin(min_crop)
    maps = cam(data.for_validation(images, resolution, min_crop), classes, [data.SIZE - 2 * border] * 2)
    return {name: F.pad(heat, [border] * 4) for name, heat in maps.items()}


def title(*lines, width=20, rows=3):
    """Lines of text, each wrapped to so many letters and rows."""
    return "\n".join("\n".join(textwrap.wrap(line, width, max_lines=rows, placeholder=" ...")) for line in lines)


def draw_misclassified(cam, dataset, indices, resolution, min_crop, path, target="predicted", count=10):
    """Draws some images of indices that the network gets wrong, with the maps of one class and the objects' boxes.

    The same ones for either target. Where all are right, draws right ones, and the heading says so.
    """
    device = next(cam.network.parameters()).device
    order = data.shuffled(indices)
    wrong, seen = [], 0
    cam.network.eval()
    for images, labels, *_ in data.Batches(dataset, order, 128, device, False, min_crop).epoch(0, resolution):
        with torch.no_grad():
            missed = (cam.network(images).argmax(1) != labels).cpu()
        wrong += order[seen:seen + len(images)][missed].tolist()
        seen += len(images)
        if len(wrong) >= count:
            break
    chosen = torch.tensor(wrong[:count]) if wrong else order[:count]
    images, labels = dataset.images[chosen], dataset.labels[chosen]
    maps = maps_of(cam, images.to(device), labels.to(device) if target == "actual" else None, resolution, min_crop)
    names = dataset.class_names
    titles = [title(f"predicted: {names[predicted]}", f"actual: {names[label]}")
              for predicted, label in zip(cam.logits.argmax(1).tolist(), labels.tolist())]
    which = "misclassified images" if wrong else "correctly classified images (none is misclassified)"
    draw(images, maps, titles, f"Grad-CAM of the {target} class: {which}", path, dataset.boxes[chosen])


def read_picture(path):
    """A picture file of any size and kind -> (3, 64, 64) uint8: of an animation the first frame. Raises UsageError.

    The shorter side becomes 64 pixels and the middle of the longer one is kept: to squash the whole picture into a
    square would change its shapes, and shapes are what the network has learned. Transparent parts become white.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of pictures above 89 megapixels; above twice that it refuses
            with Image.open(path) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                    picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
                square = ImageOps.fit(picture.convert("RGBA"), (data.SIZE, data.SIZE), Image.Resampling.BILINEAR)
                white = Image.new("RGBA", square.size, "white")
                return pil_to_tensor(Image.alpha_composite(white, square).convert("RGB"))
    except Exception as error:  # each file format is a plugin of Pillow's, with exceptions of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{path}: not a picture that can be read: {' '.join(reason.split())}") from error


def draw_pictures(cam, files, class_names, resolution, min_crop, path):
    """Prints the five likeliest classes of each picture, and draws the maps of the likeliest."""
    device = next(cam.network.parameters()).device
    images = torch.stack([read_picture(file) for file in files])
    maps = maps_of(cam, images.to(device), None, resolution, min_crop)
    titles = []
    for file, probabilities in zip(files, cam.logits.softmax(1)):
        best = probabilities.topk(min(5, len(class_names)))
        file = os.fsencode(file).decode(errors="replace")  # a name need not be UTF-8
        print(file)
        for probability, label in zip(best.values.tolist(), best.indices.tolist()):
            print(f"{100 * probability:7.1f} %  {class_names[label]}")
        titles.append(title(Path(file).name, f"{class_names[best.indices[0]]}: {100 * best.values[0]:.0f} %"))
    draw(images, maps, titles, "Grad-CAM of the predicted class", path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main():
    parser = argparse.ArgumentParser(description="Shows which part of an image spoke for a class.")
    parser.add_argument("run", type=Path, help="folder of a run of train.py, whose last.pt is taken, or a checkpoint: "
                        "its best.pt, say")
    parser.add_argument("pictures", nargs="*", help="your own pictures, at most 20, instead of validation images")
    parser.add_argument("--evaluate", action="store_true", help="measure the maps against the boxes, over the whole "
                        "validation set")
    parser.add_argument("--layers", help="by name, as layer3,layer4.1.conv2; by default layer1 and all that follow")
    parser.add_argument("--target", choices=("predicted", "actual"), default="predicted",
                        help="the class to explain: the predicted one shows why the network erred, the actual one what "
                        "it saw of the right answer")
    parser.add_argument("--data-dir", help="where the data set is; by default where the run had it")
    parser.add_argument("--device", default="auto", help="auto takes CUDA, else MPS, else the CPU")
    parser.add_argument("--out", type=Path, help="the picture's file; by default in the run's folder, named after the "
                        "flags, so that the report keeps its own")
    args = parser.parse_intermixed_args()  # pictures may stand before and after flags
    if len(args.pictures) > 20:
        parser.error(f"{len(args.pictures)} pictures: at most 20 at once")
    if args.pictures and (args.evaluate or args.target == "actual"):
        parser.error("of your own pictures only the predicted class is known: no --evaluate, no --target actual")
    if args.evaluate and args.out:
        parser.error("--evaluate prints a table and writes no picture: leave out --out")
    try:
        run(args)
    except (data.DataError, UsageError, OSError) as error:
        print(f"gradcam.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not model.memory_is_full(error):
            raise
        print("gradcam.py: the memory is full: close other programs, or try --device cpu", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args):
    file = args.run if args.run.is_file() else args.run / "last.pt"
    checkpoint = model.load_checkpoint(file)
    network = model.restore(checkpoint, file, model.choose_device(args.device))
    cam = GradCAM(network, args.layers.split(",") if args.layers else None)
    config, history = checkpoint["config"], checkpoint["history"]
    resolution = history[-1]["resolution"] if history else config["resolutions"][0]  # the one it was last trained at
    min_crop = config["min_crop"]
    if args.pictures:
        out = args.out or file.parent / "pictures.png"
        draw_pictures(cam, args.pictures, checkpoint["classes"], resolution, min_crop, out)
        print(f"wrote {out}")
        return
    data_dir = args.data_dir or config["data_dir"]
    dataset = data.load(config["dataset"], data_dir, config["seed"], config["classes"])
    if dataset.class_names != checkpoint["classes"]:
        raise UsageError(f"{file}: trained on other classes than {data_dir} holds: name the right one with --data-dir")
    indices = data.split(dataset, config["split"], config["seed"])[1]
    if args.evaluate:
        print(evaluate(cam, dataset, indices, resolution, min_crop, args.target))
    else:
        parts = ["gradcam", file.stem.removeprefix("last"), args.layers, args.target.removeprefix("predicted")]
        out = args.out or file.parent / ("-".join(filter(None, parts)) + ".png")  # gradcam.png alone is the report's
        draw_misclassified(cam, dataset, indices, resolution, min_crop, out, args.target)
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
