"""Trains a network and reports on it: python train.py, and everything is in runs/tiny-imagenet-resnet18/report.md.

    python train.py                                   # Tiny ImageNet, 70/30 split, ResNet18, 50 epochs
    python train.py --dataset shapes                  # no download: the whole road in minutes, also on a laptop's CPU
    python train.py --resume runs/tiny-imagenet-resnet18
    torchrun --nproc_per_node=4 train.py              # several GPUs of one machine
    python train.py --find-lr                         # which peak learning rate? find-lr.png
    python train.py --benchmark                       # images/s of these flags on this machine, and where the time goes

prints a line per epoch (loss and accuracy on the training and the validation images) and writes into the run's folder
history.csv, last.pt, best.pt, curves.png, misclassified.png, gradcam.png and report.md. With --stem-stride 4 (two
processes, two CPU cores, fp32) 50 epochs took 6 h 48 min and ended at 51.4 % of the validation images; the shapes take
three minutes, and end at 99 %.
"""
import argparse
import csv
import datetime
import itertools
import math
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import ticker

import data
import gradcam
import model
from model import UsageError

# What differs between the data sets. The epochs are shared out evenly among the resolutions: small images train several
# times as fast, and cost no accuracy in the end (Howard 2018, "Training Imagenet in 3 hours for USD 25; and CIFAR10 for
# USD 0.26", fast.ai). How many points of accuracy a default gained in short runs (ten classes, 30 epochs of 32 pixels,
# two seeds; the table is in README.md; less than two points may be chance):
#   crops +5.7; growing images +0.5; CutMix +0.4, and it halves overfitting; label smoothing +0.5; weight decay -0.1;
#   a peak learning rate of 0.1 instead of 0.05 +1.2, instead of 0.2 -0.1; stem stride 2 instead of 4 0.0.
# Batches of 256 were 1.8 worse there than batches of 128, as they left only 480 steps; 50 epochs of all classes have
# 15,050. The shapes have half the peak learning rate: with 0.1 they ended anywhere between 93 and 98 %, with 0.05 above
# 99 %.
RECIPES = {
    "tiny-imagenet": {"epochs": 50, "resolutions": [32, 48, 64], "stem_stride": 2, "batch_size": 256, "max_lr": 0.1,
                      "min_crop": 0.35, "cutmix": 0.5},
    "shapes": {"epochs": 3, "resolutions": [48, 64], "stem_stride": 4, "batch_size": 64, "max_lr": 0.05,
               "min_crop": 1.0, "cutmix": 0.0},
}
PCT_START = 0.2  # of the steps the learning rate rises; a long way down does more for the result than a long way up
NOT_OF_THE_RUN = ("resume", "out", "device", "benchmark", "find_lr")  # flags that a checkpoint does not keep


# ---------------------------------------------------------------------------------------------------------------------
# The schedule, the loss, the optimizer


def one_cycle(step, total_steps, max_lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4, anneal="cos",
              base_momentum=0.85, max_momentum=0.95):
    """Learning rate and momentum at a step, 0 ... total_steps - 1, as torch.optim.lr_scheduler.OneCycleLR has them.

    Up from max_lr / div_factor to max_lr during the first pct_start of the steps, then down to almost nothing; momentum
    goes the other way, so that the two together do not overshoot (Smith & Topin 2017, "Super-Convergence",
    arXiv:1708.07120). A function of the step alone: a resumed run needs no scheduler state.
    anneal: "cos" or "linear". Equal base_momentum and max_momentum leave the momentum constant.
    """
    first_lr = max_lr / div_factor
    peak = pct_start * total_steps - 1  # the step at which the learning rate is highest; need not be a whole number
    if step <= peak:
        progress = step / peak if peak > 0 else 1.0
        lr, momentum = (first_lr, max_lr), (max_momentum, base_momentum)
    else:
        progress = (step - peak) / (total_steps - 1 - peak)
        lr, momentum = (max_lr, first_lr / final_div_factor), (base_momentum, max_momentum)
    if anneal == "cos":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return tuple(start + (end - start) * progress for start, end in (lr, momentum))


def smoothed_nll_loss(log_probabilities, labels, others, share, smoothing):
    """NLLLoss with label smoothing for images of which a part may come from another image; the batch's mean.

    log_probabilities (N, classes). The target of an image is share (N,) of its own label, labels (N,), and the rest of
    the other image's, others (N,): see data.cut_mix. Of this target the part smoothing is spread evenly over all
    classes, so that the network is not rewarded for becoming ever more certain (Szegedy et al. 2015, arXiv:1512.00567).
    """
    loss = share * F.nll_loss(log_probabilities, labels, reduction="none") \
        + (1 - share) * F.nll_loss(log_probabilities, others, reduction="none")
    return ((1 - smoothing) * loss - smoothing * log_probabilities.mean(dim=1)).mean()


