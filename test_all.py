"""The tests: python test_all.py, with the four packages, without a download, in about three minutes on two cores.

    python test_all.py                            # everything
    python test_all.py Networks Schedule          # some of the classes below
    python test_all.py Training.test_a_killed_run_resumes_to_the_same_weights

What we wrote is compared with something that we did not write: torchvision's network, torch's scheduler, a gradient, a
brute-force search. The data is made here: shapes, and a Tiny ImageNet of a few images.
"""
import contextlib
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
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

import data
import model
import train

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
            self.assertEqual((ours(images) - theirs(images)).abs().max(), 0)
        ours.load_state_dict(torchvision.models.resnet18(num_classes=200).state_dict())

    def test_all_stems_have_the_same_weights(self):
        weights = model.ResNet18(200, stem_stride=4).state_dict()
        for stride, side in ((4, 2), (2, 4), (1, 8)):
            network = model.ResNet18(200, stem_stride=stride)
            network.load_state_dict(weights)
            shapes = {row[0]: row[1] for row in model.layers(network, 64)}
            self.assertEqual(shapes["layer4.1.conv2"], (512, side, side))

    def test_parameters(self):
        for network, expected in ((model.ResNet18(200), 11_279_112), (model.CustomResNet(10), 4_058_122),
                                  (model.CustomResNet(200), 4_106_952)):
            self.assertEqual(sum(p.numel() for p in network.parameters()), expected)
            self.assertEqual(sum(row[2] for row in model.layers(network)), expected)

    def test_multiply_adds_are_the_published_ones(self):
        rows = model.layers(model.ResNet18(1000, stem_stride=4), 224)
        self.assertEqual(sum(row[4] for row in rows), 1_814_073_344)  # torchvision's documentation: 1.81 GFLOPS

    def test_receptive_field_is_where_the_gradient_is_not_zero(self):
        networks = (model.ResNet18(10, 4), 435), (model.ResNet18(10, 1), 113), (model.CustomResNet(10), 38)
        for network, expected in networks:
            self.assertEqual(model.receptive_field(network), expected)
            for module in network.modules():  # positive everywhere, so that nothing cancels, nothing is cut off
                for name, child in module.named_children():
                    if isinstance(child, torch.nn.MaxPool2d):
                        setattr(module, name, torch.nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
                if isinstance(module, torch.nn.BatchNorm2d):
                    torch.nn.init.ones_(module.weight)
            last = network.layer4 if hasattr(network, "layer4") else network.layer3
            features = []
            last.register_forward_hook(lambda module, inputs, output: features.append(output))
            side = 64 * math.ceil(expected * 1.3 / 64)
            image = torch.ones(1, 3, side, side, dtype=torch.float64, requires_grad=True)
            network.double().eval()(image)
            middle = features[0].shape[-1] // 2
            gradient, = torch.autograd.grad(features[0][0, 0, middle, middle], image)
            self.assertEqual(((gradient[0, 0] != 0).any(dim=0)).sum(), expected)


class Checkpoints(InFolder):

    def write(self):
        network = model.create("resnet18", 3)
        torch.save({"config": {"model": "resnet18", "stem_stride": 2}, "classes": ["a", "b", "c"], "epoch": 1,
                    "model": network.state_dict()}, "good.pt")
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
        torch.save({"model": functools.partial(os.mkdir, "broken-in")}, "code.pt")
        for content in (bytes(flipped), *cuts, b"text", pickle.dumps(functools.partial(os.mkdir, "broken-in")),
                        Path("code.pt").read_bytes()):
            Path("bad.pt").write_bytes(content)
            with self.assertRaisesRegex(ValueError, "bad.pt"):
                model.load_checkpoint("bad.pt")
        self.assertFalse(Path("broken-in").exists())

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
        logits, labels = torch.randn(32, 7), torch.randint(7, (32,))
        for smoothing in (0.0, 0.1, 0.5):
            ours = train.smoothed_nll_loss(F.log_softmax(logits, dim=1), labels, smoothing)
            self.assertAlmostEqual(ours.item(), F.cross_entropy(logits, labels, label_smoothing=smoothing).item(), places=5)

    def test_weight_decay_is_for_convolutions_and_the_linear_layer_only(self):
        network = model.ResNet18(5)
        decayed, rest = train.make_optimizer(network, 5e-4).param_groups
        self.assertEqual(rest["weight_decay"], 0)
        kept = {id(p) for module in network.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
                for p in (module.weight,)}
        self.assertEqual({id(p) for p in decayed["params"]}, kept)

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
        buffer = io.BytesIO()
        Image.new("RGB", (63, 64)).save(buffer, "JPEG")
        annotations = self.tree / "val" / "val_annotations.txt"
        lines = annotations.read_text().splitlines(keepends=True)
        faults = [  # file, its new content or None for none, what the error must name
            (images / "n02_0.JPEG", jpeg[:len(jpeg) // 2], "n02_0.JPEG"),
            (images / "n02_0.JPEG", b"", "n02_0.JPEG"),
            (images / "n02_0.JPEG", b"hello", "n02_0.JPEG"),
            (images / "n02_0.JPEG", buffer.getvalue(), "63x64"),
            (images / "n02_0.JPEG", None, "crane, bird"),
            (self.tree / "train" / "n03" / "n03_boxes.txt", None, "n03_boxes.txt"),
            (self.tree / "train" / "n03" / "n03_boxes.txt", b"n03_0.JPEG\t1\t2\t3\n", "line 1"),
            (self.tree / "words.txt", b"n01\tGerman shepherd\n", "n02"),
            (self.tree / "wnids.txt", None, "wnids.txt"),
            (annotations, "".join(lines[1:]).encode(), "val_0.JPEG"),
            (annotations, "".join(["val_0.JPEG\tn77\t0\t0\t63\t63\n", *lines[1:]]).encode(), "n77"),
        ]
        for path, content, word in faults:
            good = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            with self.subTest(word), self.assertRaisesRegex(data.DataError, word):
                self.load()
            path.write_bytes(good)
        (images / "._n02_0.JPEG").write_bytes(b"macOS")
        annotations.write_bytes("".join(lines).replace("\n", "\r\n").encode())
        self.assertEqual(len(self.load().labels), 56)

    def test_a_folder_that_cannot_be_written_is_read_all_the_same(self):
        with mock.patch.object(torch, "save", side_effect=PermissionError("read-only")):
            self.assertEqual(len(self.load().labels), 56)
        self.assertIn("cannot be written", self.said)

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
        self.enterContext(mock.patch.object(data, "URL", f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"))
        self.enterContext(mock.patch.object(data, "MD5", hashlib.md5(self.zip).hexdigest()))

    def refused(self):
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(data.DataError) as caught:
            data.load("tiny-imagenet", "data")
        self.assertFalse(Path("data/tiny-imagenet-200").exists())
        return str(caught.exception)

    def test_a_good_download_is_extracted_and_read(self):
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(len(data.load("tiny-imagenet", "data").labels), 12)
        self.assertEqual(sorted(os.listdir("data")), ["tiny-imagenet-200", "tiny-imagenet-200.pt", "tiny-imagenet-200.zip"])

    def test_a_cut_or_changed_download_is_refused_and_leaves_nothing(self):
        for answer in (self.zip[:len(self.zip) // 2], b"x" + self.zip[1:]):
            self.answer = answer
            self.assertIn("--dataset shapes", self.refused())
            self.assertEqual(os.listdir("data"), [])

    def test_without_a_network_the_user_is_told_where_to_put_the_file(self):
        with mock.patch.object(data, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip"):
            self.assertIn(str(Path("data/tiny-imagenet-200.zip")), self.refused())

    def test_a_cut_zip_file_is_named(self):
        Path("data").mkdir()
        for share in (0.1, 0.5, 0.9):
            Path("data/tiny-imagenet-200.zip").write_bytes(self.zip[:int(len(self.zip) * share)])
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

    def seen(self, batches, epoch=1):
        """Which images of numbered() the batches hold, in order, and the batches' sizes."""
        values, sizes = [], []
        for images, labels in batches.epoch(epoch, 32):
            pixels = (images[:, :2, 16, 16] * torch.tensor(data.STD[:2]) + torch.tensor(data.MEAN[:2])) * 255
            ids = pixels.round().long()
            values += (ids[:, 0] + 256 * ids[:, 1]).tolist()
            sizes.append(len(labels))
            assert (labels == torch.tensor(values[-len(labels):]) % 2).all()
        return values, sizes

    def test_an_epoch_sees_every_image_once_also_on_several_processes(self):
        dataset, indices = numbered(601), torch.arange(601)
        whole, sizes = self.seen(data.Batches(dataset, indices, 100, "cpu", True, cutout=0))
        self.assertEqual(sorted(whole), list(range(601)))
        self.assertEqual((len(sizes), min(sizes)), (7, 85))  # no last batch of a single image
        shares = [self.seen(data.Batches(dataset, indices, 100, "cpu", True, 0, rank=rank, world_size=3))[0]
                  for rank in range(3)]
        self.assertEqual(sorted(sum(shares, [])), list(range(601)))
        self.assertEqual(self.seen(data.Batches(dataset, indices, 100, "cpu", False))[0], list(range(601)))

    def test_an_epoch_depends_on_seed_and_number_alone(self):
        dataset = data.shapes(per_class=2)
        batches = [data.Batches(dataset, torch.arange(20), 20, "cpu", True, seed=seed) for seed in (0, 0, 1)]
        (a, _), = batches[0].epoch(5, 64)
        list(batches[1].epoch(1, 64))
        self.assertTrue(torch.equal(a, next(batches[1].epoch(5, 64))[0]))
        self.assertFalse(torch.equal(a, next(batches[0].epoch(6, 64))[0]))
        self.assertFalse(torch.equal(a, next(batches[2].epoch(5, 64))[0]))

    def test_a_crop_is_numpys_padding_and_a_flip_is_torchs(self):
        images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
        plain = data.prepare(images, 64)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
        self.assertLess((plain - (images / 255 - mean) / std).abs().max(), 1e-4)
        padded = torch.from_numpy(np.pad(plain.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), mode="symmetric"))
        for dx, dy, flip in ((0, 0, 1), (8, -3, 1), (-8, 8, -1), (5, 0, -1)):
            theta = torch.tensor([[[flip, 0, dx * 2 / 64], [0, 1, dy * 2 / 64]]])
            expected = padded[:, :, 8 + dy:72 + dy, 8 + dx:72 + dx]
            expected = expected.flip(3) if flip < 0 else expected
            self.assertLess((data.prepare(images, 64, theta) - expected).abs().max(), 1e-2)
        self.assertLess((data.prepare(images, 32) - F.avg_pool2d(plain, 2)).abs().max(), 1e-2)

    def test_cutout_clears_one_square_of_the_right_size(self):
        images = data.cut_out(torch.ones(3, 3, 40, 40), torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.2, 0.9]]), 0.25)
        self.assertEqual((images == 0).sum(dim=(1, 2, 3)).tolist(), [300, 75, 3 * 10 * 9])
        self.assertTrue((images[0, :, 15:25, 15:25] == 0).all())


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

FLAGS = ("--resolutions", "18", "--stem-stride", "4", "--batch-size", "8", "--device", "cpu", "--precision", "fp32")


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
        args = mock.Mock(epochs=5, resolutions=[20], max_lr=0.02, label_smoothing=0.1)
        torch.manual_seed(0)
        network = model.create("resnet18", 10, stem_stride=4)
        optimizer, scaler = train.make_optimizer(network, 5e-4), torch.amp.GradScaler("cpu", enabled=False)
        batches = data.Batches(dataset, part, 20, "cpu", True, cutout=0)
        progress = train.Progress(quiet=True)
        for epoch in range(1, args.epochs + 1):
            train.train_epoch(network, batches, optimizer, scaler, torch.float32, args, epoch, progress)
        loss, accuracy, predicted, confidence = train.evaluate(
            network, data.Batches(dataset, rest, 50, "cpu", False), 20, torch.float32, progress)
        self.assertGreater(accuracy, 0.75)  # chance: 0.5
        self.assertEqual(accuracy, (predicted == dataset.labels[rest]).float().mean().item())
        with torch.no_grad():
            logits = network(data.prepare(dataset.images[rest], 20))
        self.assertAlmostEqual(loss, F.cross_entropy(logits, dataset.labels[rest]).item(), places=4)
        self.assertTrue(torch.allclose(confidence, logits.softmax(dim=1).max(dim=1).values, atol=1e-4))

    def test_a_run_leaves_a_report_and_another_run_leaves_it_alone(self):
        for folder in ("runs/tiny-imagenet-resnet18", "runs/tiny-imagenet-resnet18-2"):
            code, out, err = call(train, "--epochs", 2, *FLAGS)
            self.assertEqual(code, 0)
            self.assertNotIn("Warning", err)
            self.assertIn(f"{folder}/report.md", out)
        self.assertSameRun("runs/tiny-imagenet-resnet18", "runs/tiny-imagenet-resnet18-2")
        folder = Path(folder)
        self.assertEqual([row["epoch"] for row in history(folder)], ["1", "2"])
        self.assertEqual(tuple(csv.DictReader(open(folder / "history.csv")).fieldnames), train.HISTORY)
        report = (folder / "report.md").read_text()
        last = model.load_checkpoint(folder / "last.pt")["history"][-1]
        self.assertIn(f"**{last['val_accuracy']:.2%} validation accuracy** after 2 epochs", report)
        for word in ("German shepherd", "40 training and 16 validation images of 4 classes"):
            self.assertIn(word, report)
        for name in ("curves.png", "misclassified.png", "gradcam.png"):
            with Image.open(folder / name) as picture:
                picture.load()
        self.assertRefused(call(train, "--epochs", 2, "--out", folder, *FLAGS), folder, "there already")

    def test_a_killed_run_resumes_to_the_same_weights(self):
        self.assertEqual(call(train, "--epochs", 4, "--out", "whole", *FLAGS)[0], 0)
        process = self.start("--epochs", 4, "--out", "killed", *FLAGS)
        while process.poll() is None and not Path("killed/history.csv").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        self.assertLess(len(history("killed")), 4)
        self.assertEqual(call(train, "--resume", "killed")[0], 0)
        self.assertSameRun("whole", "killed")

    def test_ctrl_c_says_how_to_go_on(self):
        with mock.patch.object(train, "train_epoch", side_effect=lambda *_: signal.raise_signal(signal.SIGINT)):
            code, _, err = call(train, "--epochs", 1, "--out", "stopped", *FLAGS)
        self.assertEqual(code, 130)
        self.assertIn("python train.py --resume stopped", err)
        self.assertEqual(call(train, "--resume", "stopped")[0], 0)
        self.assertEqual(len(history("stopped")), 1)

    def test_two_processes_train_one_network(self):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        process = self.start("--epochs", 2, "--out", "two", *FLAGS, launcher=launcher)
        printed, _ = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, printed)
        self.assertEqual(printed.count("epoch  2/2"), 1, printed)  # the first process alone speaks, and writes
        self.assertIn("2 processes", printed)
        self.assertEqual(len(history("two")), 2)
        self.assertTrue(Path("two/report.md").exists())

    def test_what_cannot_work_is_refused_in_one_line(self):
        self.assertEqual(call(train, "--epochs", 1, "--out", "good", *FLAGS)[0], 0)
        before = {path: path.read_bytes() for path in Path("good").iterdir()}
        for arguments, *words in (
                (("--epochs", 0), "--epochs 0"),
                (("--batch-size", 1000), "--batch-size 1000", "at most 40"),
                (("--max-lr", 1e30), "loss", "learning rate", "--max-lr"),
                (("--data-dir", "nowhere"), "nowhere"),
                (("--resolutions", 17), "17"),
                (("--device", "cuda:99"), "cuda:99"),
                (("--resume", "good", "--epochs", 9), "--epochs"),
                (("--resume", "nowhere"), "nowhere")):
            arguments = arguments if "--resume" in arguments else (*FLAGS, "--out", "bad", *arguments)
            with self.subTest(arguments), mock.patch.object(data, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip"):
                self.assertRefused(call(train, *arguments), *words)
        checkpoint = torch.load("good/last.pt")
        for change in ({"classes": ["one"]}, {"model": model.create("customresnet", 4).state_dict()}):
            os.makedirs("other", exist_ok=True)
            torch.save({**checkpoint, **change}, "other/last.pt")
            self.assertRefused(call(train, "--resume", "other"), "other/last.pt")
        self.assertEqual(before, {path: path.read_bytes() for path in Path("good").iterdir()})

    def test_a_full_disk_leaves_the_last_checkpoint(self):
        self.assertEqual(call(train, "--epochs", 1, "--out", "whole", *FLAGS)[0], 0)
        before = Path("whole/last.pt").read_bytes()
        with mock.patch.object(torch, "save", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(train.UsageError, "whole/last.pt.*No space left"):
                train.save(Path("whole/last.pt"), {})
        self.assertEqual(Path("whole/last.pt").read_bytes(), before)


if __name__ == "__main__":
    unittest.main()
