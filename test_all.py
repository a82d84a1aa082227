"""The tests: python test_all.py, with the four packages, without a download, in about three minutes on two cores.

    python test_all.py                            # everything
    python test_all.py Networks Schedule          # some of the classes below
    python test_all.py Training.test_a_killed_run_resumes_to_the_same_weights

What we wrote is compared with something that we did not write: torchvision's network, torch's scheduler, a gradient, a
brute-force search. The data is made here: shapes, and a Tiny ImageNet of a few images.
"""
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

import coco_analysis
import data
import gradcam
import model
import train
from kmeans import iou, kmeans

HERE = Path(__file__).parent


def call(module, *arguments):
    """Runs a script's main() in this process: (exit code, what it printed, what it printed on stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            module.main()
        except SystemExit as error:
            code = error.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


class InFolder(unittest.TestCase):
    """A test that may write: into a temporary folder, which is the current one while it runs."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(contextlib.chdir(self.folder))

    def assertRefused(self, result, *words):
        """Exit code 2 and a single line on stderr that has all the words."""
        code, _, err = result
        lines = [line for line in err.splitlines() if not line.startswith(("downloading", "extracting"))]
        self.assertEqual((code, len(lines)), (2, 1), err)
        for word in words:
            self.assertIn(str(word), lines[0])


class Networks(unittest.TestCase):

    def test_resnet18_is_torchvisions(self):
        ours, theirs = model.ResNet18(200, stem_stride=4), torchvision.models.resnet18(num_classes=200)
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(4, 3, 64, 64)
        for training in (True, False):  # training changes the BatchNorm statistics that evaluation then uses
            ours.train(training), theirs.train(training)
            with mock.patch("model.AVX2", False):  # conv3x3's other way rounds otherwise: see the next test
                self.assertEqual((ours(images) - theirs(images)).abs().max(), 0)
        ours.load_state_dict(torchvision.models.resnet18(num_classes=200).state_dict())

    def test_a_convolution_on_tiny_maps_is_torchs(self):
        for height, width, stride in ((1, 1, 1), (2, 2, 1), (2, 2, 2), (1, 2, 1), (3, 2, 2), (4, 4, 2)):
            ours, torchs = model.Conv3x3(6, 5, stride), torch.nn.Conv2d(6, 5, 3, stride, padding=1, bias=False)
            torchs.load_state_dict(ours.state_dict())
            images = torch.randn(4, 6, height, width)
            results = []
            with mock.patch("model.AVX2", True):  # the way of CPUs with AVX2, on any CPU
                for layer in (ours, torchs):
                    inputs = images.clone().requires_grad_()
                    output = layer(inputs)
                    results.append((output, *torch.autograd.grad((output**2).sum(), (inputs, layer.weight))))
            for one, other in zip(*results):
                self.assertEqual(one.shape, other.shape)
                self.assertLess((one - other).abs().max(), 1e-4)

    def test_all_stems_have_the_same_weights(self):
        weights = model.ResNet18(200, stem_stride=4).state_dict()
        for stride, side in ((4, 2), (2, 4), (1, 8)):
            network = model.ResNet18(200, stem_stride=stride)
            network.load_state_dict(weights)
            shapes = {row.name: row.shape for row in model.layers(network, 64)}
            self.assertEqual(shapes["layer4.1.conv2"], (512, side, side))

    def test_the_table_leaves_the_network_as_it_was(self):
        network = model.CustomResNet(5)
        network.layer1.eval()  # as frozen BatchNorms are
        model.layers(network)
        self.assertEqual([module.training for module in (network, network.layer1, network.layer2)], [True, False, True])

    def test_parameters(self):
        for network, expected in ((model.ResNet18(200), 11_279_112), (model.CustomResNet(10), 4_058_122),
                                  (model.CustomResNet(200), 4_106_952)):
            self.assertEqual(sum(p.numel() for p in network.parameters()), expected)
            self.assertEqual(sum(row.parameters for row in model.layers(network)), expected)

    def test_the_smallest_images_that_train_py_allows_are_large_enough(self):
        for name in model.MODELS:
            self.assertEqual(model.create(name, 5, 4).eval()(torch.zeros(1, 3, 22, 22)).shape, (1, 5))

    def test_a_new_network_prefers_no_class(self):
        for name in model.MODELS:
            torch.manual_seed(0)
            logits = model.create(name, 200, stem_stride=4)(torch.randn(32, 3, 32, 32))
            self.assertAlmostEqual(F.cross_entropy(logits, torch.arange(32)).item(), math.log(200), delta=0.5, msg=name)

    def test_the_command_prints_what_its_docstring_says(self):
        code, out, err = call(model)
        self.assertEqual((code, err), (0, ""))
        for words in ("ResNet18: 11,279,112 parameters", "CustomResNet: 4,106,952 parameters", "That gives 38."):
            self.assertIn(words, out)

    def test_multiply_adds_are_the_published_ones(self):
        rows = model.layers(model.ResNet18(1000, stem_stride=4), 224)
        # torchvision's documentation: 1.81 GFLOPS
        self.assertEqual(sum(row.multiply_adds for row in rows), 1_814_073_344)

    def test_receptive_field_is_where_the_gradient_is_not_zero(self):
        odd = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, dilation=2), torch.nn.AvgPool2d(2), torch.nn.Conv2d(4, 5, 3),
                                  torch.nn.Flatten(), torch.nn.Linear(5 * 28 * 28, 2))
        for network, last, expected in ((model.ResNet18(10, 4), "layer4", 435), (model.ResNet18(10, 1), "layer4", 113),
                                        (model.CustomResNet(10), "layer3", 38), (odd, "2", 10)):
            self.assertEqual(model.receptive_field(network), expected)
            for module in network.modules():  # positive everywhere, so that nothing cancels, nothing is cut off
                for name, child in module.named_children():
                    if isinstance(child, torch.nn.MaxPool2d):
                        setattr(module, name, torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
                if isinstance(module, torch.nn.BatchNorm2d):
                    torch.nn.init.ones_(module.weight)
            features = []
            network.get_submodule(last).register_forward_hook(lambda module, inputs, output: features.append(output))
            side = 64 * math.ceil(expected * 1.3 / 64)
            image = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
            network.double().eval()(image)
            middle = features[0].shape[-1] // 2
            gradient, = torch.autograd.grad(features[0][0, 0, middle, middle], image)
            self.assertEqual(((gradient[0, 0] != 0).any(dim=0)).sum(), expected)


class Checkpoints(InFolder):

    def write(self):
        network = model.create("resnet18", 3)
        config = {"model": "resnet18", "stem_stride": 2}
        torch.save({"format": model.FORMAT, "config": config, "classes": ["a", "b", "c"], "epoch": 1, "history": [],
                    "model": network.state_dict(), "optimizer": {}, "scaler": {}}, "good.pt")
        return network

    def test_a_checkpoint_gives_the_network_back(self):
        network = self.write()
        again = model.restore(model.load_checkpoint("good.pt"), "good.pt")
        images = torch.randn(2, 3, 32, 32)
        self.assertTrue(torch.allclose(network.eval()(images), again(images), atol=1e-5))

    def test_a_flipped_byte_a_cut_and_a_pickle_that_runs_code_are_refused(self):
        self.write()
        good = Path("good.pt").read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1  # a single bit of a weight
        cuts = [good[:len(good) * i // 5] for i in range(5)]
        runs_code = functools.partial(os.mkdir, "broken-in")
        torch.save({"model": runs_code}, "code.pt")
        for content in (bytes(flipped), good.replace(b"/version", b"/\x85ersion"), *cuts, b"text",
                        pickle.dumps(runs_code), Path("code.pt").read_bytes()):
            Path("bad.pt").write_bytes(content)
            with self.assertRaisesRegex(ValueError, "bad.pt"):
                model.load_checkpoint("bad.pt")
        self.assertFalse(Path("broken-in").exists())

    def test_another_format_is_refused(self):
        self.write()
        checkpoint = torch.load("good.pt")
        del checkpoint["format"]
        for change, message in (
                ({"format": 1}, f"bad.pt: has format 1, this train.py reads {model.FORMAT}"),
                ({}, "bad.pt: not a checkpoint"),
                ({"format": model.FORMAT, "history": None}, "bad.pt: not a checkpoint.*'history'")):
            torch.save({**checkpoint, **change}, "bad.pt")
            with self.assertRaisesRegex(model.UsageError, message):
                model.load_checkpoint("bad.pt")

    def test_weights_of_another_network_are_refused_by_name(self):
        self.write()
        checkpoint = model.load_checkpoint("good.pt")
        for change in ({"classes": ["a"]}, {"config": {"model": "customresnet", "stem_stride": 2}}):
            with self.assertRaisesRegex(ValueError, "good.pt.*do not fit"):
                model.restore({**checkpoint, **change}, "good.pt")


class Schedule(unittest.TestCase):

    def test_one_cycle_is_torchs_at_every_step(self):
        weight = torch.nn.Parameter(torch.zeros(1))
        combinations = itertools.product((5, 97), (0.05, 0.3, 0.61, 1.0), (2.0, 25.0), (10.0, 1e4), ("cos", "linear"),
                                         ((0.85, 0.95), (0.9, 0.9)))
        for total, pct_start, div, final_div, anneal, (low, high) in combinations:
            optimizer = torch.optim.SGD([weight], lr=1, momentum=0.9)
            theirs = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.35, total, pct_start=pct_start, div_factor=div, final_div_factor=final_div,
                anneal_strategy=anneal, cycle_momentum=low != high, base_momentum=low, max_momentum=high)
            for step in range(total):
                lr, momentum = train.one_cycle(step, total, 0.35, pct_start, div, final_div, anneal, low, high)
                self.assertAlmostEqual(lr, optimizer.param_groups[0]["lr"], delta=1e-12)
                self.assertAlmostEqual(momentum, optimizer.param_groups[0]["momentum"], delta=1e-12)
                optimizer.step()
                if step < total - 1:
                    theirs.step()

    def test_the_loss_is_torchs_cross_entropy_with_label_smoothing(self):
        logits, (labels, others), share = torch.randn(32, 7), torch.randint(7, (2, 32)), torch.rand(32)
        for smoothing in (0.0, 0.1, 0.5):
            ours = train.smoothed_nll_loss(F.log_softmax(logits, dim=1), labels, others, torch.ones(32), smoothing)
            theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            self.assertAlmostEqual(ours.item(), theirs.item(), places=5)
            mixed = share[:, None] * F.one_hot(labels, 7) + (1 - share[:, None]) * F.one_hot(others, 7)
            ours = train.smoothed_nll_loss(F.log_softmax(logits, dim=1), labels, others, share, smoothing)
            theirs = F.cross_entropy(logits, mixed, label_smoothing=smoothing)
            self.assertAlmostEqual(ours.item(), theirs.item(), places=5)

    def test_weight_decay_is_for_convolutions_and_the_linear_layer_only(self):
        network = model.ResNet18(5)
        decayed, rest = train.make_optimizer(network, 5e-4).param_groups
        self.assertEqual(rest["weight_decay"], 0)
        kept = {id(p) for module in network.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
                for p in (module.weight,)}
        self.assertEqual({id(p) for p in decayed["params"]}, kept)

    def test_a_step_is_torchs_sgd_on_torchs_cross_entropy(self):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        twin, scaler = copy.deepcopy(network), torch.amp.GradScaler("cpu", enabled=False)
        learner = train.Learner(network, train.make_optimizer(network, 0.01), scaler, torch.float32)
        groups = [{"params": [twin[1].weight], "weight_decay": 0.01}, {"params": [twin[1].bias]}]
        theirs = torch.optim.SGD(groups, lr=0.3, momentum=0.8, nesterov=True)
        for _ in range(3):
            images, (labels, others), share = torch.randn(8, 3, 2, 2), torch.randint(5, (2, 8)), torch.rand(8)
            train.train_step(learner, (images, labels, others, share), 0.1, 0.3, 0.8)
            mixed = share[:, None] * F.one_hot(labels, 5) + (1 - share[:, None]) * F.one_hot(others, 5)
            theirs.zero_grad()
            F.cross_entropy(twin(images), mixed, label_smoothing=0.1).backward()
            theirs.step()
        torch.testing.assert_close(network.state_dict(), twin.state_dict(), atol=1e-5, rtol=0)

    def test_a_step_that_gradscaler_skips_leaves_no_trace(self):
        """Also where it is the very first one, before there is any momentum; what follows is torch's plain SGD."""
        network, images, scaler = torch.nn.Linear(200, 30), torch.randn(8, 200), torch.amp.GradScaler("cpu")
        plain = copy.deepcopy(network)
        ours, torchs = train.make_optimizer(network, 0), torch.optim.SGD(plain.parameters(), 0.1, 0.9, nesterov=True)
        for factor in (math.inf, 1, 1):
            ours.zero_grad()
            scaler.scale(network(images).square().mean() * factor).backward()
            scaler.step(ours)
            scaler.update()
            if factor == 1:
                torchs.zero_grad()
                plain(images).square().mean().backward()
                torchs.step()
        torch.testing.assert_close(network.weight, plain.weight, atol=1e-5, rtol=0)

    def test_the_last_epoch_has_the_last_resolution_and_each_its_share(self):
        args = mock.Mock(epochs=50, resolutions=[32, 32, 48])
        sides = [train.resolution_at(epoch, args) for epoch in range(1, 51)]
        self.assertEqual(sides, sorted(sides))
        self.assertEqual((sides.count(32), sides.count(48)), (33, 17))
        self.assertEqual(train.resolution_at(1, mock.Mock(epochs=1, resolutions=[32, 48])), 48)


# ---------------------------------------------------------------------------------------------------------------------
# Data

WORDS = {"n03": "ice lolly, lollipop", "n01": "German shepherd", "n02": "crane, bird", "n04": "crane, machine"}
COLOURS = {"n03": (200, 60, 60), "n01": (60, 200, 60), "n02": (60, 60, 200), "n04": (190, 190, 40)}


def write_tree(folder, train_images=10, val_images=4):
    """A Tiny ImageNet of four classes, each of one colour; the last training image of each class is grey."""
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in
                                              [*WORDS.items(), ("n09", "not among the classes")]))
    (folder / "val" / "images").mkdir(parents=True)
    annotations, rng = [], np.random.default_rng(0)

    def write(path, colour):
        noise = rng.integers(-20, 20, (64, 64, 1))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=95)

    for number, wnid in enumerate(WORDS):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        boxes = []
        for i in range(train_images):
            write(images / f"{wnid}_{i}.JPEG", COLOURS[wnid])
            boxes.append(f"{wnid}_{i}.JPEG\t{number}\t{i}\t{number + 20}\t{i + 30}\n")
        with Image.open(images / f"{wnid}_{i}.JPEG") as image:
            image.convert("L").save(images / f"{wnid}_{i}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
        for i in range(val_images):
            name = f"val_{number * val_images + i}.JPEG"
            write(folder / "val" / "images" / name, COLOURS[wnid])
            annotations.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))


