"""The tests: python test_all.py, without a download, in one to two minutes on two cores.

    python test_all.py Networks Training.test_curves_show_the_history    # some of them
"""
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from unittest import mock

import train  # first: it sets OMP_WAIT_POLICY
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import functional as TF

import coco_analysis
import data
import gradcam
import model
from kmeans import iou, kmeans, plain_kmeans

HERE = Path(__file__).parent
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # how the camera was held


def call(module, *arguments):
    """Runs a script's command in this process: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            data.run_command(module.main)
        except SystemExit as error:
            code = error.code
    return code, out.getvalue(), err.getvalue()


class Commands(unittest.TestCase):

    def assertRefused(self, result, *words):
        """Exit code 2, and one line with the words."""
        code, _, err = result
        lines = [line for line in err.splitlines() if ".py: " in line]  # the rest is progress
        self.assertEqual((code, len(lines)), (2, 1), err)
        for word in words:
            self.assertIn(str(word), lines[0])


class InFolder(Commands):

    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(contextlib.chdir(folder))


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, check_dtype=False)


def resnet():
    """A ResNet18 with random BatchNorms, so that no two channels are alike."""
    torch.manual_seed(0)
    network = model.ResNet18(10, stem_stride=4).eval()
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and name != "fc.bias":
            tensor.uniform_(0.5, 1.5)
    return network


def save_checkpoint(path, **flags):
    config = {"dataset": "shapes", "data_dir": "data", "split": "70-30", "model": "resnet18",
              "stem_stride": 4, "resolutions": [32, 16], "min_crop": 0.35, "classes": None,
              "seed": 0, "precision": "fp32"}
    torch.save({"config": config | flags, "model": resnet().state_dict(), "digest": "", "size": 64,
                "classes": list(data.SHAPES)}, path)


def pictures():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


class Networks(unittest.TestCase):

    def test_resnet18_is_torchvisions(self):
        for stride in (4, 2, 1):
            torch.manual_seed(0)
            theirs = torchvision.models.resnet18(num_classes=200)
            torch.manual_seed(0)
            ours = model.create("resnet18", 200, stride)
            close(ours.state_dict(), theirs.state_dict(), atol=0)
            if stride != 4:
                theirs.maxpool = torch.nn.Identity()
                theirs.conv1.stride = (stride, stride)
            images = torch.randn(4, 3, 64, 64)
            for training in (True, False):
                close(ours.train(training)(images), theirs.train(training)(images), atol=1e-4)

    def test_the_table_has_the_published_numbers(self):
        imagenet = call(model, "--stem-stride", 4, "--image-size", 224, "--num-classes", 1000)[1]
        for words in ("ResNet18: 11,689,512 parameters, 1,814 million",  # torchvision: 1.81 GFLOPS
                      "ResNet18: 11,279,112 parameters",
                      "CustomResNet: 4,106,952 parameters",
                      "layer1.pooled.0 +128 x 64 x 64 +73,856 +5 +301,989,888\n",
                      "avgpool +512 x 1 x 1 +0 +whole image +0\n"):
            self.assertRegex(imagenet + call(model)[1], words)

    def test_a_custom_layer_adds_its_paths(self):
        layer, images = model.CustomLayer(3, 8).eval(), pictures()
        close(layer(images), layer.pooled(images) + layer.strided(images))

    def test_receptive_fields_are_where_the_gradient_is_not_zero(self):
        table = call(model, "--stem-stride", 4)[1]
        for network, layer, depth in ((model.ResNet18(10, 4), "layer4.1.bn2", 8),
                                      (model.CustomResNet(10), "layer3.pooled.2", 4)):
            images = torch.randn(8, 3, 32, 512, requires_grad=True)
            features = torch.nn.Sequential(*list(network.eval().children())[:depth])(images)
            middle = features.shape[-1] // 2
            gradient, = torch.autograd.grad(features[..., middle].sum(), images)
            field = (gradient != 0).any(dim=(0, 1, 2)).sum()
            self.assertRegex(table, rf"\n{layer} .* {field} +0\n")

    def test_cuda_computes_in_half_precision(self):
        for bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
            with mock.patch.object(torch.cuda, "is_bf16_supported", return_value=bf16):
                self.assertEqual(model.choose_dtype("auto", torch.device("cuda")), expected)


class Checkpoints(InFolder):

    def test_a_checkpoint_returns_the_network_and_damaged_or_foreign_ones_are_refused(self):
        save_checkpoint("good.pt")
        good = model.load_checkpoint("good.pt")
        close(model.restore(good)(pictures()), resnet()(pictures()))
        torch.save(good["model"], "foreign.pt")
        torch.save({**good, "model": functools.partial(os.mkdir, "executed")}, "code.pt")
        Path("half.pt").write_bytes(Path("good.pt").read_bytes()[:9999])
        for name in ("foreign", "code", "half", "missing"):
            with self.assertRaisesRegex(data.UsageError, f"{name}.pt"):
                model.load_checkpoint(f"{name}.pt")
        self.assertFalse(Path("executed").exists())

    def test_weights_of_a_run_start_a_network_of_other_classes(self):
        save_checkpoint("last.pt")
        network = model.create("resnet18", 10, 4)
        own = {f"fc.{name}": p.clone() for name, p in network.fc.named_parameters()}
        self.assertEqual(model.load_weights(network, "last.pt", list("abcdefghij")),
                         "the weights of last.pt, all layers but the last")
        close(network.state_dict(), resnet().state_dict() | own)
        torch.save(torchvision.models.resnet34().state_dict(), "resnet34.pt")
        with self.assertRaisesRegex(data.UsageError, "--weights resnet34.pt: .*layer1.2.*"
                                    ": choose weights of the same network"):
            model.load_weights(network, "resnet34.pt", [])


class Schedule(unittest.TestCase):

    def test_one_cycle_is_torchs_at_every_step(self):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.35, 97, pct_start=0.2)
        for step in range(97):
            group = optimizer.param_groups[0]
            np.testing.assert_allclose(train.one_cycle(step, 97, 0.35),
                                       (group["lr"], group["momentum"]), rtol=1e-9)
            optimizer.step()
            theirs.step()

    def test_each_resolution_gets_its_part_of_the_epochs(self):
        args = mock.Mock(epochs=50, resolutions=[32, 32, 48])
        sides = [train.resolution_at(epoch, args) for epoch in range(1, 51)]
        self.assertEqual(sides, [32] * 33 + [48] * 17)
        self.assertEqual(train.epochs_left(33, args), 1 + 17 * 9 / 4)  # 9/4 of the pixels


# --------------------------------------------------------------------------------------------------
# Data

WORDS = {"n3": "crane, bird", "n1": "mast, pole", "n2": "German shepherd", "n4": "ice lolly, lolly",
         "n6": "bee", "n5": "alp", "n7": "cliff, drop"}
NAMES = ["mast", "German shepherd", "crane", "ice lolly", "alp", "bee", "cliff"]
COLOURS = torch.cartesian_prod(*[torch.tensor([60, 180])] * 3)[:7]


def write_tree(folder):
    """A Tiny ImageNet of seven classes, each of one colour; every image has a box of its own."""
    rng, annotations = np.random.default_rng(0), ""

    def write(path, number):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = COLOURS[number].numpy() + rng.integers(-40, 40, (64, 64, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)

    for number, wnid in enumerate(WORDS):
        boxes, part = "", folder / "train" / wnid
        for i in range(4):
            write(part / f"images/{wnid}_{i}.JPEG", number)
            boxes += f"{wnid}_{i}.JPEG\t{number}\t{i}\t20\t30\n"
        (part / f"{wnid}_boxes.txt").write_text(boxes)
        for i in range(3):
            write(folder / f"val/images/val_{number}_{i}.JPEG", number)
            annotations += f"val_{number}_{i}.JPEG\t{wnid}\t0\t0\t63\t{40 + i}\n"
    (folder / "val/val_annotations.txt").write_text(annotations)
    (folder / "wnids.txt").write_text("\n".join(WORDS))
    (folder / "words.txt").write_text("\n".join(map("\t".join, WORDS.items())))


def find(dataset, image):
    """The index of an image (H, W, 3) in a data set."""
    equal = dataset.images == torch.tensor(np.array(image)).permute(2, 0, 1)
    return equal.flatten(1).all(1).nonzero().item()


def frame(axis):
    """The box in a picture; the first pixel's centre is at (0, 0)."""
    box, = axis.patches
    return (box.get_bbox().extents + 0.5).tolist()


@contextlib.contextmanager
def drawn_figures(save=lambda figure, path: plt.close(figure)):
    """Yields {file name: figure} of the pictures that would be written meanwhile."""
    figures = {}

    def keep(figure, path):
        figures[Path(path).name] = figure
        save(figure, path)

    with mock.patch.object(data, "save_figure", keep):
        yield figures


