"""Data sets: the contract that all keep, what absent and damaged files say, exact counts."""

import contextlib
import pickle
import shutil
import tarfile
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from clfed.data.benchmark import Benchmark
from clfed.data.grouping import leading_groups
from clfed.data.pixels import channel_statistics
from clfed.errors import (
    ConfigError,
    CorruptData,
    MissingData,
    NotEnoughData,
)

CONF = Path(__file__).resolve().parent.parent / "conf" / "data"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
EMBEDDED = {"glyphs", "digits"}
PACKS = {
    "omniglot": "omniglot.npz",
    "cifar10": "cifar10_subset.zip",
    "cifar100": "cifar100.zip",
    "mini_imagenet": "mini_imagenet_subset.npz",
    "mnist": "MNIST/raw/train-images-idx3-ubyte.xz",
    "fashion_mnist": "fashion_mnist_subset.npz",
}


def make(name: str, **options: object) -> Benchmark:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options)
    try:
        benchmark = hydra.utils.instantiate(config)
    except InstantiationException as wrapped:
        assert wrapped.__cause__ is not None
        raise wrapped.__cause__ from wrapped.__cause__.__cause__
    assert isinstance(benchmark, Benchmark)
    return benchmark


@pytest.fixture(scope="module")
def load(packs, tmp_path_factory):
    """Every data set, loaded once for the module from its YAML file."""
    loaded: dict[str, Benchmark] = {}

    def get(name: str) -> Benchmark:
        if name not in loaded:
            root = packs
            if name == "folder":
                root = tmp_path_factory.mktemp("pictures")
                write_pictures(root, {"apple": 3, "pear": 2})
            loaded[name] = make(name, root=str(root))
        return loaded[name]

    return get


def write_pictures(root: Path, counts: dict[str, int], size: int = 9) -> None:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


# --- the contract -------------------------------------------------------------------------------


def test_all_nine_are_configured():
    assert set(NAMES) == EMBEDDED | set(PACKS) | {"folder"}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name, load):
    benchmark = load(name)
    assert benchmark.name == name
    assert benchmark.protocol.endswith(".")
    for images in filter(None, (benchmark.train, benchmark.test)):
        assert images.images.dtype == torch.uint8 and images.images.ndim == 4
        assert images.images.is_contiguous()
        assert images.labels.dtype == torch.int64
        assert images.classes == benchmark.train.classes
        present = set(images.labels.unique().tolist())
        grouped = {name for names in benchmark.groups.values() for name in names}
        assert {images.classes[label] for label in present} == grouped
        assert 0 < images.images.float().mean() < 255
    assert len(benchmark.mean) == len(benchmark.std) == benchmark.train.images.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained_in_the_yaml(name):
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if line[0].isalpha()]
    options = [index for index in keys if not lines[index].startswith(("root", "download"))]
    assert lines[0].startswith("# ")
    for index in options:
        assert lines[index - 1].startswith("# ") and f"clfed data={name}" in lines[index - 1]


@pytest.mark.parametrize(
    ("name", "train", "test", "classes", "groups"),
    [
        ("omniglot", (32460, 1, 28, 28), None, 1623, (787, 177, 659)),
        ("cifar100", (50000, 3, 32, 32), 10000, 100, (40, 10, 50)),
        ("cifar10", (10000, 3, 32, 32), 2000, 10, (5, 0, 5)),
        ("mini_imagenet", (12000, 3, 84, 84), 2000, 100, (64, 16, 20)),
        ("mnist", (60000, 1, 28, 28), 10000, 10, (5, 0, 5)),
        ("fashion_mnist", (5000, 1, 28, 28), 10000, 10, (5, 0, 5)),
        ("digits", (899, 1, 8, 8), 898, 10, (5, 0, 5)),
    ],
)
def test_published_counts(name, train, test, classes, groups, load):
    benchmark = load(name)
    assert tuple(benchmark.train.images.shape) == train
    assert (benchmark.test and len(benchmark.test)) == test
    assert len(benchmark.train.classes) == classes
    assert tuple(map(len, benchmark.groups.values())) == groups


@pytest.mark.parametrize(
    ("name", "each"), [("omniglot", 20), ("cifar100", 500), ("mini_imagenet", 120)]
)
def test_images_a_class(name, each, load):
    train = load(name).train
    assert torch.bincount(train.labels).tolist() == [each] * len(train.classes)


# --- single sets --------------------------------------------------------------------------------


def test_omniglot_names_and_alphabets(load):
    groups = load("omniglot").groups
    alphabets = [{name.split("/")[0] for name in names} for names in groups.values()]
    assert list(map(len, alphabets)) == [25, 5, 20]
    assert not alphabets[0] & alphabets[1]
    assert "Greek/character01" in groups["base"] + groups["validation"]