class TinyImageNet(InFolder):

    def setUp(self):
        super().setUp()
        self.tree = self.folder / "data" / "tiny-imagenet-200"
        write_tree(self.tree)

    def load(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            dataset = data.load("tiny-imagenet", "data")
        self.said = err.getvalue()
        return dataset

    def test_labels_carry_the_right_names(self):
        dataset = self.load()
        self.assertEqual(dataset.images.shape, (56, 3, 64, 64))
        self.assertEqual(dataset.class_names, ["German shepherd", "crane, bird", "ice lolly", "crane, machine"])
        for image, label, box, is_val in zip(dataset.images, dataset.labels, dataset.boxes, dataset.official_val):
            mean = image.float().mean(dim=(1, 2))
            if mean.max() - mean.min() > 5:  # not a grey one
                wnid = min(COLOURS, key=lambda w: (torch.tensor(COLOURS[w]) - mean).abs().sum())
                self.assertEqual(dataset.wnids[label], wnid)
                self.assertEqual(dataset.class_names[label].split(",")[0], WORDS[wnid].split(",")[0])
            number = list(WORDS).index(dataset.wnids[label])
            self.assertEqual(box.tolist()[::2], [0, 64] if is_val else [number, number + 21])
        self.assertEqual(dataset.official_val.sum(), 16)
        first = data.load("tiny-imagenet", "data", classes=2)
        self.assertEqual(first.class_names, dataset.class_names[:2])
        self.assertTrue(torch.equal(first.images, dataset.images[dataset.labels < 2]))

    def test_images_are_what_pillow_decodes(self):
        dataset = self.load()
        with Image.open(self.tree / "train" / "n01" / "images" / "n01_0.JPEG") as image:
            self.assertTrue((dataset.images[0].permute(1, 2, 0).numpy() == np.asarray(image)).all())

    def test_the_second_start_reads_the_cache_and_a_changed_folder_is_noticed(self):
        first = self.load()
        with mock.patch.object(data, "decode", side_effect=AssertionError):
            again = self.load()
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(first[1:5], again[1:5])))
        path = self.tree / "train" / "n02" / "images" / "n02_3.JPEG"
        Image.new("RGB", (64, 64), "white").save(path)
        changed = self.load()
        self.assertIn("another state", self.said)
        self.assertEqual((changed.images != first.images).flatten(1).any(dim=1).sum(), 1)
        Path("data/tiny-imagenet-200.pt").write_bytes(b"not a cache")
        self.assertTrue(torch.equal(self.load().images, changed.images))

    def test_what_is_wrong_with_the_folder_is_named(self):
        images = self.tree / "train" / "n02" / "images"
        jpeg = (images / "n02_0.JPEG").read_bytes()
        size = jpeg.index(b"\xff\xc0") + 5  # where the header has it
        buffer = io.BytesIO()
        Image.new("RGB", (63, 64)).save(buffer, "JPEG")
        boxes = self.tree / "train" / "n03" / "n03_boxes.txt"
        annotations = self.tree / "val" / "val_annotations.txt"
        lines = annotations.read_text().splitlines(keepends=True)
        faults = [  # file, its new content or None for none, what the error must name
            (images / "n02_0.JPEG", jpeg[:len(jpeg) // 2], "n02_0.JPEG"),
            (images / "n02_0.JPEG", b"", "n02_0.JPEG"),
            (images / "n02_0.JPEG", b"hello", "n02_0.JPEG"),
            (images / "n02_0.JPEG", jpeg[:size] + b"\xff\xff\xff\xff" + jpeg[size + 4:], "n02_0.JPEG"),
            (images / "n02_0.JPEG", buffer.getvalue(), "63x64"),
            (images / "n02_0.JPEG", None, "n02_0.JPEG: No such file"),
            (boxes, None, "n03_boxes.txt"),
            (boxes, b"n03_0.JPEG\t1\t2\t3\n", "line 1"),
            (boxes, b"n03_0.JPEG\t1\t2\t%d\t9\n" % 10**30, "a box of '1 2 10000"),
            (self.tree / "words.txt", b"n01\tGerman shepherd\n", "n02"),
            (self.tree / "wnids.txt", None, "wnids.txt"),
            (annotations, "".join(lines[1:]).encode(), "ice lolly"),
            (annotations, "".join(["val_0.JPEG\tn77\t0\t0\t63\t63\n", *lines[1:]]).encode(), "n77"),
        ]
        for path, content, word in faults:
            good = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            with self.subTest(word), self.assertRaisesRegex(data.DataError, word):
                self.load()
            path.write_bytes(good)
        (images / "._n02_0.JPEG").write_bytes(b"macOS")
        annotations.write_bytes("".join(lines).replace("\n", "\r\n").encode("utf-8-sig"))
        self.assertEqual(len(self.load().labels), 56)
        annotations.write_bytes(b"")
        with self.assertRaisesRegex(data.DataError, "val: its text files name no images"):
            self.load()

    def test_what_a_killed_process_left_is_removed_but_not_what_is_being_written(self):
        old, new = (Path(f"data/.tiny-imagenet-200.pt.{number}") for number in (1, 2))
        old.write_bytes(b"")
        new.write_bytes(b"")
        os.utime(old, (0, 0))
        self.load()
        self.assertEqual((old.exists(), new.exists()), (False, True))

    def test_a_folder_that_cannot_be_written_is_read_all_the_same(self):
        with mock.patch.object(torch, "save", side_effect=PermissionError(13, "read-only")):
            self.assertEqual(len(self.load().labels), 56)
        self.assertIn("cannot be written", self.said)

    def test_a_picture_of_fewer_than_five_classes_or_images(self):
        self.assertEqual(call(data, "--out", "samples.png")[0], 0)
        with Image.open("samples.png") as picture:
            self.assertEqual(picture.height, 4 * 192)  # a row for each of the four classes
        shutil.rmtree("data")
        write_tree(self.tree, train_images=1, val_images=1)
        self.assertEqual(call(data, "--out", "few.png")[0], 0)
        with Image.open("few.png") as picture:
            self.assertEqual(picture.height, 4 * 192)

    def test_what_cannot_be_written_is_one_line(self):
        Path("file").write_text("mine")
        unwritable = "cannot be written (Not a directory)"
        for flag, path, why in (("--out", "file/x.png", unwritable), ("--export-coco", "file/x.json", unwritable),
                                ("--out", ".", "is a folder: name a file")):
            self.assertRefused(call(data, flag, path), f"{path}: {why}")
        self.assertEqual(Path("file").read_text(), "mine")

    def test_the_boxes_become_a_coco_file(self):
        code, out, err = call(data, "--export-coco", "boxes.json")
        self.assertEqual((code, err), (0, ""))
        coco = json.loads(Path("boxes.json").read_text())
        self.assertEqual([len(coco[key]) for key in ("images", "annotations", "categories")], [56, 56, 4])
        self.assertEqual(coco["annotations"][0]["bbox"], [1, 0, 21, 31])
        self.assertEqual(coco["categories"][coco["annotations"][0]["category_id"]]["name"], "German shepherd")


class Download(InFolder):

    def setUp(self):
        super().setUp()
        write_tree(self.folder / "made" / "tiny-imagenet-200", 2, 1)
        with zipfile.ZipFile("tiny.zip", "w") as archive:
            for path in sorted(Path("made").rglob("*")):
                archive.write(path, path.relative_to("made"))
        self.zip = Path("tiny.zip").read_bytes()
        self.answer = self.zip
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", len(test.zip))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(test.answer)
            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"
        self.enterContext(mock.patch.object(data, "URL", url))
        self.enterContext(mock.patch.object(data, "MD5", hashlib.md5(self.zip).hexdigest()))

    def refused(self):
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(data.DataError) as caught:
            data.load("tiny-imagenet", "data")
        self.assertFalse(Path("data/tiny-imagenet-200").exists())
        return str(caught.exception)

    def test_a_good_download_is_extracted_and_read(self):
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(len(data.load("tiny-imagenet", "data").labels), 12)
        names = ["tiny-imagenet-200", "tiny-imagenet-200.pt", "tiny-imagenet-200.zip"]
        self.assertEqual(sorted(os.listdir("data")), names)

    def test_a_cut_or_changed_download_is_refused_and_leaves_nothing(self):
        for answer in (self.zip[:len(self.zip) // 2], b"x" + self.zip[1:]):
            self.answer = answer
            self.assertIn("--dataset shapes", self.refused())
            self.assertEqual(os.listdir("data"), [])

    def test_without_a_network_the_user_is_told_where_to_put_the_file(self):
        with mock.patch.object(data, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip"):
            self.assertIn(str(Path("data/tiny-imagenet-200.zip")), self.refused())

    def test_a_cut_or_damaged_zip_file_is_named(self):
        Path("data").mkdir()
        path = Path("data/tiny-imagenet-200.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("tiny-imagenet-200/wnids.txt", "n01\n" * 1000)
        damaged = bytearray(path.read_bytes())
        damaged[30 + len("tiny-imagenet-200/wnids.txt")] = 0xFF  # the first byte of the stream: no such kind of block
        for content in (damaged, *(self.zip[:int(len(self.zip) * share)] for share in (0.1, 0.5, 0.9))):
            path.write_bytes(content)
            self.assertIn("tiny-imagenet-200.zip: not the whole zip file", self.refused())


def numbered(count, classes=2):
    """A data set whose image i has i as its red and green values: i % 256 and i // 256."""
    number = torch.arange(count)
    images = torch.stack([number % 256, number // 256, number * 0], dim=1).to(torch.uint8)
    return data.Dataset("numbered", images[:, :, None, None].expand(-1, -1, 64, 64).contiguous(), number % classes,
                        torch.tensor([[0, 0, 64, 64]]).repeat(count, 1), number < 0,
                        list("abcdefghij"[:classes]), list("abcdefghij"[:classes]))


class SplitsAndBatches(unittest.TestCase):

    def test_the_split_takes_385_and_165_of_each_class(self):
        dataset = numbered(1)._replace(labels=torch.arange(5500) % 10, class_names=list("abcdefghij"))
        train_part, val_part = data.split(dataset, "70-30", seed=3)
        self.assertEqual(torch.cat([train_part, val_part]).sort().values.tolist(), list(range(5500)))
        self.assertEqual(dataset.labels[train_part].bincount().tolist(), [385] * 10)
        self.assertTrue(torch.equal(train_part, data.split(dataset, "70-30", seed=3)[0]))
        self.assertFalse(torch.equal(train_part, data.split(dataset, "70-30", seed=4)[0]))
        official = data.split(dataset._replace(official_val=torch.arange(5500) < 500), "official")
        self.assertEqual([part.tolist() for part in official], [list(range(500, 5500)), list(range(500))])

    def seen(self, batches, epoch=1):
        """Which images of numbered() the batches hold, in order, and the batches' sizes."""
        values, sizes = [], []
        for images, labels, *_ in batches.epoch(epoch, 32):
            pixels = (images[:, :2, 16, 16] * torch.tensor(data.STD[:2]) + torch.tensor(data.MEAN[:2])) * 255
            ids = pixels.round().long()
            values += (ids[:, 0] + 256 * ids[:, 1]).tolist()
            sizes.append(len(labels))
            assert (labels == torch.tensor(values[-len(labels):]) % 2).all()
        return values, sizes

    def test_an_epoch_sees_every_image_once_also_on_several_processes(self):
        dataset, indices = numbered(601), torch.arange(601)
        whole, sizes = self.seen(data.Batches(dataset, indices, 100, "cpu", True))
        self.assertEqual(sorted(whole), list(range(601)))
        self.assertEqual((len(sizes), min(sizes)), (7, 85))  # no last batch of a single image
        shares = [self.seen(data.Batches(dataset, indices, 100, "cpu", True, rank=rank, world_size=3))[0]
                  for rank in range(3)]
        self.assertEqual(sorted(sum(shares, [])), list(range(601)))
        self.assertEqual(self.seen(data.Batches(dataset, indices, 100, "cpu", False))[0], list(range(601)))

    def test_validation_images_are_torchvisions_centre_crops_of_the_training_crops_mean_area(self):
        images = numbered(7)._replace(images=torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
        for min_crop, side in ((1.0, 64), (0.35, 52), (0.08, 48)):
            (batch, *_), = data.Batches(images, torch.arange(7), 7, "cpu", False, min_crop).epoch(0, side)
            self.assertLess((batch - (center_crop(images.images, [side, side]) / 255 - mean) / std).abs().max(), 1e-4)
            crops = data.random_crops(10_000, min_crop, torch.Generator().manual_seed(0))
            area = (crops[:, 0, 0] * crops[:, 1, 1]).abs().mean()
            self.assertAlmostEqual((side / 64)**2, area.item(), delta=0.03)

    def test_an_epoch_depends_on_seed_and_number_alone(self):
        dataset = data.shapes(per_class=2)
        batches = [data.Batches(dataset, torch.arange(20), 20, "cpu", True, 0.3, 0.5, seed) for seed in (0, 0, 1)]
        (a, *_), = batches[0].epoch(5, 64)
        list(batches[1].epoch(1, 64))
        self.assertTrue(torch.equal(a, next(batches[1].epoch(5, 64))[0]))
        self.assertFalse(torch.equal(a, next(batches[0].epoch(6, 64))[0]))
        self.assertFalse(torch.equal(a, next(batches[2].epoch(5, 64))[0]))

    def test_a_crop_is_torchvisions_and_a_flip_is_torchs(self):
        images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
        plain = data.prepare(images, 64)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
        self.assertLess((plain - (images / 255 - mean) / std).abs().max(), 1e-4)
        for top, left, height, width, flip in ((0, 0, 64, 64, 1), (8, 16, 32, 32, 1), (0, 40, 16, 24, -1)):
            theta = torch.tensor([[[flip * width / 64, 0, (2 * left + width) / 64 - 1],
                                   [0, height / 64, (2 * top + height) / 64 - 1]]])
            expected = resize(plain[:, :, top:top + height, left:left + width], [48, 48], antialias=False)
            expected = expected.flip(3) if flip < 0 else expected
            inner = slice(2, -2)  # at its border a crop sees the pixels beside it; a picture cut out before does not
            self.assertLess((data.prepare(images, 48, theta) - expected)[:, :, inner, inner].abs().max(), 1e-2)
        self.assertLess((data.prepare(images, 32) - F.avg_pool2d(plain, 2)).abs().max(), 1e-2)
        enlarged = resize(plain, [96, 96], antialias=False)  # at the border, too: no zeros come in from outside
        self.assertLess((data.prepare(images, 96) - enlarged).abs().max(), 1e-3)

    def test_crops_are_of_every_size_and_place_inside_the_image(self):
        theta = data.random_crops(20_000, 0.3, torch.Generator().manual_seed(0))
        width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
        self.assertLessEqual((theta[:, :, 2].abs() + torch.stack([width, height], 1)).max(), 1 + 1e-6)
        self.assertAlmostEqual((theta[:, 0, 0] < 0).float().mean().item(), 0.5, delta=0.02)
        area = width * height
        self.assertGreater(area.min(), 0.299)
        self.assertLess((area < 0.31).float().mean(), 0.05)
        self.assertGreater((area < 0.4).float().mean(), 0.1)
        self.assertAlmostEqual(torch.maximum(width / height, height / width).max().item(), 4 / 3, delta=0.03)
        for axis, side in enumerate((width, height)):
            place = (theta[:, axis, 2] / (1 - side))[side < 0.99]  # -1 is left or top, 1 is right or bottom
            self.assertAlmostEqual(place.std().item(), 3**-0.5, delta=0.02)
        whole = data.random_crops(100, 1.0, torch.Generator().manual_seed(0))
        self.assertTrue(torch.equal(whole.abs(), torch.eye(2, 3).expand(100, 2, 3)))

    def test_cutmix_shares_the_label_out_as_the_pixels(self):
        images = torch.arange(4.)[:, None, None, None].expand(4, 3, 20, 20)
        patch = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.5], [0.2, 0.9, 0.0], [0.5, 0.5, 1.0]])
        mixed, labels, others, share = data.cut_mix(images, torch.arange(4), patch)
        self.assertEqual((labels.tolist(), others.tolist()), ([0, 1, 2, 3], [3, 2, 1, 0]))
        for image, own, other, part in zip(mixed, labels, others, share):
            self.assertAlmostEqual((image == own).float().mean().item(), part.item(), places=6)
            self.assertTrue(((image == own) | (image == other)).all())
        self.assertEqual([round(part.item(), 4) for part in share], [0.75, 0.9375, 1, 0])
        self.assertTrue((mixed[0, :, 5:15, 5:15] == 3).all())

    def test_patches_have_every_area_with_the_probability_asked_for(self):
        patch = data.random_patches(20_000, 0.4, torch.Generator().manual_seed(0))
        side = patch[:, 2]
        self.assertAlmostEqual((side > 0).float().mean().item(), 0.4, delta=0.02)
        self.assertAlmostEqual((side[side > 0] ** 2).mean().item(), 0.5, delta=0.02)
        self.assertAlmostEqual(patch[:, :2].std().item(), 12**-0.5, delta=0.02)  # of any place


class Shapes(unittest.TestCase):

    def test_the_box_holds_the_shape_and_nothing_but_the_shape_differs(self):
        dataset = data.shapes(seed=1, per_class=30)
        self.assertEqual(dataset.labels.bincount().tolist(), [30] * 10)
        self.assertTrue(torch.equal(dataset.images, data.shapes(seed=1, per_class=30).images))
        self.assertFalse(torch.equal(dataset.images, data.shapes(seed=2, per_class=30).images))
        for image, (x0, y0, x1, y1) in zip(dataset.images.float().mean(dim=1), dataset.boxes.tolist()):
            self.assertTrue(0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64)
            outside = torch.ones(64, 64, dtype=torch.bool)
            outside[y0:y1, x0:x1] = False
            if outside.any():
                self.assertGreater(image[~outside].mean(), image[outside].mean())  # the shape is the lighter one
        colours = dataset.images.float().mean(dim=(2, 3))
        means = torch.stack([colours[dataset.labels == label].mean(dim=0) for label in range(10)])
        self.assertLess(means.std(dim=0).max(), colours.std(dim=0).max() / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Training

FLAGS = ("--resolutions", "22", "--stem-stride", "4", "--batch-size", "8", "--device", "cpu", "--precision", "fp32")


def history(folder):
    """history.csv without the seconds, which no two runs share."""
    with open(Path(folder) / "history.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class Training(InFolder):

    def setUp(self):
        super().setUp()
        write_tree(self.folder / "data" / "tiny-imagenet-200")

    def start(self, *arguments, launcher=()):
        """train.py as a process of its own, with as many threads as we have: sums depend on their number."""
        return subprocess.Popen([sys.executable, *launcher, HERE / "train.py", *map(str, arguments)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})

    def assertSameRun(self, one, other):
        self.assertEqual(history(one), history(other))
        weights = [model.load_checkpoint(Path(folder) / "last.pt")["model"] for folder in (one, other)]
        for name, tensor in weights[0].items():
            self.assertTrue(torch.equal(tensor, weights[1][name]), name)

    def test_shapes_are_learned(self):
        dataset = data.shapes(per_class=160)
        some = torch.where((dataset.labels == 0) | (dataset.labels == 6))[0]  # circles and bars
        part, rest = some[:240], some[240:]
        args = mock.Mock(epochs=8, resolutions=[32], max_lr=0.05, label_smoothing=0.1)
        torch.manual_seed(0)
        network = model.create("resnet18", 10, stem_stride=4)
        optimizer, scaler = train.make_optimizer(network, 5e-4), torch.amp.GradScaler("cpu", enabled=False)
        learner = train.Learner(network, optimizer, scaler, torch.float32)
        batches = data.Batches(dataset, part, 20, "cpu", True)
        progress = data.Progress(quiet=True)
        for epoch in range(1, args.epochs + 1):
            train.train_epoch(learner, batches, args, epoch, progress)
        loss, accuracy, predicted, confidence = train.evaluate(
            network, data.Batches(dataset, rest, 50, "cpu", False), 32, torch.float32, progress)
        self.assertGreater(accuracy, 0.8)  # chance: 0.5
        self.assertAlmostEqual(accuracy, (predicted == dataset.labels[rest]).float().mean().item(), places=6)
        with torch.no_grad():
            logits = network(data.prepare(dataset.images[rest], 32))
        self.assertAlmostEqual(loss, F.cross_entropy(logits, dataset.labels[rest]).item(), places=4)
        self.assertTrue(torch.allclose(confidence, logits.softmax(dim=1).max(dim=1).values, atol=1e-4))

    def test_a_run_trains_on_augmented_training_images_at_the_schedules_rates(self):
        with (mock.patch.object(data, "Batches", wraps=data.Batches) as made, mock.patch.object(train, "finish"),
              mock.patch.object(train, "train_step", wraps=train.train_step) as steps):
            self.assertEqual(call(train, "--epochs", 2, "--out", "run", *FLAGS)[0], 0)
        for used, part, augment in zip(made.call_args_list, data.split(data.load()), (True, False), strict=True):
            self.assertTrue(torch.equal(used.args[1], part))
            self.assertIs(used.args[4], augment)
        self.assertEqual(made.call_args_list[0].args[5:7], (0.35, 0.5))  # crops, CutMix
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, pct_start=0.2)
        self.assertEqual(steps.call_count, 10)
        for used in steps.call_args_list:
            group = optimizer.param_groups[0]
            np.testing.assert_allclose(used.args[2:], (0.1, group["lr"], group["momentum"]), atol=1e-9)
            optimizer.step(), theirs.step()
        best = max(float(row["val_accuracy"]) for row in history("run"))
        self.assertEqual(model.load_checkpoint("run/best.pt")["history"][-1]["val_accuracy"], best)

    def test_the_rehearsal_leaves_no_trace(self):
        dataset = data.shapes(per_class=2)
        batches = data.Batches(dataset, torch.arange(20), 10, "cpu", True)
        network = model.create("resnet18", 10, stem_stride=4).train()
        before, seen = copy.deepcopy(network.state_dict()), []
        network.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
        learner = train.Learner(network, train.make_optimizer(network, 0), None, torch.float32)
        train.rehearse(learner, batches, mock.Mock(resolutions=[48, 22]))
        self.assertEqual(seen, [(10, 3, 48, 48)])
        for name, tensor in network.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]), name)
        self.assertEqual([p.grad for p in network.parameters() if p.grad is not None], [])

    def test_the_report_tells_best_from_worst_and_actual_from_predicted(self):
        labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 0, 1, 1])
        table = train.tabulate_classes(["a", "b", "c"], labels, predicted)
        for row in ("| a | 100.0% | c | 0.0% |", "| c | b | 2 |", "| b | a | 1 |"):
            self.assertIn(row, table)

    def test_a_run_leaves_a_report_and_another_run_leaves_it_alone(self):
        for folder in ("runs/tiny-imagenet-resnet18", "runs/tiny-imagenet-resnet18-2"):
            code, out, err = call(train, "--epochs", 2, *FLAGS)
            self.assertEqual(code, 0)
            self.assertNotIn("Warning", err)
            self.assertIn(f"{folder}/report.md", out)
        self.assertSameRun("runs/tiny-imagenet-resnet18", "runs/tiny-imagenet-resnet18-2")
        folder = Path(folder)
        self.assertEqual([row["epoch"] for row in history(folder)], ["1", "2"])
        self.assertEqual((folder / "history.csv").read_text().splitlines()[0],
                         "epoch,resolution,lr,train_loss,train_accuracy,val_loss,val_accuracy,seconds")
        report = (folder / "report.md").read_text()
        last = model.load_checkpoint(folder / "last.pt")["history"][-1]
        self.assertIn(f"**{last['val_accuracy']:.2%} validation accuracy** after 2 epochs", report)
        for word in ("German shepherd", "40 training images, 16 validation images"):
            self.assertIn(word, report)
        for name in ("curves.png", "misclassified.png", "gradcam.png"):
            with Image.open(folder / name) as picture:
                picture.load()
        self.assertRefused(call(train, "--epochs", 2, "--out", folder, *FLAGS), folder, "there already")
        Path("link").symlink_to("a folder that is not there")
        self.assertRefused(call(train, "--epochs", 2, "--out", "link/run", *FLAGS), "link/run", "broken link")

    def test_the_range_test_finds_where_the_loss_is_lowest(self):
        with mock.patch.object(train.find_lr, "__defaults__", (20,)):  # steps
            code, out, err = call(train, "--find-lr", "--out", "lr.png", *FLAGS)
        self.assertEqual((code, err), (0, ""))
        rows = re.findall(r"learning rate +([0-9.]+), loss ([0-9.]+)", out)
        rates, losses = (np.array(column, float) for column in zip(*rows))
        means = [losses[max(0, i - 5):i + 6].mean() for i in range(len(rows))]
        suggested = float(re.search(r"lowest at ([0-9.e+-]+):", out)[1])
        self.assertAlmostEqual(means[np.abs(rates / suggested - 1).argmin()], min(means), delta=2e-3)
        self.assertEqual("trust it no more" in out, min(means) > 0.97 * means[0])
        self.assertEqual((float(rows[0][0]), len({rate for rate, _ in rows})), (0.001, len(rows)))
        self.assertEqual(Path("lr.png").read_bytes()[:4], b"\x89PNG")

    def test_a_killed_run_resumes_to_the_same_weights(self):
        self.assertEqual(call(train, "--epochs", 4, "--out", "whole", *FLAGS)[0], 0)
        process = self.start("--epochs", 4, "--out", "killed", *FLAGS)
        while process.poll() is None and not Path("killed/history.csv").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        self.assertLess(len(history("killed")), 4)
        self.assertEqual(call(train, "--resume", "killed", "--device", "cpu")[0], 0)
        self.assertSameRun("whole", "killed")

    def test_ctrl_c_says_how_to_go_on(self):
        """To the same weights, also where another device has left the momentum in another order in memory."""
        self.enterContext(mock.patch.object(train, "finish"))
        self.assertEqual(call(train, "--epochs", 2, "--out", "whole", *FLAGS)[0], 0)
        train_epoch = train.train_epoch

        def stop(learner, batches, args, epoch, progress):
            if epoch == 2:
                signal.raise_signal(signal.SIGINT)
            return train_epoch(learner, batches, args, epoch, progress)

        with mock.patch.object(train, "train_epoch", stop):
            code, _, err = call(train, "--epochs", 2, "--out", "a run", *FLAGS)
        self.assertEqual((code, len(history("a run"))), (130, 1))
        self.assertIn("python train.py --resume 'a run' --device cpu", err)
        checkpoint = torch.load("a run/last.pt")
        for state in checkpoint["optimizer"]["state"].values():
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        torch.save(checkpoint, "a run/last.pt")
        self.assertEqual(call(train, "--resume", "a run", "--device", "cpu")[0], 0)
        self.assertSameRun("whole", "a run")

    def test_two_processes_train_one_network(self):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        process = self.start("--epochs", 2, "--out", "two", *FLAGS, launcher=launcher)
        printed, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, printed)
        self.assertEqual(printed.count("epoch  2/2"), 1, printed)  # the first process alone speaks, and writes
        self.assertIn("2 processes", printed)
        self.assertIn("torchrun --nproc_per_node=2 train.py --epochs 2", Path("two/report.md").read_text())
        # What they found, each on its half of the validation images, is what one finds on all with the saved weights.
        checkpoint, dataset = model.load_checkpoint("two/last.pt"), data.load()
        batches = data.Batches(dataset, data.split(dataset)[1], 1000, "cpu", False, min_crop=0.35)
        network, progress = model.restore(checkpoint, "two/last.pt"), data.Progress(quiet=True)
        loss, accuracy, _, _ = train.evaluate(network, batches, 22, torch.float32, progress)
        last = checkpoint["history"][-1]
        self.assertEqual((last["epoch"], last["val_accuracy"]), (2, accuracy))
        self.assertAlmostEqual(last["val_loss"] / loss, 1, places=5)

    def test_what_cannot_work_is_refused_in_one_line(self):
        self.assertEqual(call(train, "--epochs", 1, "--out", "good", *FLAGS)[0], 0)
        before = {path: path.read_bytes() for path in Path("good").iterdir()}
        for arguments, *words in (
                (("--epochs", 0), "--epochs 0"),
                (("--batch-size", 1000), "--batch-size 1000", "at most 40"),
                (("--batch-size", 1), "--batch-size 1", "two images"),
                (("--classes", 1), "--classes 1", "at least 2"),
                (("--max-lr", 1e6), "loss", "learning rate", "--max-lr"),
                (("--data-dir", "nowhere"), "nowhere"),
                (("--resolutions", 21), "21"),
                (("--resolutions", 10**6), "1000000", "1024"),
                (("--find-lr", "--out", "good"), "--out good", "picture"),
                (("--device", "meta"), "meta"),
                (("--device", "cuda:99"), "cuda:99"),
                (("--resume", "good", "--epochs", 9), "--epochs"),
                (("--resume", "good", "--out", "bad"), "--out bad"),
                (("--resume", "nowhere"), "nowhere")):
            arguments = arguments if "--resume" in arguments else (*FLAGS, "--out", "bad", *arguments)
            with self.subTest(arguments), mock.patch.object(data, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip"):
                self.assertRefused(call(train, *arguments), *words)
        checkpoint = torch.load("good/last.pt")
        for change in ({"classes": ["one"]}, {"model": model.create("customresnet", 4).state_dict()}):
            os.makedirs("other", exist_ok=True)
            torch.save({**checkpoint, **change}, "other/last.pt")
            self.assertRefused(call(train, "--resume", "other", "--device", "cpu"), "other/last.pt")
        self.assertEqual(before, {path: path.read_bytes() for path in Path("good").iterdir()})

    def test_full_memory_is_said_in_one_line(self):
        for script, flags, cure in (train, FLAGS, "--batch-size"), (gradcam, ["runs/a"], "--device cpu"):
            for words in ("MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory"):
                with mock.patch.object(script, "run", side_effect=RuntimeError(words)):
                    self.assertRefused(call(script, *flags), "memory is full", cure)
            with mock.patch.object(script, "run", side_effect=RuntimeError("a bug")), self.assertRaises(RuntimeError):
                call(script, *flags)

    def test_the_benchmark_measures_each_resolution_also_where_an_epoch_is_one_batch(self):
        code, out, err = call(train, "--benchmark", *FLAGS, "--resolutions", 22, 24, "--batch-size", 40)
        self.assertEqual((code, err), (0, ""))
        for resolution in (22, 24):
            self.assertRegex(out, rf"\n *{resolution} +[\d,]+ img/s +[\d,]+ img/s +-?[\d.]+% +(\d+%(, )?){{4}}\n")

    def test_a_full_disk_leaves_the_last_checkpoint(self):
        save, saved = torch.save, []

        def fill(state, path):
            if sum("last.pt" in str(path) for path in saved) == 2:  # at the start, and after the first epoch
                raise OSError(28, "No space left on device")
            saved.append(path)
            save(state, path)

        with mock.patch.object(torch, "save", fill):
            self.assertRefused(call(train, "--epochs", 2, "--out", "full", *FLAGS), "full/", "No space left",
                               "--resume full")
        self.assertEqual(model.load_checkpoint("full/last.pt")["epoch"], 1)
        self.assertEqual(call(train, "--resume", "full", "--device", "cpu")[0], 0)
        self.assertEqual(len(history(Path("full"))), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Grad-CAM

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def resnet():
    """With random BatchNorms: nothing in it is zero, one or the same for all channels, as it is in a fresh network."""
    torch.manual_seed(0)
    network = model.ResNet18(10, stem_stride=4).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.2)
    return network


def pictures(count=3, side=48, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pooled(*layers):
    """A network of these layers, each of whose last feature maps is averaged to the logit of a class."""
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def scaled(cam):
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-30)


class GradCamFormula(unittest.TestCase):
    def test_last_layer_of_a_network_with_a_linear_head_gives_cam(self):
        """Zhou et al. 2016: there Grad-CAM is the class's weights times the activations, rectified.

        No gradient is needed.
        """
        network, images, classes = resnet(), pictures(), torch.tensor([0, 7, 3])
        with torch.no_grad():
            x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
            features = network.layer4(network.layer3(network.layer2(network.layer1(x))))
            cam = (network.fc.weight[classes][:, :, None, None] * features).sum(1).relu()
            expected = scaled(F.interpolate(cam[:, None], (48, 48), mode="bilinear")[:, 0])
        actual = gradcam.GradCAM(network, ["layer4"])(images, classes)["layer4"]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    def test_weights_are_what_finite_differences_say_the_score_gains(self):
        """In float64: strengthen one feature map of layer2 a little at every position, and see what the score gains."""
        network, image, step = resnet().double(), pictures(1, 32).double(), 1e-6
        with torch.no_grad():
            features = network.layer2(network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(image))))))
            bump = step * torch.eye(128, dtype=torch.float64)[:, :, None, None]  # in the i-th image in the i-th channel
            up, down = (network.fc(network.avgpool(network.layer4(network.layer3(features + sign * bump))).flatten(1))
                        for sign in (1, -1))
            cam = torch.einsum("c,chw->hw", (up - down)[:, 4], features[0]).relu()
        expected = scaled(F.interpolate(cam[None, None], (32, 32), mode="bilinear")[:, 0])
        actual = gradcam.GradCAM(network, ["layer2"])(image, torch.tensor([4]))["layer2"]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    def test_torchvisions_network_gives_the_same_maps_as_ours_with_its_weights(self):
        ours, theirs = resnet(), torchvision.models.resnet18(num_classes=10).eval()
        theirs.load_state_dict(ours.state_dict())
        names = ["conv1", "bn1", "layer1", "layer3.1.conv2", "layer4"]  # an inplace ReLU follows bn1
        for name, maps in gradcam.GradCAM(theirs, names)(pictures()).items():
            torch.testing.assert_close(maps, gradcam.GradCAM(ours, [name])(pictures())[name], atol=1e-5, rtol=0)
            self.assertEqual(maps.shape, (3, 48, 48))

    def test_a_layer_before_an_inplace_relu_is_seen_as_it_was(self):
        def maps(inplace):
            torch.manual_seed(0)
            network = pooled(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace), torch.nn.Conv2d(8, 5, 3))
            return gradcam.GradCAM(network, ["0"])(pictures())["0"]

        torch.testing.assert_close(maps(inplace=True), maps(inplace=False))

    def test_the_predicted_class_is_explained_unless_another_is_asked_for(self):
        network, images = resnet(), pictures(4)
        cam = gradcam.GradCAM(network, LAYERS)
        default = cam(images)
        with torch.no_grad():
            logits = network(images)
        torch.testing.assert_close(cam.logits, logits)
        predicted, other = logits.argmax(1), logits.argmin(1)
        torch.testing.assert_close(default, cam(images, predicted))
        self.assertFalse(torch.allclose(default["layer4"], cam(images, other)["layer4"], atol=0.1))

    def test_maps_fill_zero_to_one(self):
        for maps in gradcam.GradCAM(resnet(), LAYERS)(pictures()).values():
            self.assertEqual(maps.amin((1, 2)).tolist(), [0, 0, 0])
            self.assertEqual(maps.amax((1, 2)).tolist(), [1, 1, 1])
        flat = gradcam.GradCAM(resnet(), ["layer4"])(pictures(9, 32), torch.arange(9))["layer4"]
        self.assertEqual(flat.abs().max(), 0)  # one position: nothing to compare
        network = pooled(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
        network[2].weight.data.fill_(-1)  # nothing speaks for either class: no division of zero by zero
        self.assertEqual(gradcam.GradCAM(network, ["1"])(pictures())["1"].abs().max(), 0)


class GradCamAnywhere(unittest.TestCase):
    def setUp(self):
        self.images, self.classes = pictures(), torch.tensor([1, 2, 3])
        self.expected = gradcam.GradCAM(resnet(), LAYERS)(self.images, self.classes)

    def check(self, network, images=None):
        actual = gradcam.GradCAM(network, LAYERS)(self.images if images is None else images, self.classes)
        torch.testing.assert_close(actual, self.expected, atol=1e-5, rtol=0)

    def test_frozen_weights(self):
        self.check(resnet().requires_grad_(False))

    def test_inside_no_grad_and_inference_mode(self):
        with torch.no_grad():
            self.check(resnet())
            self.check(resnet().requires_grad_(False))
        with torch.inference_mode():
            images = self.images + 0
        network = resnet()
        self.check(network, images)
        with torch.inference_mode():
            self.check(network, images)

    def test_train_mode(self):
        self.check(resnet().train())

    def test_distributed_data_parallel(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            self.check(torch.nn.parallel.DistributedDataParallel(resnet()))
            self.check(torch.compile(torch.nn.parallel.DistributedDataParallel(resnet()), backend="eager"))
        finally:
            torch.distributed.destroy_process_group()

    def test_compiled_networks(self):
        self.check(torch.compile(resnet(), backend="eager"))
        network = resnet()
        network.compile(backend="eager")
        with torch.no_grad():
            network(self.images)  # compiled without hooks, as it has been at the end of a training
        self.check(network)

    def test_no_image_changes_the_map_of_another(self):
        for mode in (True, False):
            cam, images = gradcam.GradCAM(resnet().double().train(mode), LAYERS), self.images.double()
            together = cam(images, self.classes)
            for i in range(3):
                alone = cam(images[i:i + 1], self.classes[i:i + 1])
                for name in LAYERS:
                    torch.testing.assert_close(together[name][i:i + 1], alone[name], atol=1e-9, rtol=0)

    def test_leaves_no_trace_also_after_an_exception(self):
        network = resnet().train()
        network.layer2.eval()
        network.layer1.requires_grad_(False)
        network.fc.weight.grad = torch.ones_like(network.fc.weight)
        images = self.images.requires_grad_()

        def trace():
            tensors = [*network.state_dict().values(), network.fc.weight.grad]
            return ([(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                     for name, m in network.named_modules()],
                    [(name, p.requires_grad, p.grad is None) for name, p in network.named_parameters()],
                    images.grad, [hash(tensor.numpy().tobytes()) for tensor in tensors])

        before = trace()
        gradcam.GradCAM(network, LAYERS)(images)
        self.assertEqual(trace(), before)
        for layers, *arguments in (
                (LAYERS, images, torch.tensor([99] * 3)),  # no such class
                (LAYERS, torch.zeros(2, 5, 64, 64)),  # five channels
                (["layer1", "fc"], images)):  # fc has no feature maps
            with self.assertRaises((RuntimeError, ValueError, IndexError)):
                gradcam.GradCAM(network, layers)(*arguments)
            self.assertEqual(trace(), before)

    def test_layers_that_are_not_there_or_yield_no_maps_are_named(self):
        with self.assertRaisesRegex(ValueError, r"'layer5'.*conv1.*layer1.*layer4\.1\.bn2.*fc"):
            gradcam.GradCAM(resnet(), ["layer1", "layer5"])
        with self.assertRaisesRegex(ValueError, "begins with 'layer': name some of 0, 1"):
            gradcam.GradCAM(pooled(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU()))
        with self.assertRaisesRegex(ValueError, "'fc'.*no feature maps"):
            gradcam.GradCAM(resnet(), ["fc"])(self.images)
        network = resnet()
        network.spare = torch.nn.Conv2d(3, 3, 1)
        with self.assertRaisesRegex(ValueError, "does not use.*'spare'"):
            gradcam.GradCAM(network, ["spare"])(self.images)

    def test_networks_of_others(self):
        class Odd(torch.nn.Module):
            """Begins inplace; has a layer under no_grad, and one behind a detach(); may end with a dict."""
            def __init__(self, as_dict):
                super().__init__()
                self.frozen, self.seen, self.unseen = (torch.nn.Conv2d(3, 3, 1) for _ in range(3))
                self.as_dict = as_dict

            def forward(self, x):
                x.sub_(0.5)
                with torch.no_grad():
                    self.frozen(x)
                logits = (self.seen(x) + self.unseen(x).detach()).mean((2, 3))
                return {"logits": logits} if self.as_dict else logits

        maps = gradcam.GradCAM(Odd(False), ["seen", "unseen"])(self.images, torch.zeros(3, dtype=torch.long))
        self.assertEqual(maps["unseen"].abs().max(), 0)
        self.assertEqual(maps["seen"].shape, (3, 48, 48))
        with self.assertRaisesRegex(ValueError, "'frozen'.*no_grad"):
            gradcam.GradCAM(Odd(False), ["frozen"])(self.images)
        with self.assertRaisesRegex(ValueError, "no logits"):
            gradcam.GradCAM(Odd(True), ["seen"])(self.images)
        with self.assertRaises(IndexError):  # two classes for three images
            gradcam.GradCAM(resnet(), ["layer4"])(self.images, torch.tensor([1, 2]))


class GradCamMeasures(unittest.TestCase):
    def test_measures_equal_a_count_pixel_by_pixel(self):
        rng = np.random.default_rng(0)
        maps = rng.integers(0, 4, (30, 9, 12)).astype(np.float32)  # small numbers: many pixels share the maximum
        maps[0] = 0
        corners = np.sort(rng.integers(0, 9, (30, 2, 2)), axis=1)
        boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1)
        for heat, (x0, y0, x1, y1), (pointing, energy) in zip(
                maps, boxes, gradcam.measure(torch.tensor(maps), torch.tensor(boxes)).tolist()):
            cells = [(heat[y, x], y0 <= y < y1 and x0 <= x < x1) for y in range(9) for x in range(12)]
            hits = [inside for value, inside in cells if value == max(cells)[0]]
            self.assertAlmostEqual(pointing, sum(hits) / len(hits), places=5)
            total = sum(value for value, _ in cells)
            share = sum(value for value, inside in cells if inside) / total if total else (y1 - y0) * (x1 - x0) / 108
            self.assertAlmostEqual(energy, share, places=5)

    def test_a_network_that_finds_the_bright_spot_is_given_full_marks(self):
        """Dark images with one bright square each, the box around it, and a network that adds up brightness."""
        torch.manual_seed(0)
        count, images, corner = 40, torch.zeros(40, 3, 64, 64, dtype=torch.uint8), torch.randint(6, 43, (40, 2))
        for image, (x, y) in zip(images, corner.tolist()):
            image[:, y:y + 16, x:x + 16] = 255
        labels = torch.arange(count) % 2  # the network says 0, always
        boxes, names = torch.cat([corner, corner + 16], 1), ["a", "b"]
        dataset = data.Dataset("dots", images, labels, boxes, labels == 0, names, names)
        network = pooled(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU())
        network[0].weight.data[:], network[0].bias.data[:] = torch.tensor([1.0, 0.5])[:, None, None, None], 0.0
        for min_crop, side in ((1.0, 64), (0.35, 52)):  # fed whole images, or what is left without a margin
            with contextlib.redirect_stderr(io.StringIO()) as log, mock.patch("data.Progress.due", return_value=True):
                log.isatty = lambda: True
                text = gradcam.evaluate(gradcam.GradCAM(network, ["1"]), dataset, torch.arange(count), side, min_crop,
                                        batch_size=7)
            self.assertIn("40 validation images, 20 of them predicted correctly, 20 wrongly", text)
            self.assertIn("40 of 40 images", log.getvalue())
            self.assertEqual(log.getvalue().count("\n"), 0)  # one line, that moves
            table = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
            rows = {name: numbers for name, *numbers in table}
            self.assertEqual(rows["1"], ["100.0"] * 6)
            self.assertEqual(rows["chance: a flat map"], [f"{100 * (16 / side)**2:.1f}"] * 6)
            dead = pooled(torch.nn.Conv2d(3, 2, 1, bias=False), torch.nn.ReLU())
            dead[0].weight.data.zero_()  # its maps are flat, so they get what chance gets
            text = gradcam.evaluate(gradcam.GradCAM(dead, ["1"]), dataset, torch.arange(count), side, min_crop)
            flat, chance = (line.split("|")[2:] for line in text.splitlines()[4:6])
            self.assertEqual(flat, chance)
            middle = ((corner <= 31) & (corner + 16 > 32)).all(1).float()
            self.assertAlmostEqual(float(rows["a point at the centre"][0]), 100 * middle.mean().item(), delta=2.6)


class GradCamCommand(InFolder):
    @classmethod
    def setUpClass(cls):
        cls.dataset = data.shapes(0, per_class=10)
        config = {"dataset": "shapes", "data_dir": "data", "split": "70-30", "model": "resnet18", "stem_stride": 4,
                  "resolutions": [16, 32], "min_crop": 1.0, "classes": None, "seed": 0}
        cls.checkpoint = {"format": model.FORMAT, "config": config, "classes": cls.dataset.class_names,
                          "model": resnet().state_dict(), "epoch": 1, "history": [{"resolution": 16}], "optimizer": {},
                          "scaler": {}}
        rng = np.random.default_rng(0)
        cls.pixels = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)

    def setUp(self):
        super().setUp()
        torch.save(self.checkpoint, self.folder / "last.pt")

    def command(self, *arguments):
        """Runs gradcam.py in this process -> (exit code, stdout, stderr)."""
        with mock.patch.object(data, "load", lambda *_: self.dataset):
            return call(gradcam, "--device", "cpu", *arguments)

    def test_the_grid_has_a_row_per_layer_and_a_column_per_image(self):
        (self.folder / "best.pt").write_bytes((self.folder / "last.pt").read_bytes())
        other = self.folder / "best.pt", "--target", "actual", "--layers", "layer2,layer4.0.conv1"
        with mock.patch.object(gradcam, "draw", wraps=gradcam.draw) as draw:
            self.assertEqual(self.command(self.folder)[0], 0)
            self.assertEqual(self.command(*other)[0], 0)
        (images, maps, titles, *_), (images_again, others, *_) = (call.args for call in draw.call_args_list)
        self.assertTrue(torch.equal(images, images_again))
        self.assertEqual([list(maps), list(others)], [LAYERS, ["layer2", "layer4.0.conv1"]])
        self.assertFalse(torch.allclose(maps["layer2"], others["layer2"]))
        for text in titles:
            predicted, actual = text.split("\n")
            self.assertNotEqual(predicted.removeprefix("predicted: "), actual.removeprefix("actual: "))
        for name in ("gradcam.png", "gradcam-best-layer2,layer4.0.conv1-actual.png"):
            with Image.open(self.folder / name) as picture:
                self.assertEqual(picture.format, "PNG")

    def test_the_evaluation_is_of_the_validation_images(self):
        self.assertIn("on 30 validation images", self.command(self.folder, "--evaluate")[1])

    def test_maps_are_zero_in_the_margin_that_the_network_is_not_shown(self):
        images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
        for heat in gradcam.maps_of(gradcam.GradCAM(resnet(), LAYERS[:3]), images, None, 64, 0.35).values():
            self.assertEqual(heat[:, 6:58, 6:58].amax((1, 2)).tolist(), [1, 1, 1])
            self.assertTrue(torch.equal(heat, F.pad(heat[:, 6:58, 6:58], [6] * 4)))

    def test_titles_do_not_overlap(self):
        """Long names are wrapped: measured on the drawn picture, no title reaches into another or out of the figure.

        Nor does the name of a layer reach into an image.
        """
        import matplotlib.pyplot as plt
        title = gradcam.title("predicted: Walker hound, Walker foxhound, $\\frac antelope of the dunes",
                              "actual: " + "Donau" * 40)
        maps = {"layer4.1.conv2": torch.rand(6, 64, 64), "fc": torch.zeros(6, 64, 64)}
        with mock.patch.object(plt, "close"):
            gradcam.draw(self.dataset.images[:6], maps, [title] * 6, "heading", self.folder / "t.png")
        figure = plt.gcf()
        boxes = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
        boxes += [text.get_window_extent() for text in figure.texts]
        self.assertEqual(len(boxes), 6 + 4)
        self.assertIn("fc\n(flat)", [text.get_text() for text in figure.texts])
        boxes += [axis.get_window_extent() for axis in figure.axes]
        for i, one in enumerate(boxes):
            self.assertTrue(one.x0 >= 0 and one.x1 <= figure.bbox.x1 and one.y1 <= figure.bbox.y1, one)
            self.assertFalse(any(one.overlaps(other) for other in boxes[:i]))
        plt.close(figure)

    def test_pictures_of_every_kind_are_read_alike(self):
        """One picture in many guises: all give what torchvision's resize and centre crop give of the plain one."""
        plain = Image.fromarray(self.pixels)
        grey = plain.convert("L")
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held sideways: turn by 90 degrees clockwise
        sixteen_bits = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        guises = {"plain.png": (plain, {}),
                  "rgba.png": (plain.convert("RGBA"), {}),
                  "exif.png": (plain.rotate(90), {"exif": exif}),
                  "large.png": (plain.resize((960, 960), 0), {}),
                  "still.webp": (plain, {"lossless": True}),
                  "moving.png": (plain, {"save_all": True, "append_images": [grey.convert("RGB")]})}
        greys = {"grey.png": (grey, {}),
                 "grey16.png": (sixteen_bits, {}),
                 "grey-alpha.png": (grey.convert("LA"), {}),
                 "palette.gif": (grey.convert("P"), {})}
        for expected, group in ((plain, guises), (grey.convert("RGB"), greys)):
            resized = pil_to_tensor(resize(expected, 64)).int()
            for name, (picture, options) in group.items():
                picture.save(self.folder / name, **options)
                self.assertLessEqual((gradcam.read_picture(self.folder / name) - resized).abs().max(), 8, name)
        wide = plain.resize((288, 96))
        wide.save(self.folder / "wide.png")
        middle = wide.crop((96, 0, 192, 96)).resize((64, 64), Image.Resampling.BILINEAR)
        off = gradcam.read_picture(self.folder / "wide.png") - pil_to_tensor(middle).float()
        self.assertLess(off.abs().mean(), 1)
        Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(self.folder / "clear.png")
        self.assertEqual(gradcam.read_picture(self.folder / "clear.png").min(), 255)

    def test_own_pictures_get_their_five_likeliest_classes(self):
        Image.fromarray(self.pixels).save(self.folder / "own.png")
        code, out, err = self.command(self.folder, "--layers", "layer3", self.folder / "own.png")
        self.assertEqual((code, err), (0, ""))
        square = gradcam.read_picture(self.folder / "own.png")[None]
        with torch.no_grad():  # 16: the resolution of the last epoch, not the 32 that was to come
            best = model.restore(self.checkpoint, "").eval()(data.prepare(square, 16)).softmax(1)[0].topk(5)
        names = [self.dataset.class_names[i] for i in best.indices]
        expected = [f"{100 * p:7.1f} %  {name}" for p, name in zip(best.values.tolist(), names)]
        self.assertEqual(out.splitlines()[1:6], expected)
        self.assertTrue((self.folder / "pictures.png").exists())
        os.rename(self.folder / "own.png", self.folder / "猫$\\frac|.png")  # not in the font; no formula
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            self.assertEqual(self.command(self.folder, self.folder / "猫$\\frac|.png")[0], 0)
        self.assertEqual([str(w.message) for w in caught if w.category is UserWarning], [])

    def test_bad_input_is_one_line_that_names_the_file(self):
        folder = self.folder
        (folder / "notes.txt").write_text("not\na picture")
        Image.fromarray(self.pixels).save(folder / "whole.png")
        (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:300])
        cases = [(folder / name, [folder, folder / name]) for name in ("notes.txt", "half.png", "missing.jpg", ".")]
        cases += [(folder / "no" / "last.pt", [folder / "no"]),
                  ("layer9", [folder, "--layers", "layer9"]),
                  ("warp", [folder, "--device", "warp"]),
                  (folder / "no", [folder, "--out", folder / "no" / "x.png"])]
        for name, arguments in cases:
            self.assertRefused(self.command(*arguments), "gradcam.py: ", name)