class TinyImageNet(InFolder):

    def setUp(self):
        super().setUp()
        self.tree = Path("data/tiny-imagenet-200")
        write_tree(self.tree)

    def test_labels_carry_the_right_names(self):
        dataset, words = data.load(), list(WORDS.values())
        for image, label, box, is_val in zip(*dataset[:4]):
            number = (image.float().mean((1, 2)) - COLOURS).abs().sum(1).argmin()
            self.assertEqual(dataset.class_names[label], words[number].split(",")[0])
            self.assertEqual(box.tolist()[::2], [0, 64] if is_val else [number, 21])

    def test_the_second_start_reads_only_the_cache(self):
        first = data.load()
        shutil.move(self.tree, "elsewhere")
        again = data.load()
        self.assertEqual(again.class_names, NAMES)
        close(list(again[:4]), list(first[:4]), atol=0)
        Path("data", data.CACHE).write_bytes(b"half")
        self.assertRefused(call(data), data.CACHE, "delete it")
        close(data.load(data_dir="elsewhere").images, first.images, atol=0)  # has wnids.txt itself

    def test_a_cache_that_cannot_be_written_is_not_needed(self):
        denied = PermissionError(13, "denied")
        with mock.patch.object(Path, "touch", side_effect=denied), drawn_figures():
            err = call(data)[2]
        self.assertRegex(err, "denied.*data can be .* without a cache")

    def test_an_incomplete_folder_is_named(self):
        jpeg, wnids = self.tree / "train/n2/images/n2_0.JPEG", self.tree / "wnids.txt"
        jpeg.write_bytes(jpeg.read_bytes()[:500])
        self.assertRefused(call(data), self.tree, jpeg.name, "start again")
        wnids.unlink()
        self.assertRefused(call(data), self.tree, wnids.name, "start again")

    def test_the_command_describes_draws_samples_and_exports_boxes(self):
        with drawn_figures() as figures:
            _, out, _ = call(data, "--export-coco", "new/deep/boxes.json")
        self.assertEqual(out.splitlines(), [
            "tiny-imagenet: 49 images of 7 classes",
            "split 70-30: 35 training images, 14 validation images",
            "split official: 28 training images, 21 validation images",
            "wrote new/deep/boxes.json", "wrote samples.png"])
        dataset = data.load()
        for row in np.array(figures["samples.png"].axes).reshape(5, 5):
            for axis in row:
                index = find(dataset, axis.images[0].get_array())
                label = dataset.labels[index]
                self.assertEqual(row[2].get_title(), f"{label}: {NAMES[label]}")
                self.assertEqual(frame(axis), dataset.boxes[index].tolist())
                self.assertFalse(axis.axison)
        coco = json.loads(Path("new/deep/boxes.json").read_text())
        self.assertEqual([image["id"] for image in coco["images"]], [*range(49)])
        self.assertEqual(coco["categories"], [{"id": i, "name": NAMES[i]} for i in range(7)])
        for key, column in (
                ("image_id", range(49)), ("category_id", dataset.labels.tolist()),
                ("bbox", torchvision.ops.box_convert(dataset.boxes, "xyxy", "xywh").tolist())):
            self.assertEqual([box[key] for box in coco["annotations"]], list(column))

    def test_a_download_is_read_and_a_failed_one_leaves_nothing(self):
        class Response(io.FileIO):
            url = length = None

        served = Path(shutil.make_archive("served", "zip", "data"))
        content, archive = served.read_bytes(), Path("data/tiny-imagenet-200.zip")
        shutil.rmtree("data")
        self.enterContext(mock.patch.object(data, "MD5", hashlib.md5(content).hexdigest()))
        self.enterContext(mock.patch("urllib.request.urlopen", lambda _: Response(served)))
        served.unlink()
        self.assertRefused(call(data), "--dataset shapes", archive)
        served.write_bytes(content[:9999])
        self.assertRefused(call(data), "--dataset shapes", archive)
        self.assertEqual(os.listdir("data"), [])
        served.write_bytes(content)
        self.assertIn("49 images of 7 classes", call(data)[1])
        self.assertEqual(sorted(os.listdir("data")), [data.CACHE, archive.name])


class SplitsAndBatches(unittest.TestCase):

    def test_the_split_takes_385_and_165_of_each_class(self):
        number = torch.arange(5500)
        dataset = data.Dataset(None, number % 10, None, number < 500, [""] * 10)
        parts = data.split(dataset, seed=3)
        close(torch.cat(parts).sort().values, number)
        self.assertEqual(dataset.labels[parts[0]].bincount().tolist(), [385] * 10)
        self.assertFalse(parts[0].equal(data.split(dataset, seed=4)[0]))
        close(data.split(dataset, "official"), number.split([500, 5000])[::-1])

    def test_an_epoch_sees_every_image_once_also_in_several_processes(self):
        number = torch.arange(601)  # each image is a class, with pixels of its value
        images = number.byte()[:, None, None, None].expand(-1, 3, 64, 64)
        dataset = data.Dataset(images, number, None, None, [])

        def seen(epoch=1, augment=True, **options):
            batches, found = data.Batches(dataset, number, 100, "cpu", augment, **options), []
            for images, labels, *_ in batches.epoch(epoch, 32):
                close((images[:, 0, 16, 16] * data.STD + data.MEAN) * 255, labels % 256, atol=0.01)
                found += labels.tolist()
            return found

        whole = seen()
        self.assertEqual(len(set(whole)), 600)
        parts = [seen(rank=rank, world_size=3) for rank in range(3)]
        self.assertEqual(sorted(sum(parts, [])), sorted(whole))
        orders = [whole, seen(2), seen(seed=1), seen(0, seed=1)]
        self.assertEqual(len(set(map(str, orders))), 4)
        self.assertEqual(seen(augment=False), number.tolist())

    def test_crops_and_flips_are_torchvisions(self):
        images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
        plain = (images / 255 - 0.44) / 0.28  # as the README says
        close(data.prepare(images, 48), TF.resize(plain, [48, 48], antialias=False), atol=1e-3)
        flipped = data.prepare(images, 64, torch.tensor([[[-1, 0, 0], [0, 0.25, 0.75]]]))
        crop = TF.resized_crop(TF.hflip(plain), 48, 0, 16, 64, [64, 64], antialias=False)
        close(flipped[:, :, 4:], crop[:, :, 4:], atol=1e-3)

    def test_validation_sees_the_centre_as_large_as_the_average_training_crop(self):
        images = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8)
        for min_crop, side in ((0.35, 52), (0.08, 48)):
            close(data.centre(images, min_crop), TF.center_crop(images, side), atol=0)
            theta = data.random_crops(torch.rand(10_000, 5), min_crop)
            area = (theta[:, 0, 0] * theta[:, 1, 1]).abs().mean()
            self.assertAlmostEqual((side / 64)**2, area.item(), delta=0.03)

    def test_crops_have_every_size_and_place_inside_the_image(self):
        theta = data.random_crops(torch.rand(20_000, 5), 0.3)
        size, centre = theta[:, [0, 1], [0, 1]].abs(), theta[:, :, 2].abs()
        self.assertAlmostEqual((theta[:, 0, 0] < 0).float().mean().item(), 0.5, delta=0.02)
        place = (centre / (1 - size))[size < 0.99]  # 0: centre, 1: border
        for values, low, high in ((size.prod(1), 0.3, 1), (size[:, 0] / size[:, 1], 3 / 4, 4 / 3),
                                  (place, 0, 1)):
            found = [values.min(), values.median(), values.max()]
            np.testing.assert_allclose(found, [low, (low + high) / 2, high], atol=0.05)

    def test_cutmix_shares_the_label_as_the_pixels(self):
        labels = torch.arange(200)
        images = labels[:, None, None, None].float().expand(200, 3, 20, 20)
        mixed, others, own = data.cut_mix(images, labels, torch.rand(200, 4), 0.4)
        close(others, labels.flip(0))
        self.assertTrue(((mixed == images) | (mixed == images.flip(0))).all())
        close((mixed == images).float().mean((1, 2, 3)), own)
        self.assertAlmostEqual((own < 1).float().mean().item(), 0.4, delta=0.12)
        quarter = torch.tensor([[0.25, 1, 0.25, 0]] * 200)  # half of it is outside
        close(data.cut_mix(images, labels, quarter, 1)[2], torch.full([200], 7 / 8))

    def test_shapes_are_in_their_boxes_and_repeatable(self):
        dataset = data.shapes(seed=1, per_class=30)
        close(dataset.images, data.shapes(1, 30).images, atol=0)
        self.assertFalse(dataset.images.equal(data.shapes(per_class=30).images))
        for images, _, boxes, *_ in dataset, data.validation_view(dataset, 0.35):
            whole = ((boxes >= 0) & (boxes <= images.shape[-1])).all(1)
            light = torchvision.ops.masks_to_boxes(images[whole].float().mean(1) > 130)
            close(light + torch.tensor([0, 0, 1, 1]), boxes[whole])


# --------------------------------------------------------------------------------------------------
# Training