def test_omniglot_shrinks_like_blocks_of_a_finer_grid():
    from clfed.data.omniglot import shrink

    ink = (torch.rand(1, 105, 105, generator=torch.Generator().manual_seed(0)) > 0.7).byte()
    # 28 x 28 areas of 3.75 pixels: repeat each pixel 4 times, then average blocks of 15.
    fine = ink[0].numpy().repeat(4, 0).repeat(4, 1).reshape(28, 15, 28, 15)
    expected = np.floor(fine.mean((1, 3)) * 255 + 0.5)
    assert np.array_equal(shrink(ink, 28)[0, 0].numpy(), expected)
    assert torch.equal(shrink(ink, 105)[0], ink * 255)


def test_omniglot_ink_is_bright_and_rare(load):
    images = load("omniglot").train.images
    assert 0.04 < images.float().mean() / 255 < 0.12


@pytest.mark.parametrize(("name", "tolerance"), [("cifar10", 5e-3), ("cifar100", 1e-4)])
def test_cifar_statistics_are_the_published_ones(name, tolerance, load):
    benchmark = load(name)
    mean, std = channel_statistics(benchmark.train.images)
    assert np.allclose(mean, benchmark.mean, atol=tolerance)
    assert np.allclose(std, benchmark.std, atol=tolerance)


def test_mnist_statistics_are_the_published_ones(load):
    assert channel_statistics(load("mnist").train.images) == ((0.1307,), (0.3081,))


def test_cifar100_labels_are_alphabetical(load):
    classes = load("cifar100").train.classes
    assert list(classes) == sorted(classes) and classes[0] == "apple"


@pytest.mark.parametrize("part", ["train", "test"])
def test_digits_are_scikit_learns(part):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    half = slice(0 if part == "train" else 1, None, 2)
    benchmark = make("digits", as_features=True, base_classes=0)
    features = getattr(benchmark, part)
    assert features.images.dtype == torch.float32 and benchmark.mean == benchmark.std == ()
    assert np.array_equal(features.images.numpy() * 16, bunch.data[half])
    assert np.array_equal(features.labels.numpy(), bunch.target[half])
    assert benchmark.groups["field"] == tuple("0123456789")
    pictures = getattr(make("digits"), part).images
    assert np.array_equal(np.rint(pictures[:, 0].numpy() / 255 * 16), bunch.images[half])


def test_mini_imagenet_splits(packs, load, monkeypatch):
    from clfed.data import mini_imagenet

    ravi = load("mini_imagenet")
    assert "n01532829" in ravi.groups["base"]  # house finch: first of Ravi's training classes
    assert torch.bincount(ravi.test.labels).tolist() == [20] * 100
    pack = ravi.train, ravi.test, ["train"] * 100
    monkeypatch.setattr(mini_imagenet, "_from_pack", lambda path: pack)
    recon = make("mini_imagenet", root=str(packs), split="recon")
    assert tuple(map(len, recon.groups.values())) == (40, 10, 50)
    flat = sum(recon.groups.values(), ())
    assert list(flat) == sorted(ravi.train.classes) and "not known" in recon.protocol
    with pytest.raises(ConfigError, match="ravi, recon"):
        make("mini_imagenet", split="vinyals")


def test_mini_imagenet_folders(tmp_path):
    for part, name in (("train", "n01"), ("val", "n02"), ("test", "n03")):
        (tmp_path / "mini_imagenet" / part / name).mkdir(parents=True)
        for index in range(2):
            file = tmp_path / "mini_imagenet" / part / name / f"{index}.jpg"
            Image.new("RGB", (100, 84), (200, 10 * index, 0)).save(file)
    benchmark = make("mini_imagenet", root=str(tmp_path))
    assert benchmark.train.images.shape == (6, 3, 84, 84) and benchmark.test is None
    assert dict(benchmark.groups) == {"base": ("n01",), "validation": ("n02",), "field": ("n03",)}
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CorruptData, match=str(file)):
        make("mini_imagenet", root=str(tmp_path))
    shutil.rmtree(tmp_path / "mini_imagenet" / "train")
    with pytest.raises((NotEnoughData, CorruptData)):
        make("mini_imagenet", root=str(tmp_path))


# --- absent and damaged files ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PACKS))
def test_missing_data_names_path_and_command(name, tmp_path):
    with pytest.raises(MissingData) as caught:
        make(name, root=str(tmp_path))
    looked = "MNIST/raw" if name == "mnist" else PACKS[name]
    assert str(tmp_path / looked) in str(caught.value)
    assert f"clfed data={name} data.root=" in caught.value.remedy
    if name == "mini_imagenet":
        assert "{train,val,test}/CLASS/*.jpg" in caught.value.remedy
    else:
        assert f"data.root={tmp_path} data.download=true" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_root_defaults_to_data_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingData) as caught:
        make("mnist")
    assert str(tmp_path / "data" / "MNIST" / "raw") in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("name", sorted(PACKS))