def make_optimizer(network, weight_decay):
    """SGD with Nesterov momentum; the learning rate and the momentum are set before each step.

    Weight decay is for the weights of convolutions and of the linear layer. BatchNorm's scales and shifts and the
    biases, which have one dimension, get none: shrinking them is not known to reduce overfitting (He et al. 2018,
    arXiv:1812.01187, "no bias decay").
    """
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # fused: one pass over the weights instead of one per operation.
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
    for parameter in network.parameters():
        # Where GradScaler skips the very first step, fused SGD would take memory that nobody wrote for the momentum.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def choose_dtype(precision, device):
    """The type in which convolutions compute: what was asked for, else the lowest that the device computes natively.

    bf16 is emulated, slowly, by CPUs without instructions for it and by GPUs before Ampere; a T4, say, has fp16. What
    MPS, or a CPU that does not run Linux, computes natively is not asked: fp32.
    Raises UsageError for fp16 on MPS, where most releases of PyTorch forget to undo GradScaler's scale.
    """
    if precision == "fp16" and device.type == "mps":
        raise UsageError("--precision fp16: not on MPS: take bf16 or fp32")
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            major = torch.cuda.get_device_capability(device)[0]
            precision = "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
        elif device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
            flags = Path("/proc/cpuinfo").read_text()
            precision = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


# ---------------------------------------------------------------------------------------------------------------------
# One step, one epoch, one validation


class Learner(NamedTuple):
    """A network and what trains it."""
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # in which convolutions compute


def forward(network, images, dtype):
    """Log-probabilities (N, classes) float32; only what is inside the network runs in dtype."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = network(images)
    return F.log_softmax(logits.float(), dim=1)


def train_step(learner, batch, smoothing, lr, momentum):
    """One step of gradient descent on a batch of data.Batches. Returns tally(...) of it."""
    network, optimizer, scaler, dtype = learner
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = lr, momentum
    images, labels, others, share = batch
    log_probabilities = forward(network, images, dtype)
    loss = smoothed_nll_loss(log_probabilities, labels, others, share, smoothing)
    optimizer.zero_grad()
    scaler.scale(loss).backward()  # fp16 gradients would vanish below 6e-8; the scaler lifts them, and skips overflows
    scaler.step(optimizer)
    scaler.update()
    return tally(log_probabilities.detach(), labels)


def tally(log_probabilities, labels):
    """(3,) on the device: summed loss without label smoothing, number of right answers, number of images.

    Of images with a patch of another one, only their own label counts.
    """
    right = (log_probabilities.argmax(dim=1) == labels).sum()
    count = torch.full_like(right, len(labels))
    return torch.stack([F.nll_loss(log_probabilities, labels, reduction="sum"), right, count])


def summarise(totals):
    """Mean loss and accuracy from summed tallies, over all processes."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, right, count = totals.tolist()
    return loss / count, right / count


def train_epoch(learner, batches, args, epoch, progress):
    """One pass over the training images. Returns the mean loss and accuracy, and the last learning rate.

    Raises UsageError as soon as a loss that is not a number is seen.
    """
    learner.network.train()
    resolution, start = resolution_at(epoch, args), time.monotonic()
    totals = torch.zeros(3, device=batches.device)
    for index, batch in enumerate(batches.epoch(epoch, resolution)):
        lr, momentum = one_cycle((epoch - 1) * len(batches) + index, args.epochs * len(batches), args.max_lr, PCT_START)
        totals += train_step(learner, batch, args.label_smoothing, lr, momentum)
        # Reading totals waits for the device, so it is read once a second, and at the end.
        if progress.due() or index == len(batches) - 1:
            loss, _, count = totals.tolist()
            if not math.isfinite(loss):
                raise UsageError(f"the loss is {loss / count} in epoch {epoch}, near step {index} of {len(batches)}, "
                                 f"at learning rate {lr:.3g}: try --max-lr {args.max_lr / 10:g} or --precision fp32")
            done, seconds = (index + 1) / len(batches), time.monotonic() - start
            rate = done * len(batches.indices) / seconds
            progress.show(f"epoch {epoch:2}  {done:4.0%}  {rate:,.0f} images/s at {resolution} pixels  "
                          f"loss {loss / count:.3f}  {clock(time_left(args, epoch, done, seconds))} left")
    return *summarise(totals), lr