FLAGS = ("--stem-stride", 4, "--batch-size", 8, "--device", "cpu", "--precision", "fp32")
RUN_FLAGS = (*FLAGS, "--epochs", 2, "--resolutions", 22, 30, "--batch-size", 4, "--max-lr", 0.002,
             "--weight-decay", 0.001, "--label-smoothing", 0.2, "--min-crop", 0.8, "--cutmix", 0.2,
             "--seed", 17)  # learns in seconds, and makes mistakes
RUN = Path("runs/tiny-imagenet-resnet18")


class Training(Commands):
    """The tests share a folder, with the data and a finished run, RUN."""

    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.enterClassContext(contextlib.chdir(folder))
        write_tree(Path("data/tiny-imagenet-200"))
        cls.addClassCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # more change the run
        with (drawn_figures(data.save_figure) as cls.figures,
              mock.patch.object(data.Progress, "due", lambda self: True)):
            code, cls.printed, cls.progress = call(train, *RUN_FLAGS)
        assert code == 0, cls.progress
        cls.checkpoint = model.load_checkpoint(RUN / "last.pt")
        cls.dataset = data.load()
        cls.train, cls.val = data.split(cls.dataset, seed=17)
        with torch.no_grad():
            cls.logits = model.restore(cls.checkpoint)(
                data.prepare(data.centre(cls.dataset.images, 0.8), 30))
        labels = cls.dataset.labels[:, None]
        cls.rank = (cls.logits > cls.logits.gather(1, labels)).sum(1)  # 0: right

    def accuracy(self, part, top=1):
        return (self.rank[part] < top).float().mean().item()

    def test_the_loop_is_torchs_sgd_schedule_and_cross_entropy(self):
        torch.manual_seed(17)
        network, hot = model.place(model.create("resnet18", 7, 4), "cpu"), torch.eye(7)
        batches = data.Batches(self.dataset, self.train, 4, "cpu", True, 0.8, 0.2, 17)
        decayed = [m.weight for m in network.modules()
                   if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        rest = [p for p in network.parameters() if p.ndim == 1]
        optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1e-3}, {"params": rest}],
                                    lr=0.002, nesterov=True, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.002, 16, pct_start=0.2)
        for epoch, side in (1, 22), (2, 30):
            losses, hits = [], []
            for images, labels, others, own, _ in batches.epoch(epoch, side):
                logits = network(images)
                target = torch.lerp(hot[others], hot[labels], own[:, None])
                optimizer.zero_grad()
                F.cross_entropy(logits, target, label_smoothing=0.2).backward()
                optimizer.step()
                rate = scheduler.get_last_lr()[0]
                scheduler.step()
                losses.append(F.cross_entropy(logits, labels).item())
                hits += (logits.argmax(1) == labels).tolist()
            row = list(self.checkpoint["history"][epoch - 1].values())
            np.testing.assert_allclose(
                row[:5], [epoch, side, rate, np.mean(losses), np.mean(hits)], rtol=1e-3)
        close(self.checkpoint["model"], network.state_dict(), atol=1e-3)

    def test_each_epoch_prints_what_was_measured(self):
        lines, rows = self.printed.splitlines(), self.checkpoint["history"]
        self.assertEqual(lines[1:4], [
            "resnet18 on tiny-imagenet: 35 training images, 14 validation images; 1 x cpu, float32",
            f"writing to {RUN}; to continue it later: --resume {RUN}",
            "epoch pixels train_loss train_acc val_loss val_acc val_top5 images/s seconds"])
        for row, line in zip(rows, lines[4:]):
            *shown, speed, _ = line.split()
            self.assertEqual(shown, "{epoch}/2 {resolution} {train_loss:.3f} {train_accuracy:.2%} "
                             "{val_loss:.3f} {val_accuracy:.2%} {val_top5:.2%}"
                             .format(**row).split())
            shown = re.search("epoch {epoch}/2 100%  loss {train_loss:.3f}  (.+) images/s  "
                              "0:00:.. left".format(**row), self.progress)
            for images in speed, shown[1]:  # 32, and seconds include validation
                self.assertGreater((float(images.replace(",", "")) + 0.5) * row["seconds"], 31.9)
        loss = F.cross_entropy(self.logits[self.val], self.dataset.labels[self.val])
        np.testing.assert_allclose(
            list(row.values())[5:8],
            [loss, self.accuracy(self.val), self.accuracy(self.val, top=5)], rtol=1e-3)

    def test_the_report_says_what_can_be_computed_again(self):
        report = (RUN / "report.md").read_text()
        final, plain = self.accuracy(self.val), self.accuracy(self.train)
        last = self.checkpoint["history"][-1]
        for words in (f"# resnet18 on tiny-imagenet\n\n**{final:.2%} validation accuracy** (top-5 "
                      f"{self.accuracy(self.val, top=5):.2%}) after 2 epochs in\n",
                      f"without augmentation the accuracy is {plain:.2%}, "
                      f"{100 * (plain - final):+.1f}\npoints against the validation images; with "
                      f"augmentation {last['train_accuracy']:.2%}.\n\nno GPU: the recipe",
                      "| --- | --- |\n| hardware | 1 x cpu, float32 |\n| parameters | 11,180,103 |",
                      "| command | python train.py --stem-stride 4 "):
            self.assertIn(words, report)
        self.assertEqual(re.findall(r"!\[.+\]\((.*)\)", report), [*self.figures])
        self.assertIn(f"\n{final:.2%} validation accuracy; report: {RUN}/report.md", self.printed)
        classes = (RUN / "classes.csv").read_text()
        self.assertIn("class,training_images,validation_images,accuracy\n", classes)
        for name, mine in zip(NAMES, self.val.view(7, 2)):
            self.assertIn(f"| {name} | 5 | 2 | {self.accuracy(mine):.1%} |", report)
            self.assertIn(f"\n{name},5,2,{self.accuracy(mine)}\n", classes)

    def test_classes_are_listed_the_best_first_and_confusions(self):
        many = torch.arange(30)
        labels = torch.cat([many, torch.tensor([29])])
        _, table = train.tabulate_classes([*map(str, many.tolist())], many.repeat(3), labels,
                                          labels % 25)
        rows = [f"| {i} | 3 | 1 | {100 * (i < 25)}.0% |" for i in range(29)]
        self.assertIn("\n".join([*rows[:10], "| ... | | | |", *rows[20:], "| 29 | 3 | 2 | 0.0% |"]),
                      table)
        self.assertIn("| actual | predicted | images |\n| --- | --- | ---: |\n| 29 | 4 | 2 |",
                      table)

    def test_curves_show_the_history(self):
        rows = np.genfromtxt(RUN / "history.csv", delimiter=",", names=True)
        columns = (["train_loss", "val_loss"], ["train_accuracy", "val_accuracy", "val_top5"],
                   ["lr"])
        for axis, columns in zip(self.figures["curves.png"].axes, columns):
            *lines, change = axis.lines
            self.assertEqual((change.get_label(), *change.get_xdata()),
                             ("from here 30 pixels", 1.5, 1.5))
            for line, column in zip(lines, columns, strict=True):
                np.testing.assert_allclose(line.get_data(), [rows["epoch"], rows[column]])
                self.assertTrue(line.get_label().startswith(
                    {"train": "training", "val": "validation"}.get(column.split("_")[0], "at ")))

    def test_misclassified_images_carry_their_names(self):
        view = data.validation_view(self.dataset, 0.8)
        axes = self.figures["misclassified.png"].axes
        shown = [axis for axis in axes if axis.images]
        self.assertFalse(any(axis.axison for axis in axes))
        self.assertEqual(len(shown), (self.rank[self.val] > 0).sum())
        self.assertEqual(axes[0].get_gridspec().ncols, 5)
        for axis in shown:
            index = find(view, axis.images[0].get_array())
            self.assertIn(index, self.val)
            confidence, guess = self.logits[index].softmax(0).max(0)
            self.assertNotEqual(guess, view.labels[index])
            self.assertEqual(" ".join(axis.get_title().split()),
                             f"actual: {NAMES[view.labels[index]]} predicted: {NAMES[guess]} "
                             f"({confidence:.0%})")

    def start(self, *flags):
        """What a command hands to fit."""
        with mock.patch.multiple(train, fit=mock.DEFAULT, write_report=mock.DEFAULT) as mocks:
            _, self.out, _ = call(train, *FLAGS, *flags)
        return mocks["fit"].call_args.args

    def test_grad_cam_shows_validation_images_of_the_run(self):
        for flags in (("--classes", 3, "--split", "official"), ("--seed", 5)):
            *_, val_batches, _, _, folder = self.start(*flags)
            with drawn_figures() as figures:
                call(gradcam, folder, "--device", "cpu")
            shown = [axis for axis in figures["gradcam-predicted.png"].axes if axis.get_title()]
            self.assertTrue(shown)
            for axis in shown:
                self.assertIn(find(val_batches.dataset, axis.images[0].get_array()),
                              val_batches.indices)

    def test_flags_that_the_run_leaves_at_their_defaults_have_their_effect(self):
        others = [*Path("runs").iterdir()]
        learner, *_, folder = self.start("--precision", "bf16", "--stem-stride", 2)
        self.assertEqual((learner.dtype, learner.network.conv1.stride,
                          str(learner.network.maxpool)), (torch.bfloat16, (2, 2), "Identity()"))
        self.assertNotIn(folder, others)
        network = self.start("--weights", RUN)[0].network
        close(network.state_dict(), self.checkpoint["model"], atol=0)
        self.assertIn(f"starting from the weights of {RUN}, all layers\n", self.out)
        with mock.patch.object(data.shapes, "__defaults__", (0, 9)):
            dataset = self.start("--dataset", "shapes", "--seed", 2)[1].dataset
            close(dataset.images, data.shapes(2).images, atol=0)

    def test_a_cpu_gets_its_own_recipe_and_says_so(self):
        note = ("no GPU: the recipe for a CPU, --resolutions 32 48 64 --stem-stride 4 --max-lr 0.1 "
                "--cutmix 0.5; a GPU's would take days")
        self.assertEqual(self.printed.splitlines()[0], note)
        for device, flags, *recipe in (
                ("cpu", "--max-lr 0.3", [32, 48, 64], 4, 0.3, 0.5, note),
                ("cpu", "--dataset shapes", [48, 64], 4, 0.05, 0, ""),
                ("cpu", "--dataset folder", [32, 32, 32, 32, 64], 4, 0.05, 0.25, ""),
                ("mps", f"--weights {RUN}", [64], 4, 0.04, 0.25, "")):
            with (mock.patch.object(sys, "argv", ["train.py", *flags.split()]),
                  mock.patch.object(model, "choose_device", lambda _: torch.device(device))):
                args, _ = train.parse_arguments()
            self.assertEqual([args.resolutions, args.stem_stride, args.max_lr, args.cutmix,
                              args.recipe], recipe)

    def test_an_interrupted_run_resumes_to_the_same_weights(self):
        save, errors = torch.save, [KeyboardInterrupt]

        def save_or_stop(state, path):  # stops in the middle of a checkpoint
            if errors and Path(path).name.startswith(".last.pt") and len(state["history"]) == 2:
                Path(path).write_bytes(b"half of a checkpoint")
                raise errors.pop()
            save(state, path)

        with (mock.patch.object(torch, "save", save_or_stop),
              mock.patch.object(train, "write_report")):
            self.assertEqual(call(train, "--out", "run", *RUN_FLAGS)[0], 130)
            code, out, err = call(train, "--resume", "run/last.pt", "--device", "cpu")
        self.assertEqual((code, re.findall(r"\d/2 ", out)), (0, ["2/2 "]), err)
        close(model.load_checkpoint("run/last.pt")["model"], self.checkpoint["model"], atol=0)

    def test_two_processes_train_one_network(self):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             HERE / "train.py", "--model", "customresnet", "--epochs", "1", "--out", "zwölf",
             "--classes", "3", "--split", "official", "--resolutions", "22", *map(str, FLAGS)],
            capture_output=True, text=True, timeout=120,
            env=os.environ | {"MPLBACKEND": "module://missing", "PYTHONIOENCODING": "ascii"})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("writing to zw?lf", done.stdout)
        self.assertEqual(done.stdout.count(" 1/1 "), 1, done.stdout)
        # together they validated all 9 images, in batches of 8
        checkpoint, dataset = model.load_checkpoint("zwölf/last.pt"), data.load(classes=3)
        _, val_indices = data.split(dataset, "official")
        batches = data.Batches(data.validation_view(dataset, 0.35), val_indices, 16, "cpu")
        found = train.evaluate(model.restore(checkpoint), batches, 22, torch.float32)
        row = checkpoint["history"][0]
        np.testing.assert_allclose([row["val_loss"], row["val_accuracy"]], found[:2], rtol=1e-4)

    def test_a_finished_run_keeps_its_report_and_an_unreported_one_gets_it(self):
        self.assertEqual(call(train, "--resume", RUN, "--data-dir", "elsewhere")[1], f"{RUN}: all "
                         f"2 epochs are done, nothing to train; report: {RUN}/report.md\n")
        run = model.load_checkpoint(RUN / "last.pt")
        for row, seconds, accuracy in zip(run["history"], (3600, 67), (0.9, 0.5)):
            row.update(seconds=seconds, val_accuracy=accuracy)
        Path("made").mkdir()
        torch.save(run, "made/last.pt")
        with drawn_figures():
            call(train, "--resume", "made", "--device", "cpu")
        self.assertIn("in\n1:01:07 (h:mm:ss). The best epoch, 1, has 90.00%",
                      Path("made/report.md").read_text())

    def test_what_users_get_wrong_is_one_line(self):
        before = {path: path.read_bytes() for path in RUN.iterdir()}
        for arguments, *words in (
                ((*FLAGS, "--batch-size", 1000), "--batch-size 1000", "35 training images and 14 "),
                ((*FLAGS, "--batch-size", 1), "2 or more"),
                ((*FLAGS, "--max-lr", 1e6), "loss", "--max-lr 100000"),
                ((*FLAGS, "--device", "cuda:99"), "--device cuda:99", "--device cpu"),
                (("--classes", 0), "--classes", "at least 1"),
                (("--out", RUN, *FLAGS), RUN, "--resume"),
                (("--resume", RUN, "--resolutions", 9), "--resolutions 22 30"),
                (("--resume", RUN / "report.md"), "name only the run's folder", "last.pt")):
            self.assertRefused(call(train, *arguments), *words)
        for error, words in ((RuntimeError("CUDA out of memory"), "--batch-size"),
                             (RuntimeError("not enough memory: you tried to allocate 9 bytes"),
                              "out of memory"), (OSError(28, "No space left"), "No space left")):
            with mock.patch.object(train, "fit", side_effect=error):
                self.assertRefused(call(train, *FLAGS), words)
        self.assertEqual(before, {path: path.read_bytes() for path in RUN.iterdir()})