def test_truncated_pack_is_named(name, keep, packs, tmp_path):
    source, copy = packs / PACKS[name], tmp_path / PACKS[name]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as whole:
        copy.write_bytes(whole.read(int(source.stat().st_size * keep)))
    with pytest.raises(CorruptData) as caught:
        make(name, root=str(tmp_path))
    assert str(copy) in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["omniglot", "fashion_mnist", "mini_imagenet"])
def test_pack_with_other_arrays_is_named(name, tmp_path):
    np.savez(tmp_path / PACKS[name], unexpected=np.zeros(3))
    with pytest.raises(CorruptData, match=PACKS[name]):
        make(name, root=str(tmp_path))


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_bytes_give_a_sentence_or_nothing(tmp_path, data):
    pack = tmp_path / PACKS["fashion_mnist"]
    pixels, labels = np.arange(20 * 784, dtype=np.uint8).reshape(20, 28, 28), np.arange(20) % 10
    np.savez_compressed(pack, train_x=pixels, train_y=labels, test_x=pixels, test_y=labels)
    content = bytearray(pack.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    pack.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CorruptData, NotEnoughData):
        make("fashion_mnist", root=str(tmp_path))


def test_pack_with_pickled_arrays_is_refused(tmp_path):
    np.savez(tmp_path / PACKS["fashion_mnist"], train_x=np.array([{}], dtype=object))
    with pytest.raises(CorruptData, match="allow_pickle"):
        make("fashion_mnist", root=str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "omniglot", "cifar10", "fashion_mnist"])
def test_failed_download_is_one_sentence(name, tmp_path, monkeypatch):
    import torchvision.datasets

    stock = {"omniglot": "Omniglot", "fashion_mnist": "FashionMNIST"}.get(name, name.upper())

    def offline(*args, **kwargs):
        assert kwargs["download"] is True
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, stock, offline)
    with pytest.raises(MissingData, match="no route to host") as caught:
        make(name, root=str(tmp_path / "new"), download=True)
    assert str(tmp_path / "new") in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist", "digits"])
@pytest.mark.parametrize("options", [{"base_classes": 11}, {"base_classes": -1}])
def test_impossible_groups_are_refused(name, options, packs):
    with pytest.raises(ConfigError, match=r"data\.base_classes"):
        make(name, root=str(packs), **options)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"image_size": 106}])