@torch.no_grad()
def evaluate(network, batches, resolution, dtype, progress, mirror=False):
    """Mean loss and accuracy, and of each image (of this process) the predicted class and its probability.

    mirror: take the mean of what the network makes of each image and of its mirror image.
    """
    network.eval()
    totals, predictions = torch.zeros(3, device=batches.device), []
    for index, (images, labels, *_) in enumerate(batches.epoch(0, resolution)):
        log_probabilities = forward(network, images, dtype)
        if mirror:
            mirrored = forward(network, images.flip(3), dtype)
            log_probabilities = torch.logaddexp(log_probabilities, mirrored) - math.log(2)
        totals += tally(log_probabilities, labels)
        predictions.append(log_probabilities.max(dim=1))
        if progress.due():
            progress.show(f"validating  {(index + 1) / len(batches):4.0%}")
    confidence, predicted = (torch.cat(column).cpu() for column in zip(*predictions))
    return *summarise(totals), predicted, confidence.exp()


def resolution_at(epoch, args):
    """The side in pixels of the training images in an epoch, 1 ... epochs; the last epoch has the last resolution."""
    return args.resolutions[math.ceil(epoch * len(args.resolutions) / args.epochs) - 1]


def time_left(args, epoch, done, seconds):
    """Seconds until the last step, when the share done of this epoch took seconds: an image costs by its pixels."""
    costs = [resolution_at(e, args)**2 for e in range(epoch, args.epochs + 1)]
    return seconds / done * (sum(costs) / costs[0] - done)


def clock(seconds):
    return datetime.timedelta(seconds=int(seconds))  # printed as 6:48:05


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves in its folder


def write_history(history, path):
    with data.replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def draw_curves(history, path):
    """Loss, accuracy and learning rate against the epoch."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 15 else None
    lines = {"Loss": {"train_loss": "training (augmented)", "val_loss": "validation"},
             "Accuracy": {"train_accuracy": "training (augmented)", "val_accuracy": "validation"},
             "Learning rate": {"lr": "at the end of the epoch"}}
    for axis, (title, columns) in zip(axes, lines.items()):
        for column, label in columns.items():
            axis.plot(epochs, [row[column] for row in history], marker=marker, label=label)
        for before, row in zip(history, history[1:]):
            if row["resolution"] != before["resolution"]:
                axis.axvline(row["epoch"] - 0.5, color="0.4", linestyle=":")
        axis.set(title=title, xlabel="epoch")
        axis.legend()
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes[1].yaxis.set_major_formatter(ticker.PercentFormatter(1))
    resolutions = list(dict.fromkeys(row["resolution"] for row in history))
    if len(resolutions) > 1:
        figure.suptitle(f"Dotted: the images grow ({', '.join(map(str, resolutions))} pixels)", fontsize=10)
    data.save_figure(figure, path)


def draw_misclassified(dataset, indices, predicted, confidence, path, count=25):
    """A grid of wrongly classified images, drawn at random: what they are, what they were taken for, how surely."""
    order = data.shuffled(torch.arange(len(indices)))  # in the order of gradcam.draw_misclassified
    wrong = order[(predicted != dataset.labels[indices])[order]][:count]
    columns = 5
    rows = max(1, math.ceil(len(wrong) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, wrong.tolist()):
        axis.imshow(dataset.images[indices[i]].permute(1, 2, 0).numpy())
        axis.set_title(gradcam.title(f"is {dataset.class_names[dataset.labels[indices[i]]]}",
                                     f"taken for {dataset.class_names[predicted[i]]} ({confidence[i]:.0%})",
                                     width=30, rows=2), fontsize=8, parse_math=False)
    if not len(wrong):
        figure.suptitle("Every validation image is classified correctly.")
    data.save_figure(figure, path)


def summarise_result(history, plain, mirrored):
    """Markdown: how well it went. plain: accuracy on training images without augmentation; mirrored: on the validation
    images and their mirror images.
    """
    last, best = history[-1], max(history, key=lambda row: row["val_accuracy"])
    time_taken = clock(sum(row["seconds"] for row in history))
    gap = plain - last["val_accuracy"]
    verdict = "The network overfits little: longer training or less augmentation may still gain."
    if gap > 0.1:
        verdict = "The network overfits: more images or stronger augmentation should help."
    return f"""**{last["val_accuracy"]:.2%} validation accuracy** after {last["epoch"]} epochs ({time_taken} h). The
best epoch, {best["epoch"]}, had {best["val_accuracy"]:.2%}; it was chosen on the validation images, so the final figure
is the fair one. With the mean over each image and its mirror image: {mirrored:.2%}.