# --------------------------------------------------------------------------------------------------
# Grad-CAM


class GradCam(unittest.TestCase):

    @torch.no_grad()
    def test_weights_are_finite_differences_of_the_score(self):
        """In bn1: the inplace ReLU behind it must not change what is seen."""
        network, images = resnet().double(), pictures()[:1, :, :16, :32].double()
        cam = gradcam.GradCAM(network.train().requires_grad_(False), ["bn1"])
        heat = cam(images, torch.tensor([4]), (24, 40))["bn1"]
        features = network.bn1(network.conv1(images))
        rest = torch.nn.Sequential(*list(network.children())[2:-1], torch.nn.Flatten(), network.fc)
        bump = 1e-6 * torch.eye(64)[:, :, None, None]  # one channel each
        weights = (rest(features + bump) - rest(features - bump))[:, 4]
        expected = torch.einsum("c,nchw->nhw", weights, features).relu()
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        close(heat, TF.resize(expected, [24, 40]))
        close(cam(images), cam(images, network(images).argmax(1)))
        close(cam.logits, network(images).float())
        self.assertFalse(network.bn1._forward_hooks)
        self.assertEqual(gradcam.GradCAM(network, ["layer4"])(images)["layer4"].max(), 0)

    def test_small_gradients_survive_half_precision(self):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1),
                                      torch.nn.Flatten(), torch.nn.Linear(4, 2))
        network[3].weight.data /= 1e4
        half, full = (gradcam.GradCAM(network, ["0"], dtype)(pictures())["0"]
                      for dtype in (torch.float16, torch.float32))
        close(half, full, atol=0.05)
        self.assertGreater(full.max(), 0)