# ---------------------------------------------------------------------------------------------------------------------
# Anchors and annotation files


def made_boxes(n=500, seed=0):
    """Widths and heights around four shapes."""
    rng = np.random.default_rng(seed)
    shapes = np.array([[20, 30], [60, 40], [150, 200], [300, 120]])
    return shapes[rng.integers(0, 4, n)] * np.exp(rng.normal(0, 0.3, (n, 2)))


def made_coco(images=20, boxes=200, classes=3, seed=0):
    """A COCO file as a dictionary, keys in COCO's own order, with polygons and a crowd."""
    rng = random.Random(seed)
    annotations = []
    for i in range(boxes):
        w, h = rng.uniform(20, 300), rng.uniform(20, 200)
        x, y = round(rng.uniform(0, 640 - w), 2), round(rng.uniform(0, 480 - h), 2)
        polygon = {"counts": [1, 2], "size": [480, 640]} if i == 0 else [[x, y, x + w, y, x + w, y + h], [1.5, 2]]
        annotations.append({"segmentation": polygon, "area": w * h, "iscrowd": int(i == 0),
                            "image_id": 100 + i % images, "bbox": [x, y, round(w, 2), round(h, 2)],
                            "category_id": 1 + rng.randrange(classes), "id": i})
    return {"info": {"note": '"segmentation": [[ {]} \\'}, "annotations": annotations,
            "images": [{"id": 100 + i, "width": 640, "height": 480} for i in range(images)],
            "categories": [{"id": 1 + c, "name": f"class {c}"} for c in range(classes)]}


