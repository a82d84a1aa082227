"""Trains a network on Tiny ImageNet and reports on it.

    python train.py --dataset shapes                  # no download: the full pipeline in minutes
    python train.py --epochs 50                       # Tiny ImageNet: 61.1 %, 6 minutes on an H100
    python train.py --dataset folder --data-dir photos --weights runs/tiny-imagenet-resnet18
    python train.py --resume runs/tiny-imagenet-resnet18
    torchrun --nproc_per_node=4 train.py              # several GPUs

prints a row for each epoch and writes into runs/tiny-imagenet-resnet18, or a similar new folder:
report.md and its pictures, classes.csv, history.csv, and the checkpoint last.pt.
"""
import argparse
import csv
import datetime
import itertools
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# On a busy CPU, OpenMP's threads that spin while they wait make training several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import gradcam
import model
from data import UsageError, plt

# The defaults of each data set; what each ingredient is worth: assets/measurements.md. Several
# resolutions share the epochs equally: small images train faster on a CPU (Howard 2018, fast.ai).
RECIPES = {
    "tiny-imagenet": {"epochs": 50, "resolutions": [64], "stem_stride": 1,
                      "batch_size": 256, "max_lr": 0.2, "min_crop": 0.35, "cutmix": 0.25},
    "shapes": {"epochs": 3, "resolutions": [48, 64], "stem_stride": 4,
               "batch_size": 64, "max_lr": 0.05, "min_crop": 1.0, "cutmix": 0.0},
    "folder": {"epochs": 50, "resolutions": [32, 32, 32, 32, 64], "stem_stride": 4,
               "batch_size": 32, "max_lr": 0.05, "min_crop": 0.35, "cutmix": 0.25},
}
# Of tiny-imagenet on a CPU.
CPU_RECIPE = {"resolutions": [32, 48, 64], "stem_stride": 4, "max_lr": 0.1, "cutmix": 0.5}
NOT_SAVED = ("resume", "out", "device")  # flags that may differ on resuming


# --------------------------------------------------------------------------------------------------
# The schedule, the loss, the optimizer


def one_cycle(step, total_steps, max_lr, pct_start=0.2):
    """Learning rate and momentum at a step, 0 ... total_steps - 1.

    As torch.optim.lr_scheduler.OneCycleLR: a cosine from max_lr / 25 up to max_lr in pct_start of
    the steps, then a cosine down to almost 0. The momentum goes from 0.95 to 0.85 and back (Smith &
    Topin 2017, "Super-Convergence", arXiv:1708.07120). It has no state, so resuming needs none.
    """
    peak = pct_start * total_steps - 1
    if step < peak:
        progress, start, end = step / peak, (max_lr / 25, 0.95), (max_lr, 0.85)
    else:
        progress = (step - peak) / (total_steps - 1 - peak)
        start, end = (max_lr, 0.85), (max_lr / 25 / 1e4, 0.95)
    cosine = (1 - math.cos(math.pi * progress)) / 2
    return tuple(a + (b - a) * cosine for a, b in zip(start, end))


def smoothed_nll_loss(log_probabilities, labels, others, own, smoothing):
    """NLLLoss, averaged over the batch, with label smoothing and the two labels of CutMix.

    -(1 - smoothing) * (own * log p[label] + (1 - own) * log p[other]) - smoothing * mean(log p)

    log_probabilities (N, classes); labels, others (N,) int64; own (N,): see data.cut_mix. Label
    smoothing spreads a part of the target evenly over all classes (Szegedy et al. 2015,
    arXiv:1512.00567).
    """
    loss = (own * F.nll_loss(log_probabilities, labels, reduction="none")
            + (1 - own) * F.nll_loss(log_probabilities, others, reduction="none"))
    return ((1 - smoothing) * loss - smoothing * log_probabilities.mean(dim=1)).mean()