class GradCamCommand(InFolder):

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(data.shapes, "__defaults__", (0, 10)))
        save_checkpoint("last.pt", seed=6)
        self.view = data.validation_view(data.shapes(6), 0.35)
        self.indices = data.split(self.view, seed=6)[1]
        self.cam = gradcam.GradCAM(resnet())

    def test_maps_of_either_target_are_drawn_and_measured(self):
        images, labels, boxes = (column[self.indices] for column in self.view[:3])
        names, shown = self.view.class_names, set()
        for target, name, *flags in (("predicted", "x.png", "--out", "x.png"),
                                     ("actual", "gradcam-actual.png")):
            command = (gradcam, ".", "--device", "cpu", "--target", target)
            with drawn_figures() as figures:
                self.assertEqual(call(*command, *flags)[1], f"wrote {name}\n")
            table = call(*command, "--evaluate")[1]
            maps = self.cam(data.prepare(images, 16), labels if target == "actual" else None,
                            (52, 52))
            guesses = self.cam.logits.argmax(1)
            self.assertIn(f"Grad-CAM of the {target} class: misclassified validation images",
                          figures[name].get_suptitle())
            rows = np.array(figures[name].axes).reshape(5, 10)
            self.assertEqual([row[0].get_ylabel() for row in rows],
                             ["input", "layer1", "layer2", "layer3", "layer4"])
            for column in rows.T:
                i = self.indices.tolist().index(find(self.view, column[0].images[0].get_array()))
                self.assertNotEqual(guesses[i], labels[i])
                self.assertEqual(column[0].get_title(), f"predicted: {names[guesses[i]]}\n"
                                                        f"actual: {names[labels[i]]}")
                for axis, heat in zip(column[1:], maps.values()):
                    self.assertEqual(axis.images[1].get_cmap().name, "turbo")
                    np.testing.assert_allclose(axis.images[1].get_array(), heat[i], atol=1e-3)
                for axis in column:
                    self.assertEqual(frame(axis), boxes[i].tolist())
                shown.add(i)
            correct = guesses == labels
            self.assertIn(f"the {target} class's map in the object's box? In percent of 30 "
                          f"validation images, of which {correct.sum()} are classified correctly:"
                          "\n\n| map | all | correct | wrong |\n| --- |", table)
            maps |= {"a flat map": torch.ones(30, 52, 52),
                     "a point at the centre": F.pad(torch.ones(30, 2, 2), [25] * 4)}
            for name, heats in maps.items():
                hits = []
                for heat, (x0, y0, x1, y1) in zip(heats, boxes.clamp(min=0)):
                    top = heat == heat.max()
                    hits.append(top[y0:y1, x0:x1].sum() / top.sum())
                cells = [f"{100 * torch.stack(hits)[group].mean():.1f}"
                         for group in (correct | True, correct, ~correct)]
                self.assertIn(f"| {name} | {' | '.join(cells)} |", table)
        self.assertEqual(len(shown), 10)

    def test_the_precision_is_the_runs(self):
        save_checkpoint("half.pt", precision="bf16")
        with mock.patch.object(gradcam, "GradCAM", side_effect=KeyboardInterrupt) as cam:
            call(gradcam, "half.pt", "--device", "cpu")
        self.assertEqual(cam.call_args.kwargs["dtype"], torch.bfloat16)

    def test_predictions_of_all_pictures_are_printed_and_ten_drawn(self):
        names = [f"{i}.png" for i in range(12)]
        for name in names:
            Image.effect_noise((80, 60), 99).save(name)
        Path("bad.png").write_text("text")
        torch.save(model.load_checkpoint("last.pt") | {"size": 96}, "last.pt")
        with drawn_figures() as figures:
            _, out, err = call(gradcam, "--device", "cpu", ".", "bad.png", *names, "--out", "x.png")
        self.assertRegex(err, "skipped bad.png: cannot identify image file")
        self.assertEqual(re.findall(r"\d+.png", out), names)
        rows, lines = np.array(figures["x.png"].axes).reshape(5, 10), []
        for name, column in zip(names, rows.T):
            image = data.centre(data.read_picture(name, 96)[None], 0.35)
            self.cam(data.prepare(image, 16))
            probabilities = self.cam.logits.softmax(1)[0].tolist()
            best = sorted(zip(probabilities, data.SHAPES), reverse=True)[:5]
            lines += [name, *(f"{p:9.1%}  {shape}" for p, shape in best)]
            self.assertEqual(column[0].get_title(), f"{name}\n{best[0][1]}: {best[0][0]:.0%}")
            close(torch.tensor(column[0].images[0].get_array()), image[0].permute(1, 2, 0))
        self.assertEqual(out.splitlines()[:60], lines)

    def test_photographs_are_upright_transparent_pixels_white_and_greys_of_16_bits_scaled(self):
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4), np.uint8)
        photo = Image.fromarray(pixels).resize((120, 96))
        photo.rotate(90, expand=True).save("photo.png", exif=SIDEWAYS)
        white = Image.new("RGB", photo.size, "white")
        white.paste(photo, mask=photo)
        expected = TF.resize(TF.center_crop(white, 96), 64)
        close(data.read_picture("photo.png"), TF.pil_to_tensor(expected), atol=8)
        grey = np.arange(64 * 64).reshape(64, 64)
        Image.fromarray(grey.astype(np.uint16)).save("grey.png")
        close(data.read_picture("grey.png")[0], torch.tensor(grey * 255 // 4095), atol=1)
        self.assertIsNone(Image.MAX_IMAGE_PIXELS)

    def test_what_users_get_wrong_is_one_line(self):
        Path("notes.txt").write_text("not\na picture")
        for arguments, word in (((".", "notes.txt"), "none of the pictures"),
                                (("no",), "no/last.pt"),
                                ((".", "no.jpg", "--evaluate"), "--evaluate"),
                                ((".", "no.jpg", "--target", "actual"), "--target actual")):
            self.assertRefused(call(gradcam, "--device", "cpu", *arguments), "gradcam.py", word)


class Folder(InFolder):
    flags = ("--dataset", "folder", "--data-dir", "photos", "--resolutions", 80, *FLAGS)

    def write(self, *paths, first=0):
        """Pictures, each of one colour, its place in paths."""
        for i, path in enumerate(paths, first):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 60), (i, 2 * i, 128)).save(path, "PNG")

    def setUp(self):
        super().setUp()
        self.write(*(f"photos/{name}/{i}.png" for name in ("cat", "$_$", "ape") for i in range(6)))

    def describe(self, path="photos", *flags):
        return call(data, "--dataset", "folder", "--data-dir", path, *flags)

    def test_pictures_get_the_class_of_their_folder_and_what_is_left_out_is_said(self):
        shutil.copy("photos/cat/1.png", "photos/cat/1 copy.png")
        shutil.copy("photos/cat/2.png", "photos/ape/same.png")
        self.write("photos/ape/b", "photos/ape/deep/a.jfif", "photos/.ipynb_checkpoints/1.png",
                   "photos/ape/.x/1.png", "photos/ape/._1.png", "photos/__MACOSX/._1.png",
                   first=18)
        Path("photos/ape/notes.txt").write_text("text")
        Path("photos/ape/half.png").write_bytes(Path("photos/ape/1.png").read_bytes()[:60])
        dataset = data.load("folder", "photos")
        found, damaged, *others = dataset.notes.splitlines()
        self.assertEqual([found, *others], [
            "photos: 19 pictures of 3 classes, 5 to 8 of each, median 6; split 70/30, as there is "
            "no val/", "- left out, unreadable .txt files: 1 (photos/ape/notes.txt: cannot "
            "identify image file)", "- left out, in several classes: 2 (photos/ape/same.png, "
            "photos/cat/2.png)", "- left out, copies: 1 (photos/cat/1.png)"])
        self.assertRegex(damaged, r"^- left out, unreadable .png files: 1 \(photos/ape/half")
        self.assertIn(dataset.notes, self.describe()[1])
        self.assertEqual(dataset.class_names, ["$_$", "ape", "cat"])
        self.assertEqual(dataset.labels.tolist(), [0] * 6 + [1] * 8 + [2] * 5)
        self.assertEqual(dataset.images[:, 0, 9, 9].tolist(), [*range(6, 20), 0, 1, 3, 4, 5])
        two = data.load("folder", "photos", classes=2, size=80)
        self.assertEqual((two.class_names, two.images.shape), (["$_$", "ape"], (14, 3, 80, 80)))
        with mock.patch.object(os, "fsencode", return_value=b"caf\xe9"):  # an old archive's name
            self.assertEqual(data.load("folder", "photos").class_names, ["caf\ufffd"] * 3)

    def test_train_and_val_are_used_as_given(self):
        self.write(*(f"set/train/{name}/{i}.png" for name in "ab" for i in range(4)))
        self.write(*(f"set/val/{name}/{i}.png" for name in "ab" for i in range(3)),
                   "set/test/a/0.png", "set/test/b/0.png", first=20)
        shutil.copy("set/val/a/0.png", "set/train/a")
        val = Path("set/val")
        for name in ("val", "Valid", "validation"):
            val = val.rename(f"set/{name}")
            dataset = data.load("folder", "set")
            self.assertEqual([dataset.images[part, 0, 0, 0].tolist() for part in
                              data.split(dataset)], [[*range(1, 8)], [*range(20, 26)]])
            self.assertRegex(dataset.notes, "13 .*; 6 are given for validation")

    def test_a_run_is_reported_and_knows_its_pictures(self):
        self.write(*(f"photos/cat/{i}.png" for i in range(6, 20)), first=20)
        with drawn_figures() as figures:
            _, out, _ = call(train, *self.flags, "--epochs", 1, "--out", "run")
            call(gradcam, "run", "--device", "cpu")
        picture = figures["gradcam-predicted.png"].axes[0].images[0].get_array()
        self.assertEqual(picture.shape, (66, 66, 3))  # larger than Tiny ImageNet's
        report = Path("run/report.md").read_text()
        for text in out, report:
            self.assertIn("photos: 32 pictures of 3 classes", text)
        accuracy = np.genfromtxt("run/classes.csv", delimiter=",", names=True)["accuracy"]
        self.assertIn(f"{accuracy @ [0.2, 0.2, 0.6]:.2%} validation accuracy, {accuracy.mean():.2%}"
                      " as the mean over classes; report: run/report.md", out)
        Path("run/report.md").unlink()
        shutil.move("photos", "moved")
        moved = ("--data-dir", "moved")
        self.assertRefused(call(gradcam, "run"), "photos")
        self.assertRefused(call(gradcam, "run", *moved, "--evaluate"), "boxes")
        self.assertRefused(self.describe("moved", "--export-coco", "x.json"), "boxes")
        shutil.move("moved/cat/5.png", "moved/ape/6.png")
        for command in (gradcam, "run"), (train, "--resume", "run"):
            self.assertRefused(call(*command, *moved), "moved: the pictures are not those")
        shutil.move("moved/cat", "moved/wolf")
        self.assertRefused(call(gradcam, "run", *moved), "moved: the pictures are not those")

    def test_what_users_get_wrong_is_one_line(self):
        self.write("few/cat/1.png", "few/dog/1.png", "few/dog/2.png",
                   "two/train/a/1.png", "two/train/b/1.png", "two/val/a/2.png")
        Path("few/cat/x.heic").write_text("text")
        shutil.move("photos", "in/photos")
        for folder, *words in (("nowhere", "each of several classes", "found: none"),
                               ("few", "cat has none for validation", "le .heic files: 1"),
                               ("two", "(b has none for validation)"), ("in", "r in/photos")):
            self.assertRefused(self.describe(folder), *words)
        self.assertRefused(call(train, *self.flags, "--data-dir", "in/photos", "--split",
                                "official"), "--split official")


