"""Grad-CAM: which part of an image supports a class; as a picture, and measured against boxes.

    python gradcam.py runs/shapes-resnet18                     # misclassified validation images
    python gradcam.py runs/shapes-resnet18 --target actual     # what supported the right class?
    python gradcam.py runs/tiny-imagenet-resnet18 *.jpg        # your own pictures, of any size
    python gradcam.py runs/tiny-imagenet-resnet18 --evaluate   # are the maps on the objects?

The first two write gradcam-predicted.png and gradcam-actual.png into the run's folder; the third
prints the five most probable classes of each picture and draws ten in pictures.png.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) asks how much the score of a class would grow if
a feature map were stronger. That gradient, averaged over positions, is the weight of the map. The
weighted sum of all maps of a layer, where it is positive, shows what supports the class.
"""
import argparse
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import model
from data import UsageError, plt


class GradCAM:
    """maps = GradCAM(network, ["layer3", "layer4"])(images, classes)

    layers: names from network.named_modules() whose outputs are (N, C, h, w); the default is
    layer1, layer2, ... dtype: for the convolutions.
    images (N, 3, H, W) float, classes (N,) int64, by default the predicted ones -> {layer: maps
    (N, *size) in [0, 1]}, each scaled by itself; 0 everywhere if it is flat. size: by default H, W.
    `logits` (N, classes) holds the output of the last call.

    Puts the network into eval mode. Works on frozen weights and inside no_grad.
    """

    def __init__(self, network, layers=None, dtype=torch.float32):
        self.network, self.dtype, self.logits = network, dtype, None
        layers = layers or [name for name, _ in network.named_children() if "layer" in name]
        self.layers = {name: network.get_submodule(name) for name in layers}

    def __call__(self, images, classes=None, size=None):
        features = {}  # layer -> (N, C, h, w)

        def hook(layer, inputs, output):
            features[layer] = output
            return output.clone()  # the next layer may overwrite its input: ReLU(inplace=True)

        handles = [layer.register_forward_hook(hook) for layer in self.layers.values()]
        try:
            # enable_grad and requires_grad_: a graph also inside no_grad, and with frozen weights.
            with torch.enable_grad():
                images = images.detach().requires_grad_()
                logits = model.forward(self.network.eval(), images, self.dtype)
                classes = logits.argmax(1) if classes is None else classes
                # Summing is safe: each score depends on its own image only. In fp16, gradients
                # would become 0 without the factor; it does not change the scaled maps.
                score = 1024 * logits.gather(1, classes[:, None]).sum()
        finally:
            for handle in handles:
                handle.remove()
        self.logits = logits.detach()
        gradients = torch.autograd.grad(score, [features[layer] for layer in self.layers.values()])
        return {name: combine(features[layer].detach().float(), gradient.float(),
                              size or images.shape[2:])
                for (name, layer), gradient in zip(self.layers.items(), gradients)}


def combine(features, gradient, size):
    """Grad-CAM's formula: features and gradient (N, C, h, w) -> maps (N, *size) in [0, 1]."""
    weights = gradient.mean((2, 3), keepdim=True)                       # (N, C, 1, 1)
    maps = (weights * features).sum(1, keepdim=True).relu()             # (N, 1, h, w)
    maps = maps - maps.amin((2, 3), keepdim=True)
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-30)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]


# --------------------------------------------------------------------------------------------------
# Is the map on the object?


def pointing_game(maps, boxes):
    """Is the maximum of the map in the box? Maps (N, H, W), boxes (N, 4): x0, y0, x1, y1 -> (N,).

    If several pixels share the maximum, the fraction of them (Zhang et al. 2016, arXiv:1608.00507).
    A flat map gets the fraction of the image that the box covers.
    """
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)                        # each (N, 1)
    row, column = (torch.arange(side, device=maps.device) for side in maps.shape[1:])
    inside = ((row >= y0) & (row < y1))[:, :, None] & ((column >= x0) & (column < x1))[:, None]
    top = maps == maps.amax((1, 2), keepdim=True)
    return (top & inside).sum((1, 2)) / top.sum((1, 2))