def test_omniglot_refuses_sizes(options, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        make("omniglot", root=str(tmp_path), **options)


def test_omniglot_needs_a_base_alphabet(packs):
    with pytest.raises(ConfigError, match=r"0\.\.29"):
        make("omniglot", root=str(packs), validation_alphabets=30)


# --- torchvision's layouts ------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, compress=None) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(content) if compress else content)


def write_mnist(raw: Path, suffix: str = "", compress=None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {}
    for split in ("train", "t10k"):
        arrays[split] = rng.integers(0, 256, (20, 28, 28))
        write_idx(raw / f"{split}-images-idx3-ubyte{suffix}", arrays[split], compress)
        write_idx(raw / f"{split}-labels-idx1-ubyte{suffix}", np.arange(20) % 10, compress)
    return arrays


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_idx_layout(name, folder, suffix, tmp_path):
    import gzip
    import lzma

    compress = {"": None, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    arrays = write_mnist(tmp_path / folder / "raw", suffix, compress)
    benchmark = make(name, root=str(tmp_path))
    assert np.array_equal(benchmark.train.images[:, 0].numpy(), arrays["train"])
    assert np.array_equal(benchmark.test.images[:, 0].numpy(), arrays["t10k"])
    assert benchmark.test.labels.tolist() == [*range(10), *range(10)]
    if not suffix:
        import torchvision.datasets

        stock = getattr(torchvision.datasets, folder)(tmp_path, train=False)
        assert torch.equal(stock.data, benchmark.test.images[:, 0])
        assert torch.equal(stock.targets, benchmark.test.labels)
        if name == "fashion_mnist":
            assert tuple(stock.classes) == benchmark.train.classes


def test_idx_damage(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for damaged in (b"", whole[:3], whole[:10], whole[:-1], whole + b"\0", b"\1" + whole[1:]):
        images.write_bytes(damaged)
        with pytest.raises(CorruptData, match=images.name):
            make("mnist", root=str(tmp_path))
    images.write_bytes(whole)
    write_idx(labels, np.arange(19) % 10)
    with pytest.raises(CorruptData, match="do not belong together"):
        make("mnist", root=str(tmp_path))
    write_idx(labels, np.full(20, 10))
    with pytest.raises(CorruptData, match=r"0\.\.9"):
        make("mnist", root=str(tmp_path))
    labels.unlink()
    with pytest.raises(CorruptData, match="lacks train-labels"):
        make("mnist", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "key", "labels"),
    [("cifar10", "label_names", "labels"), ("cifar100", "fine_label_names", "fine_labels")],
)
def test_cifar_batches(name, key, labels, tmp_path, monkeypatch):
    from torchvision import datasets

    stock = getattr(datasets, name.upper())
    tree = tmp_path / stock.base_folder
    tree.mkdir()
    count = 10 if name == "cifar10" else 100
    rng = np.random.default_rng(2)
    pixels = {}
    for file, _ in stock.train_list + stock.test_list:
        pixels[file] = rng.integers(0, 256, (count, 3072), np.uint8)
        content = {"data": pixels[file], labels: list(range(count))}
        (tree / file).write_bytes(pickle.dumps(content))
    classes = [f"class {index}" for index in range(count)]
    (tree / stock.meta["filename"]).write_bytes(pickle.dumps({key: classes}))
    with pytest.raises(CorruptData, match=str(tree / stock.train_list[0][0])):
        make(name, root=str(tmp_path))  # nothing is unpickled: the md5 is not the published one
    accept = lambda path, md5=None: Path(path).is_file()  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", accept)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", accept)
    benchmark = make(name, root=str(tmp_path))
    assert np.array_equal(benchmark.test.images.flatten(1).numpy(), pixels[stock.test_list[0][0]])
    assert benchmark.train.classes == tuple(classes)
    assert len(benchmark.train) == count * len(stock.train_list)
    (tree / stock.test_list[0][0]).unlink()
    with pytest.raises(CorruptData, match="absent"):
        make(name, root=str(tmp_path))


def test_omniglot_folders(packs, tmp_path):
    wanted = {"images_background/Greek", "images_evaluation/Tengwar", "images_background/Latin"}
    with tarfile.open(packs / "omniglot_png.tar.xz") as archive:
        chosen = []
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and "/".join(parts[1:3]) in wanted and parts[3] < "character04":
                archive.extract(member, tmp_path, filter="data")
                chosen.append(member.name)
    assert len(chosen) == 3 * 3 * 20
    trees = make("omniglot", root=str(tmp_path), validation_alphabets=1)
    pack = make("omniglot", root=str(packs)).train.of_classes(trees.train.classes)
    assert trees.train.fingerprint == pack.fingerprint
    assert list(map(len, trees.groups.values())) == [3, 3, 3]
    victim = tmp_path / chosen[0]
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(CorruptData, match=victim.name):
        make("omniglot", root=str(tmp_path), validation_alphabets=1)
    shutil.rmtree(tmp_path / "omniglot-py" / "images_evaluation")
    with pytest.raises(CorruptData, match="images_evaluation"):
        make("omniglot", root=str(tmp_path), validation_alphabets=1)


@pytest.mark.slow
def test_all_omniglot_folders_equal_the_pack(packs, tmp_path):
    with tarfile.open(packs / "omniglot_png.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    tree, pack = make("omniglot", root=str(tmp_path)), make("omniglot", root=str(packs))
    assert tree.train.fingerprint == pack.train.fingerprint
    assert tree.groups == pack.groups


# --- the small mathematics ----------------------------------------------------------------------


def test_channel_statistics_are_numpys():
    images = torch.randint(0, 256, (5, 3, 7, 7), generator=torch.Generator().manual_seed(0)).byte()
    mean, std = channel_statistics(images)
    scaled = images.numpy() / 255
    assert np.allclose(mean, scaled.mean((0, 2, 3)), atol=6e-5)
    assert np.allclose(std, scaled.std((0, 2, 3)), atol=6e-5)
    assert channel_statistics(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)) == ((0.0,), (1.0,))


@given(st.data())
def test_leading_groups_partition_the_classes(data):
    names = [f"c{index}" for index in range(data.draw(st.integers(1, 30)))]
    base = data.draw(st.integers(0, len(names)))
    validation = data.draw(st.integers(0, base))
    seed = data.draw(st.none() | st.integers(0, 5))
    groups = leading_groups(names, base, validation, seed)
    flat = sum(groups.values(), ())
    assert sorted(flat) == sorted(names)
    assert tuple(map(len, groups.values())) == (base - validation, validation, len(names) - base)
    assert seed is not None or list(flat) == names
    assert groups == leading_groups(names, base, validation, seed)


@pytest.mark.parametrize(("base", "validation"), [(4, 0), (-1, 0), (2, 3), (2, -1)])
def test_leading_groups_refuses(base, validation):
    with pytest.raises(ConfigError, match="must lie in"):
        leading_groups("abc", base, validation)