# --------------------------------------------------------------------------------------------------
# Anchors and annotation files


def made_boxes(n=500):
    """Widths and heights around four shapes."""
    rng = np.random.default_rng(0)
    shapes = np.array([[20, 30], [60, 40], [150, 200], [300, 120]])
    return shapes[rng.integers(0, 4, n)] * np.exp(rng.normal(0, 0.3, (n, 2)))


def made_coco(images=20, boxes=60):
    """A COCO file as a dictionary, with polygons, and without a fault."""
    rng = np.random.default_rng(0)
    sizes = rng.uniform(20, (300, 200), (boxes, 2))
    corners = rng.uniform(0, (640, 480) - sizes)
    corners[:2] = (0, 0), (640, 480) - sizes[1]  # others than [x, y, width, height] leave
    return {"annotations": [{"segmentation": [box * 2], "area": 99, "iscrowd": 0, "bbox": box,
                             "image_id": 100 + i % images, "id": i,
                             "category_id": (18, 18, 18, 3, 3, 7)[i % 6]}
                            for i, box in enumerate(np.hstack([corners, sizes]).round(2).tolist())],
            "images": [{"id": 100 + i, "width": 640, "height": 480, "file_name": f"{i}.png"}
                       for i in range(images)],
            "categories": [{"id": 3, "name": "yak"}, {"id": 7, "name": "bee"},
                           {"id": 18, "name": "$a|b\n狗"}]}


class Anchors(unittest.TestCase):

    def test_iou_is_torchvisions(self):
        boxes, anchors = torch.rand(30, 2).double(), torch.rand(4, 2).double()
        theirs = torchvision.ops.box_iou(F.pad(boxes, (2, 0)), F.pad(anchors, (2, 0)))
        np.testing.assert_allclose(iou(boxes.numpy(), anchors.numpy()), theirs)

    def test_plain_kmeans_moves_anchors_to_the_means(self):
        boxes = made_boxes(90)
        anchors = plain_kmeans(boxes, np.ones(90), np.array([*boxes[:3], [1e-3, 1e-3]]))
        nearest = iou(boxes, anchors).argmax(axis=1)
        for j in range(3):
            np.testing.assert_allclose(anchors[j], boxes[nearest == j].mean(axis=0))
        self.assertEqual(anchors[3].tolist(), [1e-3, 1e-3])

    def test_anchors_are_as_good_as_an_exhaustive_search(self):
        """All pairs of a fine grid of sizes are tried."""
        boxes = made_boxes(25)
        grid = np.stack(np.meshgrid(*[np.geomspace(10, 500, 60)] * 2), -1).reshape(-1, 2)
        scores = iou(boxes, grid).T  # (3600, 25)
        best = max(np.maximum(score, scores).mean(axis=1).max() for score in scores)
        self.assertGreater(kmeans(boxes, 2)[1], best)

    def test_no_anchor_can_be_improved_and_seeds_agree(self):
        rng = np.random.default_rng(0)
        for n, k, gain in (500, 9, 1e-5), (9000, 5, 5e-5):  # 9000 are merged
            boxes = made_boxes(n)
            found = [kmeans(boxes, k, seed) for seed in range(3)]
            self.assertLess(np.ptp([score for _, score in found]), 5e-4)
            anchors, score = found[0]
            self.assertTrue((np.diff(anchors.prod(axis=1)) >= 0).all())
            for size in (0.002, 0.01, 0.05, 0.3) * 60:
                moved = anchors * np.exp(rng.normal(0, size, (k, 2)) * (rng.random((k, 1)) < 0.4))
                self.assertLess(iou(boxes, moved).max(axis=1).mean(), score + gain)

    def test_rare_clusters_are_found(self):
        rng = np.random.default_rng(0)
        shapes = np.repeat(np.exp(rng.uniform(1, 7, (12, 2))), [400] * 6 + [20] * 6, axis=0)
        self.assertGreater(kmeans(shapes * np.exp(rng.normal(0, 0.01, shapes.shape)), 12)[1], 0.98)

    def test_one_dominant_size_does_not_mislead_all_searches(self):
        """0.77507 is the best of 300 starts."""
        rng = np.random.default_rng(44)
        spread = np.repeat([0.25, 0.8], [392, 8])[:, None]
        self.assertGreater(kmeans([70, 90] * np.exp(rng.normal(0, spread, (400, 2))), 3)[1], 0.775)

    def test_repeated_boxes_count_as_often_as_they_occur(self):
        anchors, _ = kmeans([[10, 10], [11, 11]] + [[20, 20]] * 9, 1)
        np.testing.assert_allclose(anchors, [[20, 20]], rtol=1e-3)

    def test_unusable_boxes_are_named(self):
        for value in (np.nan, np.inf, 0, -1):
            with self.assertRaisesRegex(ValueError, "row 2"):
                kmeans([[1, 2], [3, 4], [5, value]], 2)
        with self.assertRaisesRegex(ValueError, "2 distinct boxes"):
            kmeans([[1, 2], [3, 4], [1, 2]], 3)