def evaluate(cam, batches, resolution, target="predicted"):
    """Returns a Markdown table: the pointing game for each layer, a flat map, a central point.

    Raises UsageError for a data set without boxes.
    """
    if batches.dataset.boxes is None:
        raise UsageError("--evaluate needs bounding boxes, which a folder of pictures lacks")
    side = batches.dataset.images.shape[-1]
    flat = torch.ones(1, side, side)
    centre = F.pad(flat[:, :2, :2], [side // 2 - 1] * 4)  # ones on the central four pixels
    scores, correct, progress = [], [], data.Progress()
    for images, labels, *_, indices in batches.epoch(0, resolution):
        maps = cam(images, labels if target == "actual" else None, (side, side))
        maps |= {"a flat map": flat, "a point at the centre": centre}
        boxes = batches.dataset.boxes[indices]
        scores.append(torch.stack([pointing_game(heat.cpu(), boxes) for heat in maps.values()]))
        correct.append((cam.logits.argmax(1) == labels).cpu())
        progress.show(f"Grad-CAM {len(correct) / len(batches):4.0%}")
    correct = torch.cat(correct)
    lines = [f"Pointing game: is the maximum of the {target} class's map in the object's box? In "
             f"percent of {len(correct):,} validation images, of which {correct.sum():,} are "
             "classified correctly:", "",
             "| map | all | correct | wrong |", "| --- | ---: | ---: | ---: |"]
    for name, score in zip(maps, 100 * torch.cat(scores, dim=1)):
        cells = [f"{score[group].mean():.1f}" if group.any() else "-"
                 for group in (torch.ones_like(correct), correct, ~correct)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(images, maps, titles, heading, path, boxes=None):
    """Writes a PNG: a column for each image (N, 3, H, W) uint8, a row for each layer of maps."""
    cell = min(3, max(1.6, 8 / len(images)))  # inches
    figure, axes = plt.subplots(1 + len(maps), len(images), squeeze=False, layout="constrained",
                                figsize=(cell * len(images) + 1.2, cell * (1 + len(maps)) + 1))
    legend = "Red supports the class most, blue least; each map is scaled by itself."
    figure.suptitle("\n".join(textwrap.fill(line, int(16 * cell * len(images)))
                              for line in (heading, legend)), fontsize=10)
    for (name, heat), row in zip({"input": None, **maps}.items(), axes):
        row[0].set_ylabel(name)
        for column, axis in enumerate(row):
            axis.set(xticks=[], yticks=[])
            if heat is None:
                axis.imshow(images[column].permute(1, 2, 0).numpy())
                axis.set_title(titles[column], fontsize=8)
            else:
                axis.imshow(images[column].float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
                axis.imshow(heat[column].cpu().numpy(), cmap="turbo", vmin=0, vmax=1, alpha=0.5)
            if boxes is not None:
                data.draw_box(axis, boxes[column], "white")
    data.save_figure(figure, path)


def wrap(*lines, width=22):
    """Wraps each of several lines of a title."""
    return "\n".join(textwrap.fill(line, width, max_lines=3, placeholder=" ...") for line in lines)


def draw_misclassified(cam, batches, resolution, path, target="predicted", count=10):
    """Draws misclassified images (correct ones if there are no others), with maps."""
    dataset, names, wrong = batches.dataset, batches.dataset.class_names, []
    batches = replace(batches, indices=data.shuffled(batches.indices))
    for images, labels, *_, indices in batches.epoch(0, resolution):
        with torch.no_grad():
            predicted = model.forward(cam.network.eval(), images, cam.dtype).argmax(1)
        wrong += indices[(predicted != labels).cpu()].tolist()
        if len(wrong) >= count:
            break
    chosen = torch.tensor(wrong or batches.indices.tolist())[:count]
    batches = replace(batches, indices=chosen, batch_size=count)
    images, labels, *_, indices = next(batches.epoch(0, resolution))
    pixels = dataset.images[indices]
    maps = cam(images, labels if target == "actual" else None, pixels.shape[2:])
    titles = [wrap(f"predicted: {names[guess]}", f"actual: {names[label]}")
              for guess, label in zip(cam.logits.argmax(1).tolist(), labels.tolist())]
    kind = "misclassified" if wrong else "correctly classified"
    heading, boxes = f"Grad-CAM of the {target} class: {kind} validation images", dataset.boxes
    if boxes is not None:
        heading, boxes = f"{heading} and their objects' boxes", boxes[indices]
    draw(pixels.cpu(), maps, titles, heading, path, boxes)


def draw_pictures(cam, files, checkpoint, device, path):
    """Prints the five most probable classes of each picture; draws the maps of the first ten."""
    names, config = checkpoint["classes"], checkpoint["config"]
    images, _, errors = data.decode(files, checkpoint["size"])
    for error in errors.values():
        print(f"skipped {error}", file=sys.stderr)
    kept = [index for index in range(len(files)) if index not in errors]
    if not kept:
        raise UsageError("none of the pictures can be read: choose others")
    images, drawn, titles = data.centre(images[kept], config["min_crop"]), {}, []
    for part in images.split(10):
        maps = cam(data.prepare(part.to(device), config["resolutions"][-1]), size=part.shape[2:])
        drawn = drawn or maps
        for probabilities in cam.logits.softmax(1):
            best, labels = (part.tolist() for part in probabilities.topk(min(5, len(names))))
            file = files[kept[len(titles)]]
            print(file, *(f"{probability:9.1%}  {names[label]}"
                          for probability, label in zip(best, labels)), sep="\n")
            titles.append(wrap(file.name, f"{names[labels[0]]}: {best[0]:.0%}"))
    draw(images[:10], drawn, titles, "Grad-CAM of the predicted class", path)


# --------------------------------------------------------------------------------------------------
# The command


def main():
    parser = argparse.ArgumentParser(description="Shows which part of an image supports a class.")
    add = parser.add_argument
    add("run", type=Path, help="folder of a run of train.py, or one of its checkpoints")
    add("pictures", nargs="*", type=Path, help="your own instead of validation images")
    add("--evaluate", action="store_true", help="measure the maps against the objects' boxes")
    add("--target", choices=("predicted", "actual"), default="predicted", help="predicted")
    add("--data-dir", help="folder of the data set: where the run found it")
    add("--device", default="auto", help="cuda, mps or cpu: a GPU if there is one")
    add("--out", type=Path, help="the picture: a file in the run's folder")
    args = parser.parse_intermixed_args()  # flags may stand between pictures
    if args.pictures and (args.evaluate or args.target == "actual"):
        raise UsageError("--evaluate and --target actual need the images' classes, which are not "
                         "known of your own pictures: leave out the flags, or the pictures")

    file = args.run if args.run.is_file() else args.run / "last.pt"
    checkpoint = model.load_checkpoint(file)
    config, resolution = checkpoint["config"], checkpoint["config"]["resolutions"][-1]
    device = model.choose_device(args.device)
    dtype = model.choose_dtype(config["precision"], device)
    cam = GradCAM(model.restore(checkpoint, device), dtype=dtype)
    if args.pictures:
        out = args.out or file.parent / "pictures.png"
        draw_pictures(cam, args.pictures, checkpoint, device, out)
        print(f"wrote {out}")
        return
    data_dir = args.data_dir or config["data_dir"]
    dataset = data.load(config["dataset"], data_dir, config["seed"], config["classes"],
                        checkpoint["size"])
    data.require_same(dataset, checkpoint, data_dir)
    _, indices = data.split(dataset, config["split"], config["seed"])
    dataset = data.validation_view(dataset, config["min_crop"])
    batches = data.Batches(dataset, indices, 128, device)
    if args.evaluate:
        print(evaluate(cam, batches, resolution, args.target))
    else:
        out = args.out or file.parent / f"gradcam-{args.target}.png"
        draw_misclassified(cam, batches, resolution, out, args.target)
        print(f"wrote {out}")


if __name__ == "__main__":
    data.run_command(main)