On training images without augmentation the network is right in {plain:.2%} of cases, {100 * gap:+.1f} points against
the validation images; on augmented ones in {last["train_accuracy"]:.2%}. {verdict}"""


def tabulate_settings(args, hardware, network, dataset, val):
    """Markdown: what was done, on what, with what."""
    stem = f", stem stride {args.stem_stride}" if args.model == "resnet18" else ""
    parameters = sum(p.numel() for p in network.parameters())
    return f"""| | |
| --- | --- |
| command | `{args.command}` |
| split | {args.split}: {len(dataset.labels) - len(val):,} training images, {len(val):,} validation images |
| network | {args.model}{stem}, {parameters:,} parameters, {len(dataset.class_names)} classes |
| images | resolutions {args.resolutions}, crops from {args.min_crop:.0%} of the area, CutMix on {args.cutmix:.0%} |
| training | batches of {args.batch_size}, OneCycle to {args.max_lr:g}, weight decay {args.weight_decay:g} |
| | label smoothing {args.label_smoothing:g}, seed {args.seed}, on {hardware} |"""


def tabulate_classes(names, labels, predicted):
    """Markdown: the classes that are recognised best and worst, and those most often taken for one another."""
    cells = torch.bincount(labels * len(names) + predicted, minlength=len(names)**2)
    confusion = cells.view(len(names), len(names))  # [actual, predicted]
    accuracy = confusion.diag() / confusion.sum(dim=1).clamp(min=1)
    order = accuracy.argsort(descending=True, stable=True).tolist()
    lines = ["## Classes", "", "| best | accuracy | worst | accuracy |", "| --- | ---: | --- | ---: |"]
    for best, worst in list(zip(order, reversed(order)))[:min(10, len(names) // 2)]:
        lines.append(f"| {names[best]} | {accuracy[best]:.1%} | {names[worst]} | {accuracy[worst]:.1%} |")
    lines += ["", "## Most frequent confusions", "", "| actual | predicted | images |", "| --- | --- | ---: |"]
    counts, cells = confusion.fill_diagonal_(0).flatten().topk(min(10, len(names)))
    for count, cell in zip(counts.tolist(), cells.tolist()):
        if count:
            lines.append(f"| {names[cell // len(names)]} | {names[cell % len(names)]} | {count} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# How much of the time is training, and how much is the rest


def endless(batches, resolution):
    """Batches of one epoch after the other."""
    return itertools.chain.from_iterable(batches.epoch(epoch, resolution) for epoch in itertools.count(1))


def benchmark(learner, batches, args, rounds=7):
    """Compares the real loop with bare steps on one batch that is on the device, in turn, at each resolution."""
    def synchronised(work):
        start = time.perf_counter()
        work()
        if batches.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def loop(source, count):
        for _, batch in zip(range(count), source):
            train_step(learner, batch, args.label_smoothing, args.max_lr, 0.9)

    network, optimizer, scaler, dtype = learner
    network.train()
    progress = data.Progress()
    print(f"{'resolution':>10} {'bare steps':>14} {'real loop':>14} {'loses':>7}    of a step: "
          "data, forward, backward, optimizer", flush=True)
    for resolution in sorted(set(args.resolutions)):
        bare, real, stages = [], [], []
        resident = next(batches.epoch(1, resolution))
        images, *targets = resident
        loss = lambda: smoothed_nll_loss(forward(network, images, dtype), *targets, args.label_smoothing)
        loop([resident] * 2, 2)  # what is done once, at the start, is not part of a step
        steps = max(1, min(round(1 / max(synchronised(lambda: loop([resident] * 2, 2)) / 2, 1e-3)), len(batches)))
        for number in range(rounds):
            progress.show(f"{resolution} pixels, round {number + 1} of {rounds}")
            bare.append(synchronised(lambda: loop([resident] * steps, steps)))
            real.append(synchronised(lambda: loop(batches.epoch(1, resolution), steps)))
            results, source = [], endless(batches, resolution)
            synchronised(lambda: next(source))  # what is done once an epoch is not part of a step
            optimizer.zero_grad()
            stages.append([
                synchronised(lambda: next(source)),
                synchronised(lambda: results.append(loss())),
                synchronised(lambda: scaler.scale(results[0]).backward()),
                synchronised(lambda: (scaler.step(optimizer), scaler.update()))])
        seconds = [statistics.median(column) for column in zip(*stages)]
        loses = 1 - statistics.median(b / r for b, r in zip(bare, real))
        rates = (f"{steps * len(images) / statistics.median(times):9,.0f} img/s" for times in (bare, real))
        print(f"{resolution:10}", *rates, f"{loses:7.1%}   ", ", ".join(f"{s / sum(seconds):.0%}" for s in seconds),
              flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Which learning rate?


def find_lr(learner, batches, args, path, steps=100):
    """The learning-rate range test (Smith 2015, arXiv:1506.01186): the rate grows from step to step, and the loss tells
    from which rate on the network learns, and from which on it breaks. Draws the loss into path, suggests a --max-lr.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--out {path}: with --find-lr this is the picture's file, in a folder that is there")
    learner.network.train()
    rates, losses, lowest = [], [], math.inf
    for step, batch in zip(range(steps), endless(batches, args.resolutions[0])):
        rates.append(10 ** (-3 + 4 * step / (steps - 1)))  # 0.001 ... 10
        # 0.85 is the momentum that goes with the peak of one_cycle.
        loss, _, count = train_step(learner, batch, args.label_smoothing, rates[-1], 0.85).tolist()
        if not math.isfinite(loss):
            break
        losses.append(loss / count)
        print(f"step {step + 1:3} of {steps}: learning rate {rates[-1]:8.4f}, loss {losses[-1]:.3f}", flush=True)
        recent = statistics.mean(losses[-11:])
        lowest = min(lowest, recent)
        if step > 10 and recent > 1.02 * lowest:  # broken; what comes then says nothing about learning
            break
    if not losses:
        raise UsageError("the loss of the very first step is not a number: try --precision fp32")
    # The mean of five steps on either side: one that looked back only would find the minimum too late.
    losses = F.avg_pool1d(torch.tensor([losses]), 11, 1, 5, count_include_pad=False)[0].tolist()
    rates = rates[:len(losses)]
    best = rates[losses.index(min(losses))]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.semilogx(rates, losses)
    axis.axvline(best, color="tab:green", linestyle="--", label=f"lowest loss: {best:.2g}")
    axis.axvline(args.max_lr, color="tab:grey", linestyle=":", label=f"--max-lr {args.max_lr:g}")
    axis.set(title=f"Learning-rate range test, batches of {args.batch_size}", xlabel="learning rate",
             ylabel="training loss, mean of eleven steps")
    axis.set_ylim(top=min(1.02 * max(losses), 1.2 * losses[0]))
    axis.grid(alpha=0.3)
    axis.legend()
    data.save_figure(figure, path)
    fall = 1 - min(losses) / losses[0]
    print(f"The loss is lowest at {best:.2g}: try a --max-lr between that and five times that. A network that has\n"
          "learned for a while bears more than its first steps show, and OneCycle takes its time to the peak")
    if fall < 0.03:  # a data set with hard beginnings, as the shapes: the curve is mostly noise
        print(f"But it has fallen by {fall:.1%} only: trust it no more than the picture")
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def make_parser():
    parser = argparse.ArgumentParser(description="Trains a network on Tiny ImageNet and reports on it.")
    add = parser.add_argument
    add("--dataset", choices=RECIPES, default="tiny-imagenet", help="the assignment's; shapes needs no download")
    add("--data-dir", default="data", help="where Tiny ImageNet is, or is downloaded to")
    add("--split", choices=("70-30", "official"), default="70-30",
        help="70-30 is the assignment's; official (100,000/10,000) is what papers report")
    add("--classes", type=int, help="train on the first so many classes only: 20, with --stem-stride 4, take a CPU an "
        "hour or two")
    add("--model", choices=model.MODELS, default="resnet18", help="resnet18, the faster of the two with a stem "
        "stride of 4 or 2")
    add("--stem-stride", type=int, choices=(4, 2, 1),
        help="of ResNet18: 2 keeps four times the positions of the original's 4, which was made for images of 224 "
             "pixels; 4 is three to four times as fast, the choice for a CPU; 1 is four times slower (shapes: 4)")
    add("--resolutions", type=int, nargs="+", metavar="PIXELS",
        help="image sides, sharing the epochs evenly: 32 48 64, because small images train several times as fast, and "
             "the last ones decide (shapes: 48 64)")
    add("--epochs", type=int, help="50, as the assignment asks (shapes: 3)")
    add("--batch-size", type=int, help="of all processes together: 256 keeps a GPU busy and is small enough for SGD to "
        "generalise (shapes: 64, as its epochs are short)")
    add("--max-lr", type=float, help="peak of OneCycle: 0.1; in short runs half of it was worse and twice no better "
        "(shapes: 0.05, as their batches are smaller)")
    add("--weight-decay", type=float, default=5e-4, help="5e-4, the usual value for SGD on small images")
    add("--label-smoothing", type=float, default=0.1, help="0.1, as the paper that introduced it has it")
    add("--min-crop", type=float, help="smallest area of a training image's crop: 0.35 of the image's (shapes: 1, for "
        "a shape is recognised by all its parts)")
    add("--cutmix", type=float, help="share of the training images that get a patch of another one, and of its label: "
        "0.5 (shapes: 0)")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto",
        help="auto takes the lowest that the device computes natively (fp32 on MPS, and on CPUs that do not run Linux)")
    add("--seed", type=int, default=0, help="of the split, the weights, the augmentation and the shapes: the same "
        "seed repeats a run, another one shows how much is chance")
    add("--device", default="auto", help="auto takes CUDA, else MPS, else the CPU")
    add("--out", help="the run's folder: a new one, runs/DATASET-MODEL, so that no run overwrites another; with "
        "--find-lr the picture's file")
    add("--resume", metavar="DIR", help="go on after the last finished epoch of the run in this folder, with its flags "
        "except --device")
    add("--compile", action="store_true", help="let torch.compile fuse operations, after a minute of compiling: it "
        "needs a C++ compiler (a GPU: Triton), on two CPU cores it gained nothing, on a GPU it is worth a try")
    add("--find-lr", action="store_true", help="instead of training, draw the loss against a growing learning rate")
    add("--benchmark", action="store_true", help="instead of training, measure the speed of these flags")
    return parser