def make_optimizer(network, weight_decay):
    """SGD with Nesterov momentum. No decay for biases and BatchNorm (arXiv:1812.01187).

    one_cycle replaces learning rate and momentum at each step.
    """
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    return torch.optim.SGD([{"params": matrices, "weight_decay": weight_decay},
                            {"params": vectors}], lr=0.1, momentum=0.9, nesterov=True)


# --------------------------------------------------------------------------------------------------
# Training and validation


class Learner(NamedTuple):
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps small gradients above zero in fp16; else does nothing
    dtype: torch.dtype            # of the convolutions


def fit(learner, batches, val_batches, history, args, folder):
    """The training loop: appends a row to history for each epoch up to args.epochs. Writes into
    folder, which is None in all processes but the first.
    """
    network, optimizer, scaler, dtype = learner
    dataset = batches.dataset
    replica = network  # or its wrapper, which averages gradients over processes
    if dist.is_initialized():
        replica = torch.nn.parallel.DistributedDataParallel(network)
    progress = data.Progress(quiet=folder is None)
    if folder:
        print("epoch pixels train_loss train_acc val_loss val_acc val_top5 images/s seconds",
              flush=True)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, resolution = time.monotonic(), resolution_at(epoch, args)
        totals = torch.zeros(4, device=batches.device)
        network.train()
        for index, (images, labels, others, own, _) in enumerate(batches.epoch(epoch, resolution)):
            lr, momentum = one_cycle((epoch - 1) * len(batches) + index,
                                     args.epochs * len(batches), args.max_lr)
            for group in optimizer.param_groups:
                group.update(lr=lr, momentum=momentum)
            log_probabilities = model.forward(replica, images, dtype).log_softmax(1)
            loss = smoothed_nll_loss(log_probabilities, labels, others, own, args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            totals += tally(log_probabilities.detach(), labels)
            if progress.due():
                loss = totals[0] / totals[3]  # reading a number waits for the GPU
                done, seconds = (index + 1) / len(batches), time.monotonic() - start
                speed = (index + 1) * args.batch_size / seconds
                left = seconds / done * (epochs_left(epoch, args) - done)
                progress.show(f"epoch {epoch}/{args.epochs} {done:4.0%}  loss {loss:.3f}  "
                              f"{speed:,.0f} images/s  {datetime.timedelta(0, round(left))} left")

        train_loss, train_accuracy, _ = mean_over_processes(totals)
        if not math.isfinite(train_loss):
            raise UsageError(f"the loss is {train_loss} in epoch {epoch}: try "
                             f"--max-lr {args.max_lr / 10:g}")
        speed = len(batches) * args.batch_size / (time.monotonic() - start)
        # other resolutions cost 7 points or more, because of zero padding
        val_loss, val_accuracy, val_top5, *_ = evaluate(replica, val_batches, resolution, dtype)
        seconds = time.monotonic() - start
        history.append({"epoch": epoch, "resolution": resolution, "lr": lr,
                        "train_loss": train_loss, "train_accuracy": train_accuracy,
                        "val_loss": val_loss, "val_accuracy": val_accuracy, "val_top5": val_top5,
                        "seconds": round(seconds, 2)})
        if not folder:
            continue
        print(f"{epoch:2}/{args.epochs:<2} {resolution:6} {train_loss:10.3f} {train_accuracy:9.2%} "
              f"{val_loss:8.3f} {val_accuracy:7.2%} {val_top5:8.2%} {speed:8,.0f} {seconds:7.0f}",
              flush=True)
        write_rows(folder / "history.csv", history)
        save(folder / "last.pt", learner, history, args, dataset)  # last: completes the epoch


def tally(log_probabilities, labels):
    """(4,) on the device: summed loss, top-1 and top-5 hits of the images' own labels, and number
    of images.
    """
    top = log_probabilities.topk(min(5, log_probabilities.shape[1])).indices
    hits = top == labels[:, None]                                       # (N, 5)
    return torch.stack([F.nll_loss(log_probabilities, labels, reduction="sum"), hits[:, 0].sum(),
                        hits.sum(), torch.ones_like(labels).sum()])


def mean_over_processes(totals):
    """Mean loss, top-1 and top-5 accuracy of summed tallies."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    *sums, count = totals.tolist()
    return [value / count for value in sums]


@torch.no_grad()
def evaluate(network, batches, resolution, dtype):
    """Returns mean loss, top-1 and top-5 accuracy, and this process's predictions and their
    probabilities.
    """
    network.eval()
    totals, predictions = torch.zeros(4, device=batches.device), []
    progress = data.Progress(quiet=batches.rank > 0)
    for images, labels, *_ in batches.epoch(0, resolution):
        log_probabilities = model.forward(network, images, dtype).log_softmax(1)
        totals += tally(log_probabilities, labels)
        predictions.append(log_probabilities.max(dim=1))
        progress.show(f"validating {len(predictions) / len(batches):4.0%}")
    confidence, predicted = (torch.cat(column).cpu() for column in zip(*predictions))
    return *mean_over_processes(totals), predicted, confidence.exp()


def resolution_at(epoch, args):
    """The side of the training images in an epoch, 1 ... epochs."""
    return args.resolutions[math.ceil(epoch * len(args.resolutions) / args.epochs) - 1]


def epochs_left(epoch, args):
    """Remaining epochs, weighted by pixels: the time for an image grows with them."""
    side = resolution_at(epoch, args)
    return sum((resolution_at(later, args) / side)**2 for later in range(epoch, args.epochs + 1))


def config(args):
    return {key: value for key, value in vars(args).items() if key not in NOT_SAVED}


def save(path, learner, history, args, dataset):
    """Writes a checkpoint for model.load_checkpoint."""
    checkpoint = {"classes": dataset.class_names, "digest": dataset.digest,
                  "size": dataset.images.shape[-1], "history": history, "config": config(args),
                  "model": learner.network.state_dict(),
                  "optimizer": learner.optimizer.state_dict(),
                  "scaler": learner.scaler.state_dict()}
    with data.replacing(path) as temporary:
        torch.save(checkpoint, temporary)


# --------------------------------------------------------------------------------------------------
# The report


def write_rows(path, rows):
    with (data.replacing(path) as temporary,
          open(temporary, "w", newline="", encoding="utf-8") as file):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(history, path):
    panels = {"Loss": {"train_loss": "training (augmented)", "val_loss": "validation"},
              "Accuracy": {"train_accuracy": "training (augmented)", "val_accuracy": "validation",
                           "val_top5": "validation, top-5"},
              "Learning rate": {"lr": "at the end of the epoch"}}
    epochs = [row["epoch"] for row in history]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, columns) in zip(axes, panels.items()):
        for column, label in columns.items():
            axis.plot(epochs, [row[column] for row in history], ".-", label=label)
        for row, following in itertools.pairwise(history):
            if row["resolution"] != following["resolution"]:
                axis.axvline(row["epoch"] + 0.5, color="0.4", linestyle=":",
                             label=f"from here {following['resolution']} pixels")
        axis.legend()
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    data.save_figure(figure, path)


def draw_misclassified(dataset, indices, predicted, confidence, path, columns=5):
    """Up to 25 misclassified images of indices, chosen at random."""
    order = data.shuffled(torch.arange(len(indices)))
    wrong = order[(predicted != dataset.labels[indices])[order]][:5 * columns].tolist()
    rows = max(1, math.ceil(len(wrong) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.7 * rows), squeeze=False,
                                layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, wrong):
        axis.imshow(dataset.images[indices[i]].permute(1, 2, 0).cpu().numpy())
        axis.set_title(gradcam.wrap(
            f"actual: {dataset.class_names[dataset.labels[indices[i]]]}",
            f"predicted: {dataset.class_names[predicted[i]]} ({confidence[i]:.0%})"), fontsize=8)
    figure.suptitle(f"{len(wrong)} misclassified validation images")
    data.save_figure(figure, path)


def tabulate_classes(names, train_labels, labels, predicted):
    """Returns a row for each class, and two Markdown tables: classes, best first; confusions."""
    cells = torch.bincount(labels * len(names) + predicted, minlength=len(names)**2)
    confusion = cells.view(len(names), len(names))                      # [actual, predicted]
    counts = zip(names, train_labels.bincount().tolist(), confusion.sum(dim=1).tolist(),
                 (confusion.diag() / confusion.sum(dim=1)).tolist())
    keys = "class", "training_images", "validation_images", "accuracy"
    rows = [dict(zip(keys, row)) for row in counts]
    table = [f"| {name} | {trained} | {validated} | {accuracy:.1%} |"
             for name, trained, validated, accuracy in
             (row.values() for row in sorted(rows, key=lambda row: -row["accuracy"]))]
    if len(table) > 20:
        table[10:-10] = ["| ... | | | |"]
    lines = ["| class | training images | validation images | accuracy |",
             "| --- | ---: | ---: | ---: |", *table, "", "## Most frequent confusions", "",
             "| actual | predicted | images |", "| --- | --- | ---: |"]
    counts, cells = confusion.fill_diagonal_(0).flatten().topk(min(10, len(names)))
    lines += [f"| {names[cell // len(names)]} | {names[cell % len(names)]} | {count} |"
              for count, cell in zip(counts.tolist(), cells.tolist()) if count]
    return rows, "\n".join(lines)


def write_report(learner, batches, val_batches, history, args, folder, hardware):
    network, dtype, resolution = learner.network, learner.dtype, args.resolutions[-1]
    val_batches = replace(val_batches, rank=0, world_size=1)  # all images in this process
    dataset, val_indices = val_batches.dataset, val_batches.indices
    print("writing the report ...", flush=True)
    _, final, top5, predicted, confidence = evaluate(network, val_batches, resolution, dtype)
    sample = replace(val_batches, indices=data.shuffled(batches.indices)[:10_000])
    _, plain, *_ = evaluate(network, sample, resolution, dtype)
    best = max(history, key=lambda row: row["val_accuracy"])
    classes, tables = tabulate_classes(dataset.class_names, dataset.labels[batches.indices],
                                       dataset.labels[val_indices], predicted)
    headline = f"{final:.2%} validation accuracy"
    balanced = sum(row["accuracy"] for row in classes) / len(classes)
    if f"{balanced:.2%}" != f"{final:.2%}":
        headline += f", {balanced:.2%} as the mean over classes"
    draw_curves(history, folder / "curves.png")
    draw_misclassified(dataset, val_indices, predicted, confidence, folder / "misclassified.png")
    cam = gradcam.GradCAM(network, dtype=dtype)
    gradcam.draw_misclassified(cam, val_batches, resolution, folder / "gradcam.png")
    write_rows(folder / "classes.csv", classes)
    took = datetime.timedelta(seconds=round(sum(row["seconds"] for row in history)))
    parameters = sum(p.numel() for p in network.parameters())
    settings = {"hardware": hardware, "parameters": f"{parameters:,}", **config(args)}
    notes = "\n\n".join(filter(None, [settings.pop("recipe"), dataset.notes]))
    settings = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    with data.replacing(folder / "report.md") as temporary:
        temporary.write_text(f"""# {args.model} on {args.dataset}

**{headline}** (top-5 {top5:.2%}) after {args.epochs} epochs in
{took} (h:mm:ss). The best epoch, {best["epoch"]}, has {best["val_accuracy"]:.2%}, but it was chosen
on the validation images.

On training images without augmentation the accuracy is {plain:.2%}, {100 * (plain - final):+.1f}
points against the validation images; with augmentation {history[-1]["train_accuracy"]:.2%}.

{notes}

| setting | value |
| --- | --- |
{settings}

![Loss, accuracy and learning rate](curves.png)

## Classes

{tables}

## Misclassified validation images

![Misclassified images](misclassified.png)

## Grad-CAM

![Grad-CAM of misclassified images](gradcam.png)
""", encoding="utf-8", errors="replace")
    print(f"{headline}; report: {folder / 'report.md'}")


# --------------------------------------------------------------------------------------------------
# The command


def positive(text):
    """For argparse: a whole number, at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def as_flags(recipe):
    return " ".join(f"--{key.replace('_', '-')} {str(value).strip('[]').replace(',', '')}"
                    for key, value in recipe.items())


def parse_arguments():
    """Returns the flags, and the checkpoint to resume from, or None."""
    parser = argparse.ArgumentParser(description="Trains a network and reports on it.")
    add = parser.add_argument
    add("--dataset", choices=RECIPES, default="tiny-imagenet",
        help="tiny-imagenet; the others, and CPUs, have their own defaults: see RECIPES")
    parser.set_defaults(**RECIPES["tiny-imagenet"], recipe="")
    add("--data-dir", type=os.path.abspath, default="data",
        help="folder with tiny-imagenet-200, or with one folder per class: data")
    add("--split", choices=("70-30", "official"), default="70-30", help="70-30")
    add("--classes", type=positive, help="use only the first so many: all")
    add("--model", choices=model.MODELS, default="resnet18", help="resnet18")
    add("--stem-stride", type=int, choices=(4, 2, 1),
        help="ResNet18 shrinks images by this first; 4 is fastest: %(default)s")
    add("--weights", metavar="FILE",
        help="start from a run's weights, or from a state_dict of torchvision's resnet18")
    add("--epochs", type=positive, help="%(default)s")
    add("--resolutions", type=positive, nargs="+", metavar="PIXELS",
        help="image sides, for equal parts of the epochs: %(default)s")
    add("--batch-size", type=positive, help="of all processes together: %(default)s")
    add("--max-lr", type=float, help="peak of OneCycle: %(default)s")
    add("--weight-decay", type=float, default=5e-4, help="0.0005")
    add("--label-smoothing", type=float, default=0.1, help="0.1")
    add("--min-crop", type=float,
        help="smallest area of a random crop, 1 for none: %(default)s")
    add("--cutmix", type=float, help="fraction of patched images: %(default)s")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="of convolutions: 16 bits where they are fast")
    add("--seed", type=int, default=0, help="of split, weights, augmentation and shapes: 0")
    add("--device", default="auto", help="cuda, mps or cpu: a GPU if there is one")
    add("--out", help="new folder of the run: numbered, in runs")
    add("--resume", type=lambda run: Path(run.removesuffix("last.pt")), metavar="RUN",
        help="continue the run in this folder")
    args, checkpoint = parser.parse_args(), None
    command = shlex.join(["python", "train.py", *sys.argv[1:]])
    defaults = RECIPES[args.dataset] | {"command": command}
    if args.resume:
        if args.resume.is_file() or args.out:
            raise UsageError(f"--resume {args.resume}: name only the run's folder, without --out; "
                             "the run continues there, from its last.pt")
        checkpoint = model.load_checkpoint(args.resume / "last.pt")
        defaults = checkpoint["config"]
    elif args.dataset == "tiny-imagenet" and model.choose_device(args.device).type == "cpu":
        note = f"no GPU: the recipe for a CPU, {as_flags(CPU_RECIPE)}; a GPU's would take days"
        defaults |= CPU_RECIPE | {"recipe": note}
    if args.weights and not args.resume:  # a high rate would destroy what they know
        stem_stride = model.read(args.weights).get("config", defaults)["stem_stride"]
        defaults |= {"max_lr": defaults["max_lr"] / 5, "stem_stride": stem_stride}
    parser.set_defaults(**defaults)
    args = parser.parse_args()  # again, with these defaults
    for key, value in defaults.items():
        if checkpoint and getattr(args, key) != value and key != "data_dir":
            raise UsageError(f"--resume: this run has {as_flags({key: value})}, which cannot "
                             "change: leave out the flag, or start a new run")
    return args, checkpoint