class Anchors(unittest.TestCase):
    def test_iou_equals_counted_pixels(self):
        rng = np.random.default_rng(1)
        boxes, anchors = rng.integers(1, 20, (30, 2)), rng.integers(1, 20, (4, 2))
        canvas = lambda box: np.pad(np.ones((box[1], box[0]), bool), ((0, 20 - box[1]), (0, 20 - box[0])))
        counted = [[(canvas(b) & canvas(a)).sum() / (canvas(b) | canvas(a)).sum() for a in anchors] for b in boxes]
        np.testing.assert_allclose(iou(boxes.astype(float), anchors.astype(float)), counted, rtol=1e-12)

    def test_anchors_are_as_good_as_an_exhaustive_search(self):
        """k = 2 on a few boxes: all pairs of anchors on a fine grid of sizes are tried."""
        boxes = made_boxes(25, seed=3)
        grid = np.stack(np.meshgrid(*[np.geomspace(10, 500, 60)] * 2), -1).reshape(-1, 2)
        scores = iou(boxes, grid)                                                    # (25, 3600)
        best = max(np.maximum(scores[:, [i]], scores).mean(axis=0).max() for i in range(0, len(grid)))
        for seed in range(3):
            self.assertGreater(kmeans(boxes, 2, seed)[1], best - 5e-4)

    def test_no_anchor_can_be_bettered_and_seeds_agree(self):
        boxes, rng = made_boxes(2000), np.random.default_rng(0)
        found = [kmeans(boxes, 5, seed) for seed in range(3)]
        self.assertLess(max(score for _, score in found) - min(score for _, score in found), 5e-4)
        anchors, score = found[0]
        self.assertAlmostEqual(score, iou(boxes, anchors).max(axis=1).mean(), places=9)
        for size in (0.01, 0.05, 0.3) * 60:
            moved = anchors * np.exp(rng.normal(0, size, anchors.shape) * (rng.random((5, 1)) < 0.4))
            self.assertLess(iou(boxes, moved).max(axis=1).mean(), score + 2e-5)
        self.assertTrue((np.diff(anchors.prod(axis=1)) >= 0).all())

    def test_frequent_boxes_count_more_and_rare_ones_are_found(self):
        boxes = np.repeat([[10, 10], [40, 40], [42, 42]], [90, 5, 5], axis=0)
        self.assertAlmostEqual(kmeans(boxes, 1)[0][0, 0], 10, delta=0.1)
        rng = np.random.default_rng(0)
        shapes = np.repeat(np.exp(rng.uniform(1, 7, (12, 2))), [400] * 6 + [20] * 6, axis=0)
        self.assertGreater(kmeans(shapes * np.exp(rng.normal(0, 0.01, shapes.shape)), 12)[1], 0.98)  # 12 clusters

    def test_extreme_boxes_end_in_finite_anchors(self):
        rng = np.random.default_rng(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for trial in range(60):
                spread, count = rng.choice([0, 0.1, 1, 7]), rng.integers(3, 200)
                boxes = np.exp(rng.normal(0, spread, (count, 2))) * [1, 10.0 ** rng.integers(-6, 7)]
                k = min(int(rng.integers(1, 6)), len(np.unique(boxes, axis=0)))
                if trial % 3 == 0 and k == 1:
                    boxes = boxes[rng.integers(0, len(boxes), 400)]
                anchors, score = kmeans(boxes, k, trial)
                self.assertTrue(np.isfinite(anchors).all() and anchors.min() > 0 and 0 < score <= 1 + 1e-12)

    def test_bad_rows_are_named(self):
        for value in (np.nan, np.inf, 0, -1):
            boxes = made_boxes(10)
            boxes[7, 1] = value
            with self.assertRaisesRegex(ValueError, "row 7"):
                kmeans(boxes, 3)
        for boxes, k in ((np.empty((0, 2)), 1), (made_boxes(10), math.inf), (made_boxes(10), 1.5)):
            with self.assertRaisesRegex(ValueError, "at least one box"):
                kmeans(boxes, k)
        self.assertEqual(kmeans(made_boxes(10), 2.0)[1], kmeans(made_boxes(10), 2)[1])
        with self.assertRaisesRegex(ValueError, "2 different boxes"):
            kmeans([[1, 2], [3, 4], [1, 2]], 3)


class Analysis(InFolder):
    def write(self, content, name="file.json"):
        content = content if isinstance(content, (str, bytes)) else json.dumps(content)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.folder / name

    def analyse(self, path, *options):
        """Runs coco_analysis.py in this process, with its report in out; any warning is an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return call(coco_analysis, path, "--out", self.folder / "out", *options)

    def without_pictures(self):
        for name in dir(coco_analysis):
            if name.startswith("draw_"):
                self.enterContext(mock.patch.object(coco_analysis, name))

    def test_the_stream_reads_what_json_reads(self):
        """With a window of 50 characters the reader gives the columns of json.load, however the file is laid out.

        Nor does it matter where a window ends, in a number, say, or what else the file has.
        """
        whole = {"version": -12.5e-1, "tracks": [1.25, {"at": [0.5]}], **made_coco(boxes=40)}
        wanted = np.array([a["bbox"] for a in whole["annotations"]])
        layouts = [json.dumps(whole), json.dumps(whole, indent=2), json.dumps(whole, separators=(",", ":")),
                   json.dumps(whole, sort_keys=True)]
        contents = [layout.encode() for layout in layouts]
        contents += [b"\xef\xbb\xbf" + contents[0], gzip.compress(contents[0]),
                     layouts[1].replace("\n", "\r\n").encode()]
        for content, window in [(content, 50) for content in contents] + [(contents[0], n) for n in range(5, 40)]:
            with mock.patch.object(coco_analysis, "WINDOW", window):
                data = coco_analysis.Data(self.write(content))
            np.testing.assert_array_equal(data.bbox, wanted)
            self.assertEqual(data.crowd.tolist(), [a["iscrowd"] == 1 for a in whole["annotations"]])
            classes = [list(data.classes)[c] for c in data.class_row]
            self.assertEqual(classes, [a["category_id"] for a in whole["annotations"]])
            images = [list(data.images)[i] for i in data.image_row]
            self.assertEqual(images, [a["image_id"] for a in whole["annotations"]])

    def test_every_reading_of_bbox_is_recognised(self):
        rng = np.random.default_rng(0)
        size = rng.integers(200, 1200, (2000, 2)).astype(float)
        wh = size * rng.uniform(0.02, 0.7, (2000, 2))
        x, y, w, h = *(rng.uniform(0, 1, (2000, 2)) * (size - wh)).T, *wh.T
        written = {"xywh": (x, y, w, h), "yxwh": (y, x, w, h),
                   "xyxy": (x, y, x + w, y + h), "yxyx": (y, x, y + h, x + w),
                   "cxcywh": (x + w / 2, y + h / 2, w, h)}
        for reading, numbers in written.items():
            shares, best = coco_analysis.try_readings(np.stack(numbers, 1), size)
            self.assertEqual((best, shares[best]), (reading, 1.0))
            scale = (size[:, ::-1] if reading.startswith("y") else size)
            scale = np.hstack([scale, size if reading.endswith("wh") else scale])
            best = coco_analysis.try_readings(np.stack(numbers, 1) / scale, size)[1]
            # As fractions, x1 y1 x2 y2 and y1 x1 y2 x2 are a true tie.
            self.assertEqual(best, reading.replace("yxyx", "xyxy") + "-fraction")
        for reading in ("xywh", "xyxy"):  # without the images' sizes
            self.assertEqual(coco_analysis.try_readings(np.stack(written[reading], 1), size * np.nan)[1], reading)
        self.assertEqual(coco_analysis.try_readings(np.zeros((30, 4)), size[:30] * np.nan)[1], "xywh")  # none fits

    def test_boxes_are_resized_as_the_images_are(self):
        wh, size = np.array([[320.0, 120.0]]), np.array([[640.0, 480.0]])
        for how, wanted in (("stretch", [[208, 104]]), ("letterbox", [[208, 78]])):
            self.assertEqual(coco_analysis.at_input(wh, size, 416, how, False)[0].tolist(), wanted)
        numbers = [{"image_id": 1, "category_id": 1, "bbox": [5, 5, 10 + i, 20]} for i in range(9)]
        code, out, err = self.analyse(self.write(numbers), "--bbox-format", "xywh-fraction", "--k", 2)
        self.assertEqual((code, err), (0, ""))  # fractions far above 1: nonsense, but no traceback
        found, unit = coco_analysis.at_input(wh / size, size * np.nan, 416, "letterbox", True)
        self.assertEqual((found.tolist(), unit), ([[208, 104]], "pixels at 416 x 416, stretch"))

    def test_a_list_of_detections_gets_cocos_names(self):
        whole = made_coco(boxes=40)
        detections = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
                      for a in whole["annotations"]]
        with mock.patch.object(coco_analysis, "WINDOW", 50):
            found = coco_analysis.Data(self.write(detections))
        np.testing.assert_array_equal(found.bbox, [a["bbox"] for a in whole["annotations"]])
        self.assertEqual([found.class_names[c] for c in found.class_row],
                         [("person", "bicycle", "car")[a["category_id"] - 1] for a in whole["annotations"]])

    def test_null_and_numbers_in_quotes_are_read(self):
        whole = made_coco()
        wanted = [a["bbox"] for a in whole["annotations"]]
        whole["images"][3]["width"] = None
        for annotation in whole["annotations"]:
            annotation |= {"iscrowd": None, "bbox": list(map(str, annotation["bbox"]))}
        found = coco_analysis.Data(self.write(whole))
        np.testing.assert_array_equal(found.bbox, wanted)
        self.assertEqual((found.crowd.any(), np.isnan(found.size[:, 0]).sum()), (False, 1))

    def test_the_report_counts_what_is_there(self):
        whole = made_coco()
        _, one, two, three, four, *_ = whole["annotations"]
        whole["annotations"] += [dict(one, id=900), dict(two, image_id=999), dict(three, bbox=[1, 2, 0, 4]),
                                 dict(four, bbox=[float("nan")] * 4)]
        whole["categories"].append({"id": 7, "name": "=$a|b\n狗" + "x" * 200})
        code, out, err = self.analyse(self.write(whole))
        self.assertEqual((code, err), (0, ""))
        for line in ("1 boxes without area: annotations[202]", "1 boxes with NaN", "1 boxes that repeat an earlier one",
                     "1 crowds", "1 annotations whose image does not exist", "1 classes without annotations"):
            self.assertIn(line, out)
        names = ["anchors.json", "anchors.png", "anchors_iou.png", "bbox_distribution.png", "bbox_wh.png",
                 "class_distribution.csv", "class_distribution.png", "report.md"]
        self.assertEqual(sorted(os.listdir("out")), names)
        table = io.StringIO(Path("out/class_distribution.csv").read_text("utf-8"))
        rows = {row["id"]: row for row in csv.DictReader(table)}
        for key in "123":
            mine = [a for a in whole["annotations"] if a["category_id"] == int(key)]
            self.assertEqual(int(rows[key]["boxes"]), sum(not a["iscrowd"] for a in mine))
            self.assertEqual(int(rows[key]["images"]), len({a["image_id"] for a in mine}))
        self.assertTrue(rows["7"]["name"].startswith("'="))
        anchors = json.loads(Path("out/anchors.json").read_text())["anchors"]
        self.assertEqual([len(anchors[k]["width_height"]) for k in "3456"], [3, 4, 5, 6])
        wh = np.array([a["bbox"][2:] for a in whole["annotations"][1:200]]) * 416 / [640, 480]
        score = iou(wh, np.array(anchors["5"]["width_height"])).max(axis=1).mean()
        self.assertAlmostEqual(score, anchors["5"]["mean_iou"], places=4)

    def test_the_assignments_text_file_is_understood(self):
        rng = random.Random(0)
        lines = []
        for _ in range(300):
            width, height = rng.randint(300, 1200), rng.randint(300, 1000)
            w, h = rng.randint(20, width // 2), rng.randint(20, height // 2)
            number, y, x = rng.randrange(80), rng.randint(0, height - h), rng.randint(0, width - w)
            lines.append(f"id: {number}, height: {height}, width: {width}, bbox:[{y}, {x}, {w}, {h}],")
        code, out, err = self.analyse(self.write("\n".join(lines), "boxes.txt"))
        self.assertEqual((code, err), (0, ""))
        self.assertIn("bbox is [y, x, width, height]: 100.0%", out)
        self.assertIn("COCO's names are **assumed**", Path("out/report.md").read_text())

    def test_fewer_anchors_than_asked_for_are_announced(self):
        boxes = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10 * (1 + i % 3), 10]} for i in range(9)]
        for asked in ([5], [2, 5]):
            code, out, err = self.analyse(self.write(boxes), "--k", *asked)
            self.assertIn("more anchors than 3 make no sense", out)

    def test_a_thousand_classes_are_drawn(self):
        classes = [{"id": i, "name": f"class {i}"} for i in range(1000)]
        code, out, err = self.analyse(self.write(made_coco() | {"categories": classes}))
        self.assertEqual((code, err), (0, ""))
        with Image.open("out/class_distribution.png") as picture:
            self.assertGreater(picture.width, 2 * picture.height)  # three panels

    def test_bad_files_get_one_line_and_no_report(self):
        good = json.dumps(made_coco(boxes=20))
        bad = {
            "": "no annotations",
            "hello": "line 1",
            "\x00\xff": "line 1",
            '{"annotations": []}': "no annotations",
            '{"annotations": {}}': "no list",
            '{"a": 1}': "another kind",
            "[1]": "no object",
            '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]': "four numbers",
            "[" * 100000: "nested",
            good[:900]: "cut off",
            good + "x": "behind the end",
            good.encode("utf-16"): "UTF-8",
            good.replace('"bbox"', '"box"'): "no 'bbox'",
            good.replace('"bbox": [', '"bbox": ["x", ', 1): "annotations[0]",
            good.replace(', "id": 3}', ' "id": 3}'): "annotations[3]",
            good.replace('"annotations": [', '"annotations": [' + "9" * 5000 + ","): "limit",
        }
        for content, message in bad.items():
            with self.subTest(content[:50]):
                self.assertRefused(self.analyse(self.write(content)), message)
        Path("out").write_text("mine")
        self.assertRefused(self.analyse(self.write(good)), self.folder / "out")
        self.assertEqual(sorted(os.listdir()), ["file.json", "out"])
        self.assertEqual(Path("out").read_text(), "mine")

    def test_faults_in_a_text_file_are_found_by_their_line(self):
        """The line that an editor shows: counted from 1, blank lines too, also behind the first batch of records."""
        good = "id: 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],"
        bad = {"id: 0, height: 330, width: 1093, bbox:[69, 464, 312],": "'bbox'",
               'id: 0, height: "high", width: 1093, bbox:[69, 464, 312, 175],': "'height'",
               "height: 330, width: 1093, bbox:[69, 464, 312, 175],": "no id",
               "id 0, height: 330, width: 1093, bbox:[69, 464, 312, 175],": "neither JSON"}
        self.enterContext(mock.patch.object(coco_analysis, "BATCH", 7))
        for before in (0, 3, 20):
            for line, message in bad.items():
                text = "\n".join(["", "  ", *[good] * before, line, good])
                result = self.analyse(self.write(text, "boxes.txt"))
                self.assertRefused(result, f"boxes.txt: line {before + 3}: ", message)
        self.without_pictures()
        text = "\n\n".join([good, good, good.replace("312", "0")])
        self.assertIn("1 boxes without area: line 5\n", self.analyse(self.write(text, "boxes.txt"))[1])

    def test_errors_of_the_system_name_the_file_and_no_number(self):
        for path in (self.folder / "nothing.json", self.folder):
            code, out, err = self.analyse(path)
            self.assertRefused((code, out, err), f"coco_analysis.py: {path}: ")
            self.assertNotIn("Errno", err)
            self.assertEqual(err.count(str(path)), 1)
        self.without_pictures()
        report = self.folder / "out/report.md"                      # a folder where the report belongs
        report.mkdir(parents=True)
        code, out, err = self.analyse(self.write(made_coco()))
        self.assertRefused((code, out, err), report)
        self.assertNotIn("Errno", err)

    def test_mutated_files_never_end_in_a_traceback(self):
        self.without_pictures()
        rng, good = random.Random(0), json.dumps(made_coco(images=4, boxes=12)).encode()
        odd = [b"1e400", b"NaN", b"-Infinity", b"null", b"true", b'"12"', b"[]", b"{}", b"-0", b"9" * 400,
               b'"\\ud800"', b"[[[", b"\xff", b"}", b","]
        for _ in range(150):
            at = rng.randrange(len(good))
            mutated = good[:at] + rng.choice(odd) + good[at + rng.randrange(12):]
            code, _, err = self.analyse(self.write(mutated), "--k", 2)
            self.assertIn((code, err.count("\n")), [(0, 0), (2, 1)])

    def test_the_command_works_from_a_shell(self):
        path = self.write(made_coco())
        command = [sys.executable, coco_analysis.__file__, path.name, "--k", "2", "--resize", "letterbox"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue(Path("analysis/file/report.md").exists())


# ---------------------------------------------------------------------------------------------------------------------
# The README


class Readme(unittest.TestCase):

    def test_links_lead_to_what_they_name(self):
        text = (HERE / "README.md").read_text("utf-8")
        links = re.findall(r"\[([^][]+)\]\(([^()#\s]+\.py)#L(\d+)", text)
        self.assertTrue(links)
        for name, file, number in links:
            lines = (HERE / file).read_text("utf-8").split("\n")
            there = "".join(lines[int(number) - 1:int(number)])  # nothing, if the file has fewer lines
            name = name.strip("`")
            self.assertRegex(there, rf"^ *(def|class) {re.escape(name)}\b", f"[{name}]({file}#L{number})")
        pictures = re.findall(r"\]\((assets/[^()\s]+)", text)
        self.assertTrue(pictures)
        for picture in pictures:
            self.assertTrue((HERE / picture).is_file(), picture)


if __name__ == "__main__":
    unittest.main()