def parse_arguments():
    """The flags, completed from the data set's recipe or from the run to be resumed, and that run's checkpoint or None.

    Raises UsageError for values that cannot work.
    """
    parser = make_parser()
    args = parser.parse_args()
    checkpoint = None
    if args.resume:
        if args.out:
            raise UsageError(f"--out {args.out}: a resumed run goes on in its own folder: leave the flag out")
        checkpoint = model.load_checkpoint(Path(args.resume) / "last.pt")
        parser.set_defaults(**checkpoint["config"])
        args = parser.parse_args()  # once more: the run's flags are the defaults now
        for key, value in checkpoint["config"].items():
            if getattr(args, key) != value and key != "data_dir":
                raise UsageError(f"--resume {args.resume}: the run has --{key.replace('_', '-')} {value}, and a part "
                                 "of a run cannot have another: leave the flag out, or start a new run")
    else:
        for key, value in RECIPES[args.dataset].items():
            if getattr(args, key) is None:
                setattr(args, key, value)
        processes = os.environ.get("WORLD_SIZE")
        launcher = ["torchrun", f"--nproc_per_node={processes}"] if processes else ["python"]
        args.command = shlex.join([*launcher, "train.py", *sys.argv[1:]])
    limits = {"epochs": (1, 10**6), "batch_size": (1, 10**6), "classes": (2, 10**6), "max_lr": (1e-12, 1e6),
              "weight_decay": (0, 1), "label_smoothing": (0, 0.999), "min_crop": (0.01, 1), "cutmix": (0, 1),
              "seed": (0, 2**31)}
    for key, (low, high) in limits.items():
        value = getattr(args, key)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{key.replace('_', '-')} {value}: must be at least {low:g} and at most {high:g}")
    if not 22 <= min(args.resolutions) <= max(args.resolutions) <= 1024:
        raise UsageError(f"--resolutions {args.resolutions}: must be at least 22 and at most 1024 pixels")
    return args, checkpoint