class Analysis(InFolder):

    def write(self, content, path="file.json"):
        text = content if isinstance(content, str) else json.dumps(content)
        Path(path).write_bytes(text.encode())
        return path

    def analyse(self, content, *options, path="file.json"):
        """Without pictures."""
        draw = [name for name in vars(coco_analysis) if name.startswith("draw_")]
        with mock.patch.multiple(coco_analysis, **dict.fromkeys(draw, lambda *_: "")):
            return call(coco_analysis, self.write(content, path), "--k", 1, *options)

    def report(self, content, *options):
        code, _, err = self.analyse(content, *options)
        self.assertEqual((code, err), (0, ""))
        return Path("analysis/file/report.md").read_text("utf-8")

    def files(self, content, *options):
        with mock.patch.object(coco_analysis, "write") as write:
            call(coco_analysis, self.write(content), "--k", 2, 3, *options)
        return write.call_args.args[0]

    def test_every_layout_of_a_file_is_read(self):
        whole = made_coco()
        kept = whole["annotations"]
        kept[1]["attributes"] = [{"occluded": False}]
        lines = list(map(json.dumps, kept))
        for content in (json.dumps(whole, indent=2), json.dumps(whole, sort_keys=True),
                        "\ufeff" + json.dumps(whole), kept, "\n".join(lines),
                        "\r\n\n".join(line + "," for line in lines), kept[0]):
            _, tables = coco_analysis.read(self.write(content))
            boxes = coco_analysis.flatten(**tables)[1]
            self.assertEqual([(box.bbox, box.label, box.image) for box in boxes],
                             [(a["bbox"], str(a["category_id"]), str(a["image_id"]))
                              for a in (kept[:1] if content is kept[0] else kept)])

    def test_every_order_is_recognised_or_named(self):
        rng = np.random.default_rng(0)
        size = rng.integers(200, 1200, (2000, 2)).astype(float)
        sides = size * rng.uniform(0.02, 0.7, (2000, 2))
        corners = rng.uniform(0, 1, (2000, 2)) * (size - sides)
        for fractions in False, True:
            unit = size if fractions else 1
            (x, y), (w, h) = (corners / unit).T, (sides / unit).T
            for numbers, order, as_fractions in (
                    ((x, y, w, h), "xywh", "xywh"), ((y, x, w, h), "yxwh", "yxwh"),
                    ((x, y, x + w, y + h), "xyxy", "xyxy yxyx"),
                    ((y, x, y + h, x + w), "yxyx", "xyxy yxyx"),  # x and y are alike
                    ((x + w / 2, y + h / 2, w, h), "cxcywh", "cxcywh"),
                    ((y, x, h, w), "exchanged yxhw", "xywh")):
                bbox = np.stack(numbers, 1)
                found, _ = coco_analysis.find_readings(bbox, size, fractions)
                self.assertEqual(" ".join(found), as_fractions if fractions else order)

    def test_the_sentence_says_what_the_numbers_allow(self):
        xy = "[x, y, width, height]"
        words = {"XY": "bbox is " + xy, "IN": "of the boxes lie inside their images",
                 "READ": f"; read as {xy},", "TIE": ". A tie: is it --bbox-format",
                 "UNKNOWN": "100.0% of the boxes fit by signs and extent; no image size is known"}
        for w, h, boxes, sentence in (
                (300, 200, "90,200,95,110 " + "0,0,9,9 " * 4,
                 "bbox is [y, x, width, height]: 100.0% {IN}{READ} 80.0% do"),
                (300, 200, "0,0,300,200 " * 9 + "0,0,301,202",
                 "{XY}: 90.0% {IN}{TIE} xyxy (90.0%) or yxwh (90.0%)?"),
                (300, 200, "0,0,200,300 100,150,90,140", "{XY}, images' width and height "
                 "exchanged: 100.0% {IN}{READ} 0.0% do{TIE} yxhw (100.0%)?"),
                (101, 101, "80,1,20,100",
                 "{XY}: 100.0% {IN}. They may be percent: no number exceeds 100"),
                (0, 0, "300,0,100,20 0,5,9,9", "{XY}: {UNKNOWN}{TIE} yxwh (100.0%)?"),
                (0, 0, "300,0,100,20 0,5,9,9 " * 10, "{XY}: {UNKNOWN}"),
                (0, 0, "0.1,0.2,0.9,0.5",
                 "{XY} as fractions: 100.0% {IN}{TIE} xyxy (100.0%) or yxyx (100.0%)?")):
            lines = [f"id: 0, height: {h}, width: {w}, bbox:[{box}],\n" for box in boxes.split()]
            self.assertIn(f"\n\n{sentence.format(**words)}\n\n", self.report("".join(lines)))
        self.assertIn("\n\nAs asked, bbox is [x1, y1, x2, y2]: ",
                      self.report(made_coco(), "--bbox-format", "xyxy"))

    def test_faults_are_counted_and_placed(self):
        whole = made_coco()
        boxes, images, _ = whole.values()
        for i, change in {1: {"id": 2.0, "iscrowd": 1}, 3: {"id": 2}, 4: {"id": None},
                          5: {"id": 2}, 6: {"area": None}, 7: {"bbox": ["9", "9", "9", "9"]},
                          8: {"image_id": "108"}, 9: {"category_id": 4}, 10: {"category_id": None},
                          11: {"bbox": "1234"}, 12: {"bbox": [0.1, 0.2, 0.5, 0.5]},
                          13: {"bbox": [-9, 9, 640, 9]}, 14: boxes[2] | {"id": 900}}.items():
            boxes[i].update(change)
        images[15].update(width=3, height=1)
        images[16].update(width=None)
        images += [{"id": 7}, {"id": 8}, {"id": 100}]
        quality = self.report("\ufeff" + json.dumps(whole)).split("\n## ")[2]
        quality = re.sub(r" \(.+?\)|annotations(?=\[)", "", quality)
        self.assertEqual(quality.strip().split("\n\n- ")[1:], [
            "1 narrower or lower than a pixel: [12]",
            "3 larger than their image, the first of 3 x 1: [15], [35], [55]",
            "6 in images of unknown size: [0], [16], [20]",
            "1 repeat an earlier box, class and image: [14]", "1 not inside their image: [13]",
            "2 unusable: [10], [11]", "1 with iscrowd = 1: in COCO a group of objects, in CVAT's "
            "files any mask: [1]", "4 annotations without an id of their own: [2], [3], [4]",
            "1 images without an id of their own: images[22]",
            "1 annotations whose image_id is not in images: [8]",
            "2 annotations whose category_id is not in categories: [9], [10]",
            "3 annotations without numbers as bbox, area and iscrowd: [6], [7], [11]",
            "2 images without boxes: images[20], images[21]",
            "1 byte order mark, where pycocotools stops: byte 0"])

    def test_the_report_counts_what_is_there(self):
        whole = made_coco()
        whole["annotations"][9]["category_id"] = 3.0
        del whole["images"][0]["file_name"]
        report = self.report(whole)
        for words in ("\nCOCO instances JSON: 60 boxes, 3 classes, 20 images\n",
                      "| 18 | \\$a\\|b 狗 | 30 | 50.00% |\n| 3 | yak | 20 | 33.33% |",
                      "| annotations | category\\_id | 60 | 18 | the class |",
                      "| annotations | segmentation | 60 | \\[\\[0.0, 0.0, ",
                      "| images | file\\_name | 19 | 1.png | the photograph |",
                      "| images | height | 20 | 480 | of the image, in pixels |",
                      "| \\[x, y, width, height\\] | 100.00% |", "\n- no fault found\n"):
            self.assertIn(words, report)

    def test_classes_are_found_and_names_assumed_only_for_cocos_ids(self):
        weights = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT
        coco = {id: name for id, name in enumerate(weights.meta["categories"][1:], 1)
                if name != "N/A"}
        for names in (coco, dict(enumerate(coco.values())), {0: "id 0", 1: "id 1"},
                      {id: f"id {id}" for id in range(81)}):
            report = self.report("".join(f"id: {id}, bbox:[69, 464, 312, 175],\n"
                                         for id in [*names, *names]))
            self.assertEqual("Class names are assumed: the ids are those of COCO." in report,
                             len(names) == 80)
            for id, name in names.items():
                self.assertIn(f"| {id} | {name} | 2 | ", report)
        for field, value, name in ("category", "fox", "fox"), ("category_id", 7, "id 7"):
            records = [{"image_id": 1, "bbox": [1, 2, 3, i], field: value} for i in (7, 8)]
            self.assertIn(f" | {name} | 2 | 100.00% |", self.report(records))
        records = [{"id": i, "bbox": [1, 2, 3, 4]} for i in (7, 8)]  # numbers of the records
        self.assertIn('No field names a class: all boxes are of one class, "object".',
                      self.report(records))

    def test_anchors_are_of_the_boxes_at_the_input_and_never_larger(self):
        whole = made_coco(boxes=3)
        for box in whole["annotations"]:
            box["bbox"] = [0, 0, 640.4, 120]
        for content, options, unit, anchor in (
                (whole, (), "pixels at 416 x 416, stretch", "1.0000: 416,104"),
                (whole, ("--size", 1337), "pixels at 1337 x 1337, stretch", "0.9999: 1337,334.2"),
                (whole, ("--resize", "letterbox"), "pixels at 416 x 416, letterbox",
                 "1.0000: 416,78"),
                (whole["annotations"], (), "pixels of the images, whose sizes are unknown",
                 "1.0000: 640.4,120")):
            self.assertIn(f"\n\nAnchors: width,height in {unit}\n\n- k = 1, mean IoU {anchor}\n",
                          self.report(content, *options))

    def test_pictures_show_the_boxes_classes_and_anchors(self):
        whole = made_coco(images=5)
        boxes, names = whole["annotations"], {18: "$a|b 狗", 3: "yak", 7: "bee"}
        files = self.files(whole)
        half = files["readings.png"].subfigs[1]
        self.assertEqual(half.get_suptitle(), "bbox read as [x, y, width, height]: 100.0% inside")
        for axes in half.axes[:5]:
            patch, = axes.patches
            box, = [a for a in boxes if np.allclose(a["bbox"], patch.get_bbox().bounds)]
            self.assertEqual(axes.get_title(), names[box["category_id"]])
            self.assertEqual(axes.images[0].get_extent(), [0, 640, 480, 0])
            self.assertEqual(plt.matplotlib.colors.to_hex(patch.get_edgecolor()),
                             coco_analysis.BLUE)
        axes, = files["class_distribution.png"].axes
        self.assertEqual([label.get_text() for label in axes.get_xticklabels()], [*names.values()])
        self.assertEqual([bar.get_height() for bar in axes.patches], [30, 20, 10])
        self.assertLess(axes.get_xlim()[1], 2.5)
        counts = files["bbox_distribution.png"].axes[0].collections[0].get_array()
        x, _, w, h = np.array([a["bbox"] for a in boxes]).T
        np.testing.assert_array_equal(counts.filled(0).sum(axis=0),
                                      np.histogram((x + w / 2) / 640, 25, (0, 1))[0])
        wh = np.stack([w * 416 / 640, h * 416 / 480], 1)
        axes, = files["bbox_wh.png"].axes
        self.assertEqual((axes.get_xlabel(), axes.get_ylabel()), ("width", "height"))
        points, crosses = [scatter.get_offsets() for scatter in axes.collections]
        np.testing.assert_allclose(sorted(points.tolist()), sorted(wh.tolist()))
        for k, axes in zip((2, 3), files["anchors.png"].axes):
            sides = [(patch.get_width(), patch.get_height()) for patch in axes.patches]
            score = iou(wh, np.array(sides)).max(axis=1).mean()
            self.assertEqual(axes.get_title(), f"k = {k}, mean IoU {score:.4f}")
            self.assertEqual([text.get_text() for text in axes.get_legend().texts],
                             [f"{w:g} x {h:g}" for w, h in sides])
        np.testing.assert_allclose(crosses, sides)

    def test_photographs_are_drawn_on_and_decide_which_sizes_are_right(self):
        whole, photo = made_coco(), Image.new("RGB", (640, 480), "lime")
        for image in whole["images"]:
            image.update(width=480, height=640)
        for exif, words in ((SIDEWAYS, "[y, x, height, width]: 100.0%"), (
                None, "[x, y, width, height], images' width and height exchanged: 100.0%")):
            photo.save("3.png", exif=exif)
            report = self.report(whole, "--images", ".")
            self.assertIn("bbox is " + words, report)
            self.assertNotRegex(report, "A tie|on disk")
        axes = self.files(whole, "--images", ".")["readings.png"].subfigs[1].axes[0]
        self.assertEqual(axes.images[0].get_array()[0, 0].tolist(), [0, 255, 0])
        self.assertEqual(axes.images[0].get_extent(), [0, 640, 480, 0])
        photo.resize((320, 240)).save("3.png")
        self.assertIn("- 1 photographs of another size: 3.png (320x240 on disk, 640x480 in the "
                      "file)", self.report(whole, "--images", "."))
        Path("3.png").write_bytes(b"damaged")
        for folder, words in (".", "3.png"), ("nowhere", "--images: there is no image such as"):
            self.assertRefused(self.analyse(whole, "--images", folder), words)

    def test_bad_files_get_one_line_and_no_report(self):
        good = json.dumps(made_coco(images=3, boxes=6))
        cuts = {good[:cut]: "line 1 column" for cut in range(20, len(good), 70)}
        for content, message in (cuts | {
                "": "no annotations", "hello": "line 1, 'hello': expected COCO JSON",
                "5": "expected COCO JSON", '{"annotations": [5]}': "'[5]': expected COCO JSON",
                '{"bbox":1}\n\n{"a":': "line 3",
                '[{"bbox":[1,2]}]': "annotations[0] (class object, bbox [1, 2])",
                '[{"bbox":[0,0,0,0]}]': "no box is usable; - 1 narrower",
                good.replace('"bbox"', '"box"'): "annotations have no bbox, only area, box,",
                good + "\n" + good: f"line 2 column 1 (char {len(good) + 1}): correct it there"
                }).items():
            self.assertRefused(self.analyse(content), "file.json", message)
        Path("file.json").write_bytes(b"\xff")
        for path in "file.json", ".":
            self.assertRefused(call(coco_analysis, path), path, "not a text file in UTF-8")
        self.assertRefused(call(coco_analysis, "nothing.json"), "nothing.json")
        self.write(good)
        with mock.patch.object(plt.Figure, "savefig", side_effect=OSError(28, "No space left")):
            self.assertRefused(call(coco_analysis, "file.json", "--out", "out"), "out: No space")
        self.assertEqual(sorted(Path().rglob("*")), [Path("file.json"), Path("out")])

    def test_files_of_one_name_get_two_reports(self):
        for folder, boxes, out in (("train", 7, "file"), ("valid", 8, "valid-file"),
                                   ("train", 9, "file")):
            Path(folder).mkdir(exist_ok=True)
            _, printed, _ = self.analyse(made_coco(boxes=boxes), path=f"{folder}/file.json")
            self.assertIn(f"report: {Path('analysis', out, 'report.md')}", printed)
        for out, boxes in ("file", 9), ("valid-file", 8):
            self.assertIn(f"{boxes} boxes", Path("analysis", out, "report.md").read_text("utf-8"))

    def test_the_command_works_from_a_shell_without_torch(self):
        self.write(made_coco())
        Path("torch.py").write_text("raise ImportError")
        done = subprocess.run([sys.executable, coco_analysis.__file__, "file.json", "--k", "2",
                               "3"],
                              capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(re.findall(r"- k = (.), mean", done.stdout), ["2", "3"])
        report = Path("analysis/file/report.md")
        for picture in re.findall(r"!\[\]\((.+)\)", report.read_text("utf-8")):
            Image.open(report.with_name(picture)).load()


class Readme(InFolder):
    text = (HERE / "README.md").read_text(encoding="utf-8")

    def test_the_blocks_of_python_run(self):
        checkpoint = "runs/tiny-imagenet-resnet18/last.pt"
        Path(checkpoint).parent.mkdir(parents=True)
        save_checkpoint(checkpoint)
        Image.effect_noise((90, 60), 99).save("cat.jpg")
        best = call(gradcam, "--device", "cpu", checkpoint, "cat.jpg")[1].splitlines()[1]
        network = torchvision.models.resnet18()
        with (mock.patch.object(torchvision.models, "resnet18", lambda weights: network),
              contextlib.redirect_stdout(io.StringIO()) as out):
            for block in re.findall(r"(?m)^    import .*\n(?:    .*\n)+", self.text):
                exec(textwrap.dedent(block), {})
        self.assertEqual(out.getvalue(), best.split("%  ")[1] + "\n")
        ours = model.create("resnet18", 3, 4)
        model.load_weights(ours, "imagenet.pt", [])
        close(ours.layer4.state_dict(), network.layer4.state_dict(), atol=0)

    def test_the_exercises_run(self):
        """All of them at once, in a short training."""
        edits = [(data, "random_crops", r"    theta = (?:.|\n)*(?=    return)"),
                 (train, "fit", r"one_cycle\((?:.|\n)*?max_lr\)"),
                 (model, "BasicBlock", r"return self.relu\(x \+ shortcut\)"),
                 (gradcam, "combine", r"maps = \(weights.*"),
                 (sys.modules["kmeans"], "iou", r'(?<="""\n)(?:.|\n)+$')]
        exercises = re.findall(r"(?ms)^\d\. .+?(?=^\d\.|\n\n\S)", self.text)
        for (module, name, old), exercise in zip(edits, exercises, strict=True):
            original = getattr(module, name)
            self.enterContext(mock.patch.object(module, name, original))  # restores it
            for new in (re.findall(r"(?:by|with|write)\s+`(.+?)`", exercise) or
                        ["".join(re.findall(r"(?m)^   (    .*\n)", exercise))]):
                source, count = re.subn(old, lambda _: new, inspect.getsource(original))
                self.assertEqual((count, f"`{name}`" in exercise), (1, True), name)
                exec(source, vars(module))
        with mock.patch.object(data.shapes, "__defaults__", (0, 4)), drawn_figures():
            code, _, err = call(train, "--dataset", "shapes", "--epochs", 2, "--resolutions", 22,
                                *FLAGS)
        self.assertEqual(code, 0, err)
        kmeans(made_boxes(), 3)

    def test_the_flags_of_every_command_exist(self):
        """On small data, and without training."""
        Path("annotations.json").write_text(json.dumps(made_coco()))
        for name in ("0.png", *re.findall(r"\w+\.jpg", self.text)):
            Image.effect_noise((640, 480), 99).save(name)
        torch.save({}, "imagenet.pt")
        self.enterContext(mock.patch.object(data, "load", return_value=data.shapes(0, 40)))
        self.enterContext(mock.patch.multiple(train, fit=mock.DEFAULT, write_report=mock.DEFAULT))
        self.enterContext(mock.patch.multiple(gradcam, draw_misclassified=mock.DEFAULT,
                                              evaluate=mock.DEFAULT))
        self.enterContext(mock.patch.object(model, "load_weights", return_value=""))
        self.enterContext(mock.patch.multiple(coco_analysis, write=mock.DEFAULT,
                                              analyse=lambda *_: {"report.md": ""}))
        self.enterContext(drawn_figures())
        commands = re.findall(r"(?m)^    python (?!test_all)(\w+)\.py(.*?)(?: +#.*)?$", self.text)
        self.assertGreater(len(commands), 18)
        for script, arguments in commands:
            code, _, err = call(sys.modules[script], *shlex.split(arguments))
            self.assertEqual(code, 0, f"{script}.py{arguments}: {err}")
        for picture in re.findall(r"assets/[\w-]+\.\w+", self.text):
            self.assertTrue((HERE / picture).is_file(), picture)


if __name__ == "__main__":
    unittest.main()