def start_processes(device_name):
    """Returns rank, local rank, number of processes, and device."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # torchrun
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = model.choose_device(device_name)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(timeout=datetime.timedelta(hours=3))  # the first may download
    return rank, local_rank, world_size, device


def make_folder(args):
    """Returns a new folder, as no run overwrites another."""
    default = f"runs/{args.dataset}-{args.model}"
    numbered = (f"{default}-{number}" for number in itertools.count(2))
    for folder in map(Path, [args.out] if args.out else itertools.chain([default], numbered)):
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return folder
    raise UsageError(f"--out {args.out}: already exists: choose a new folder, or --resume it")


def main():
    args, checkpoint = parse_arguments()
    history = checkpoint["history"] if checkpoint else []
    if len(history) == args.epochs and (args.resume / "report.md").exists():
        print(f"{args.resume}: all {args.epochs} epochs are done, nothing to train; report: "
              f"{args.resume / 'report.md'}")
        return
    rank, local_rank, world_size, device = start_processes(args.device)
    if local_rank:
        dist.barrier()  # the first process of each machine downloads, decodes and caches
    dataset = data.load(args.dataset, args.data_dir, args.seed, args.classes,
                        size=max(data.SIZE, *args.resolutions))
    if world_size > 1 and not local_rank:
        dist.barrier()
    if checkpoint:
        data.require_same(dataset, checkpoint, args.data_dir)
    train_indices, val_indices = data.split(dataset, args.split, args.seed)
    smallest = 2 * world_size  # BatchNorm needs two images
    if not smallest <= args.batch_size <= len(train_indices) or not len(val_indices):
        raise UsageError(f"--batch-size {args.batch_size} --split {args.split}: there are only "
                         f"{len(train_indices):,} training images and {len(val_indices):,} others: "
                         f"choose batches of {smallest} or more, at most as many, or another split")
    if device.type == "cuda":
        dataset = dataset._replace(images=dataset.images.to(device))  # 1.4 GB

    torch.manual_seed(args.seed)
    dtype = model.choose_dtype(args.precision, device)
    network, start = model.create(args.model, len(dataset.class_names), args.stem_stride), ""
    if args.weights and not checkpoint:
        start = "starting from " + model.load_weights(network, args.weights, dataset.class_names)
    network = model.place(network, device)
    optimizer = make_optimizer(network, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    learner = Learner(network, optimizer, scaler, dtype)
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())

    batches = data.Batches(dataset, train_indices, args.batch_size, device, augment=True,
                           min_crop=args.min_crop, cutmix=args.cutmix, seed=args.seed, rank=rank,
                           world_size=world_size)
    val_batches = replace(batches, dataset=data.validation_view(dataset, args.min_crop),
                          indices=val_indices, augment=False)
    folder = None
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        hardware = f"{world_size} x {name}, {dtype}".replace("torch.", "")
        folder = args.resume or make_folder(args)
        print(*filter(None, [args.recipe, dataset.notes, start]),
              f"{args.model} on {args.dataset}: {len(train_indices):,} training images, "
              f"{len(val_indices):,} validation images; {hardware}",
              f"writing to {folder}; to continue it later: --resume "
              f"{shlex.quote(folder.as_posix())}", sep="\n", flush=True)
        if not checkpoint:
            save(folder / "last.pt", learner, history, args, dataset)
    fit(learner, batches, val_batches, history, args, folder)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        write_report(learner, batches, val_batches, history, args, folder, hardware)


if __name__ == "__main__":
    data.run_command(main)