def start_processes(device_name):
    """This process's rank, how many there are, and its device; torchrun tells through the environment."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = model.choose_device(device_name, os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and device.type == "mps":
        raise UsageError("torchrun: several processes cannot share MPS: add --device cpu")
    if world_size > 1:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(hours=3))  # the first process may have to download
    return rank, world_size, device


def open_folder(args):
    """The run's folder: that of the run to be resumed, or a new one, since no run overwrites another."""
    if args.resume:
        folder = Path(args.resume)
        for leftover in folder.glob(".*.[0-9]*"):  # what a killed process was writing; see data.replacing
            leftover.unlink()
        return folder
    default = Path("runs") / f"{args.dataset}-{args.model}"
    for number in itertools.count(1):
        folder = Path(args.out or (default if number == 1 else f"{default}-{number}"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.exists():
                raise UsageError(f"--out {folder}: leads through a broken link: name another folder") from None
            if args.out and folder.is_dir() and not any(folder.iterdir()):
                return folder
            if args.out:
                raise UsageError(f"--out {folder}: is there already: name another folder, or --resume it") from None
        except OSError as error:
            raise UsageError(f"--out {folder}: {error.strerror}: name another folder") from error


def load_data(args, rank, world_size):
    """The data set, and the indices of its training and validation images. Raises UsageError."""
    if rank > 0:
        dist.barrier()  # the first process downloads, decodes and caches; the others wait, and find the cache
    dataset = data.load(args.dataset, args.data_dir, args.seed, args.classes)
    if world_size > 1 and rank == 0:
        dist.barrier()
    train, val = data.split(dataset, args.split, args.seed)
    if not len(val):
        raise UsageError(f"--split {args.split}: leaves no image of {dataset.name} for validation")
    smallest = len(train) // math.ceil(len(train) / args.batch_size)  # of the batches that data.Batches makes
    if args.batch_size > len(train) or smallest < 2 * world_size:
        raise UsageError(f"--batch-size {args.batch_size}: must be at most {len(train)}, the number of training "
                         "images, and leave each process two images of every batch")
    return dataset, train, val


def start_or_resume(args, checkpoint, classes, device, dtype):
    """A Learner and its history (a list of rows), new or the checkpoint's. Raises UsageError."""
    torch.manual_seed(args.seed)
    source = Path(args.resume or ".") / "last.pt"
    if checkpoint and checkpoint["classes"] != classes:
        raise UsageError(f"{source}: trained on {len(checkpoint['classes'])} classes that are not the {len(classes)} "
                         f"of {args.dataset}: give the --data-dir it was trained on")
    if checkpoint:
        network = model.restore(checkpoint, source, device)
    else:
        network = model.place(model.create(args.model, len(classes), args.stem_stride), device)
    optimizer = make_optimizer(network, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    learner = Learner(network, optimizer, scaler, dtype)
    if checkpoint is None:
        return learner, []
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():
            # Fused SGD needs both in one order in memory, and on MPS a run has another than elsewhere (model.place).
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        if checkpoint["scaler"]:  # empty without fp16
            scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{source}: its optimizer does not fit its network ({error}): start a new run") from error
    return learner, checkpoint["history"]


def run(args, checkpoint):
    """Trains, or measures what is to be measured."""
    rank, world_size, device = start_processes(args.device)
    if world_size > 1 and (args.benchmark or args.find_lr):
        raise UsageError("--benchmark and --find-lr measure a single process: start them without torchrun")
    say = print if rank == 0 else lambda *_, **__: None
    # Kernels that give the same sums in the same order: resuming ends bit for bit where the whole run ends.
    torch.backends.cudnn.deterministic = True
    dataset, train, val = load_data(args, rank, world_size)
    dtype = choose_dtype(args.precision, device)
    learner, history = start_or_resume(args, checkpoint, dataset.class_names, device, dtype)
    if args.compile:
        learner.network.compile()
    batches = data.Batches(dataset, train, args.batch_size, device, True, args.min_crop, args.cutmix, args.seed, rank,
                           world_size)
    val_batches = data.Batches(dataset, val, args.batch_size, device, False, args.min_crop, rank=rank,
                               world_size=world_size)
    hardware = f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type} in {dtype}"
    if world_size > 1:
        hardware += f", {world_size} processes"
    say(f"{args.model} on {dataset.name}: {len(train):,} images to train on, {len(val):,} to validate, on {hardware}")
    if args.benchmark:
        return benchmark(learner, batches, args)
    if args.find_lr:
        return find_lr(learner, batches, args, Path(args.out or "find-lr.png"))

    if device.type != "cpu":
        rehearse(learner, batches, args)
    folder = open_folder(args) if rank == 0 else None  # only the first process writes
    again = "python" if world_size == 1 else f"torchrun --nproc_per_node={world_size}"
    again += f" train.py --resume {shlex.quote(str(folder))}"
    if args.device != "auto":
        again += f" --device {args.device}"
    say(f"what comes of it is in {folder}")
    try:
        fit(learner, batches, val_batches, history, args, folder, dataset.class_names)
        if world_size > 1:
            dist.destroy_process_group()
        if rank == 0:
            finish(learner, dataset, train, val, history, args, folder, hardware)
    except KeyboardInterrupt:
        say(f"\nstopped; to go on: {again}", file=sys.stderr)
        raise
    except data.DataError as error:  # the disk is full, say; what is in the folder is still whole
        raise data.DataError(f"{error}; then {again}") from error


def rehearse(learner, batches, args):
    """One batch of the largest images, there and back: if memory is short, that shows now and not in a late epoch.

    Leaves no trace: in eval mode BatchNorm does not update its averages, and the gradients are thrown away.
    """
    learner.network.eval()
    images, labels, *_ = next(batches.epoch(1, max(args.resolutions)))
    # .forward: to call the network would compile it (--compile), for a mode and a size that come to nothing.
    F.nll_loss(forward(learner.network.forward, images, learner.dtype), labels).backward()
    learner.optimizer.zero_grad()


def fit(learner, batches, val_batches, history, args, folder, class_names):
    """The epochs that history does not have yet; adds a row to it for each. Without a folder it writes nothing."""
    progress, device = data.Progress(quiet=folder is None), batches.device
    replica = learner  # its network shares the weights, and its gradients with the other processes
    if dist.is_initialized():
        replica = learner._replace(network=torch.nn.parallel.DistributedDataParallel(
            learner.network, [device.index] if device.type == "cuda" else None))
    if folder and not args.resume:
        keep(folder / "last.pt", learner, history, args, class_names)  # from here on the run can be resumed
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, resolution = time.monotonic(), resolution_at(epoch, args)
        train_loss, train_accuracy, lr = train_epoch(replica, batches, args, epoch, progress)
        # At the resolution of the training images: at another one, the borders, which the convolutions pad with zeros,
        # lie elsewhere. Trained at 32 pixels, a network had 31 % at 32, 22 % at 36 and 24 % at 40 pixels.
        val_loss, val_accuracy, *_ = evaluate(replica.network, val_batches, resolution, learner.dtype, progress)
        seconds = round(time.monotonic() - start, 2)
        history.append({"epoch": epoch, "resolution": resolution, "lr": lr, "train_loss": train_loss,
                        "train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy,
                        "seconds": seconds})
        if folder is None:
            continue
        print(f"epoch {epoch:2}/{args.epochs}  {resolution} pixels  train loss {train_loss:.3f}, accuracy "
              f"{train_accuracy:6.2%}  validation loss {val_loss:.3f}, accuracy {val_accuracy:6.2%}  {seconds:.0f} s",
              flush=True)
        # last.pt comes last: a run that is killed in between repeats the epoch, and writes the same again.
        if val_accuracy > max((row["val_accuracy"] for row in history[:-1]), default=-1):
            keep(folder / "best.pt", learner, history, args, class_names)
        write_history(history, folder / "history.csv")
        if seconds > 30:  # drawing takes a second; finish() draws the curves of fast runs
            draw_curves(history, folder / "curves.png")
        keep(folder / "last.pt", learner, history, args, class_names)


def keep(path, learner, history, args, class_names):
    """Writes a checkpoint for model.load_checkpoint."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_OF_THE_RUN}
    with data.replacing(path) as temporary:
        torch.save({"format": model.FORMAT, "config": config, "classes": class_names, "epoch": len(history),
                    "history": history, "model": learner.network.state_dict(),
                    "optimizer": learner.optimizer.state_dict(), "scaler": learner.scaler.state_dict()}, temporary)


def finish(learner, dataset, train, val, history, args, folder, hardware):
    """The pictures and the report of a run whose last epoch is over."""
    network, resolution, progress = learner.network, args.resolutions[-1], data.Progress()

    def look(indices, mirror=False):
        device = next(network.parameters()).device
        batches = data.Batches(dataset, indices, args.batch_size, device, False, args.min_crop)
        return evaluate(network, batches, resolution, learner.dtype, progress, mirror)

    _, _, predicted, confidence = look(val)
    _, mirrored, *_ = look(val, mirror=True)
    _, plain, *_ = look(data.shuffled(train)[:10_000])  # without augmentation: what has been learned by heart
    draw_curves(history, folder / "curves.png")
    draw_misclassified(dataset, val, predicted, confidence, folder / "misclassified.png")
    cam = gradcam.GradCAM(network)
    gradcam.draw_misclassified(cam, dataset, val, resolution, args.min_crop, folder / "gradcam.png")
    maps = gradcam.evaluate(cam, dataset, data.shuffled(val)[:1000], resolution, args.min_crop)
    report = [f"# {args.model} on {dataset.name}",
              summarise_result(history, plain, mirrored),
              tabulate_settings(args, hardware, network, dataset, val),
              "![Loss, accuracy and learning rate](curves.png)",
              tabulate_classes(dataset.class_names, dataset.labels[val], predicted),
              "## Misclassified validation images", "![Misclassified images](misclassified.png)",
              "## Grad-CAM: does the network look at the object?", maps,
              f"The whole validation set: `python gradcam.py {shlex.quote(str(folder))} --evaluate`.",
              "What was evidence for the predicted class: red most, dark blue least, each map scaled by itself. The "
              "frame is the object's box.", "![What spoke for the wrong class](gradcam.png)"]
    with data.replacing(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(report) + "\n", encoding="utf-8")
    print(f"{history[-1]['val_accuracy']:.2%} validation accuracy; the report is {folder / 'report.md'}")


def interrupt(number, frame):
    raise KeyboardInterrupt(number)


def main():
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        args, checkpoint = parse_arguments()
        run(args, checkpoint)
    except (UsageError, data.DataError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not model.memory_is_full(error):
            raise
        print("train.py: the memory is full: start anew with a smaller --batch-size, or --stem-stride 4",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        sys.exit(128 + error.args[0])


if __name__ == "__main__":
    main()
