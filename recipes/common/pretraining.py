"""A whole pre-training, from the command line to the table on the screen: what every recipe ends with."""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from common import report
from common.checkpoint import Checkpoints, load_weights, read_foreign, read_tensors, write_json, write_tensors
from common.config import Images, Network, Optimization, Run, from_json, parse, to_json
from common.engine import World, loading_processes, read_metrics, to_device, train, world
from common.finetuning import Finetuning, finetune
from common.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    CropFlip,
    Folder,
    Loader,
    Normalize,
    Source,
    Views,
    open_images,
    statistics,
)
from common.probing import JUDGES, judge
from common.vit import (
    OWN_TABLE,
    SHARED_TABLE,
    SIZES,
    Decoder,
    ViT,
    initialize_mae,
    initialize_simmim,
    own_tables,
    resize_positions,
    timm_arguments,
    timm_arguments_of,
    timm_state,
)
from mimkit.positions import sincos

import torch
from torch import Tensor, nn

Evaluation = Literal["finetune", "scratch", "budget", "linear", "knn", "nonlinear"]


class Config(Protocol):
    """What every recipe's configuration has."""

    @property
    def run(self) -> Run: ...
    @property
    def images(self) -> Images: ...
    @property
    def network(self) -> Network: ...
    @property
    def optimization(self) -> Optimization: ...
    @property
    def finetune(self) -> Finetuning: ...
    @property
    def evaluate(self) -> tuple[Evaluation, ...]: ...


class Method(Protocol):
    """What every pre-training method has besides what the engine asks for.

    One with an attribute `views`, a transform, wants these of each image instead of a random crop, perhaps as a tuple.
    """

    encoder: ViT
    view_size: tuple[int, int]

    def noise(self, rand: Callable[..., Tensor], batch: int) -> dict[str, Tensor]: ...
    def __call__(self, images: Any, noise: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]: ...
    def pictures(self, images: Any, noise: dict[str, Tensor]) -> report.Pictures: ...


def pretrain(
    method: Callable[[Any, Normalize], Method],
    presets: dict[str, Any],
    *,
    name: str,
    description: str | None,
    args: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Pre-train, draw what was learned, export the encoder, evaluate it, and print the result.

    Args:
        method: makes the method from its configuration and the normalization of the images.
        presets: configurations by name, as `config.parse` wants them.
        name: of the recipe, and of the run unless `--name` says otherwise.
        description: on top of the help.
        args: the command line; that of the process if none.
    """
    config: Config = parse(presets, args, description=description)
    with world(config.run.device) as place:
        try:
            return _pretrain(method, config, name, place)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from error


def _pretrain(make: Callable[[Any, Normalize], Method], config: Config, name: str, place: World) -> dict[str, Any]:
    run, images = config.run, config.images
    folder = run.runs / (run.name or name)

    # 1. The images, and whether they can be evaluated on
    source = open_images(images.data, "train", channels=images.channels, seed=run.seed)
    evaluations = _possible(config, place)
    written = prepare(folder, name, config, resume=run.resume, place=place)

    # 2. The method
    normalize = normalization(images, source)
    torch.manual_seed(run.seed)
    method = make(config, normalize)
    assert isinstance(method, nn.Module)
    default = CropFlip(method.view_size, scale=images.crop_scale, flip=images.flip)
    views = Views(source, getattr(method, "views", default), seed=run.seed)
    say_size(method, place)

    def load(batches: Iterable[list[tuple[int, int]]]) -> Loader:
        return Loader(views, batches, workers=loading_processes(run, place), pin=place.device.type == "cuda")

    def draw(into: Path) -> None:
        few = min(8, len(source))
        chosen = [(0, index * len(source) // few) for index in range(few)]
        pictures = to_device(next(iter(Loader(views, [chosen]))), place.device)
        generator = torch.Generator().manual_seed(run.seed)
        noise = method.noise(lambda *shape: torch.rand(*shape, generator=generator), few)
        with torch.no_grad():
            drawn = method.pictures(pictures, {k: v.to(place.device) for k, v in noise.items()})
        report.draw_pictures(into / "reconstruction.png", drawn)

    # 3. The training
    trained = train(
        method,
        load,
        images=len(source),
        settings=config.optimization,
        run=run,
        folder=folder,
        place=place,
        title="pre-training",
        config=written,
        draw=draw,
    )
    if place.first:
        export(folder / "encoder.safetensors", method.encoder, normalize)
    place.wait()

    # 4. The evaluations: of the encoder, tuned or frozen, beside the same network from scratch
    rows: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        settings, frozen = config.finetune, evaluation in JUDGES
        if evaluation in ("scratch", "budget"):  # a network that knows nothing needs all its layers to learn alike
            optimization = replace(settings.optimization, layer_decay=1.0)
            if evaluation == "budget":
                optimization = replace(optimization, epochs=budget(folder, trained, rows["finetune"], settings, place))
            settings = replace(settings, optimization=optimization)
        encoder, _ = load_encoder(
            folder / "encoder.safetensors",
            image_size=images.image_size,
            class_token=settings.pool == "class" and not frozen,
            drop=0.0 if frozen else settings.drop_path,
            scratch=evaluation in ("scratch", "budget"),
            seed=run.seed,
        )
        where: dict[str, Any] = {"images": images, "run": run, "folder": folder / evaluation, "place": place}
        where["title"] = report.TITLES[evaluation]
        if frozen:
            rows[evaluation] = judge(evaluation, encoder, normalize, finetuning=settings, **where)
        else:
            rows[evaluation] = finetune(encoder, normalize, settings=settings, **where)

    # 5. The result
    result = {"recipe": name, "device": str(place.device), "devices": place.size, "pretraining": trained, **rows}
    if place.first:
        write_json(folder / "result.json", result)
        curves = {"pre-training": folder} | {report.TITLES[key]: folder / key for key in rows}
        metrics = {title: read_metrics(path / "metrics.jsonl") for title, path in curves.items()}
        report.draw_curves(folder / "curves.png", {title: records for title, records in metrics.items() if records})
        place.say(report.table(name, result, folder))
    return result


def prepare(folder: Path, recipe: str, config: Any, *, resume: bool, place: World) -> dict[str, Any]:
    """Make the folder of a run, and write there and return its recipe and its configuration.

    Raises:
        ValueError: if a run is there already and is not to be resumed, or is that of another recipe.
    """
    files = [folder / name for name in ("checkpoint", "result.json", "metrics.jsonl")]
    started = any(path.exists() and path.stat().st_size for path in files)
    place.wait()  # every process has looked before the first one writes
    if started and not resume:
        raise ValueError(f"{folder} holds a run already: go on with --resume, or give another --name")
    settings = {"recipe": recipe, **to_json(config)}
    if started and (before := report.read_json(folder / "config.json").get("recipe")) != recipe:
        raise ValueError(f"{folder} holds a run of {before}, which {recipe} cannot resume: give another --name")
    if place.first and not started:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
    return settings


def normalization(images: Images, source: Source) -> Normalize:
    """Mean and std of the channels: ImageNet's or the training images' own.

    Raises:
        ValueError: if ImageNet's are asked for grayscale images.
    """
    if images.statistics == "imagenet" or (images.statistics == "auto" and images.data and images.channels == 3):
        if images.channels != 3:
            raise ValueError(f"ImageNet's mean and std have 3 channels, not {images.channels}: use --statistics data")
        return Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return Normalize(*statistics(source))


def grid(images: Images, network: Network) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: if the image cannot be cut into patches.
    """
    height, width = images.image_size
    if min(height, width, network.patch) < 1 or height % network.patch or width % network.patch:
        raise ValueError(f"--image-size {height} {width} is not made of patches of {network.patch} × {network.patch}")
    return height // network.patch, width // network.patch


def encoder_and_decoder(
    images: Images,
    network: Network,
    *,
    class_token: bool = True,
    key_bias: bool = True,
    embed_bias: bool = True,
    table: Callable[..., Tensor] | None = sincos,
) -> tuple[ViT, Decoder]:
    """Build a ViT of a named size and a decoder that predicts the pixels of its patches; see `common.vit`.

    Without a table both have contextual relative positions.
    """
    height, width = grid(images, network)
    shape: dict[str, Any] = {"height": height, "width": width, "class_token": class_token, "key_bias": key_bias}
    shape["table"] = table
    relative = "contextual" if table is None else None
    encoder = ViT(**shape, patch=network.patch, channels=images.channels, **SIZES[network.size], relative=relative)
    decoder = Decoder(
        **shape,
        encoder_dim=encoder.dim,
        dim=network.decoder_dim,
        depth=network.decoder_depth,
        heads=network.decoder_heads,
        outputs=network.patch**2 * images.channels,
        embed_bias=embed_bias,
    )
    return encoder, decoder


def masking_encoder(images: Images, network: Network, *, drop: float = 0.0) -> ViT:
    """Build and initialize the ViT of SimMIM and BEiT: mask token, relative positions in one table, layer scale."""
    height, width = grid(images, network)
    encoder = ViT(
        height=height,
        width=width,
        patch=network.patch,
        channels=images.channels,
        **SIZES[network.size],
        key_bias=False,
        drop=drop,
        table=None,
        relative="shared",
        layer_scale=0.1,
        mask_token=True,
    )
    initialize_simmim(encoder)
    return encoder


def whole_cells(images: Images, network: Network, cell: int, ratio: float) -> tuple[int, dict[str, int]]:
    """Count square cells of `cell` pixels a side, and return what `mimkit.masking.random_cells` needs to mask a share.

    The share is rounded up.

    Raises:
        ValueError: if the cells are not made of patches or do not fill the image, or nothing or all would be masked.
    """
    (height, width), side = grid(images, network), cell // network.patch
    if cell < 1 or cell % network.patch or height % side or width % side:
        size, patch = images.image_size, network.patch
        raise ValueError(
            f"--cell {cell}: images of {size[0]} × {size[1]} are not cut into such cells of patches of {patch}"
        )
    cells = (height // side) * (width // side)
    masked = math.ceil(cells * ratio) if 0 < ratio < 1 else 0
    if not 0 < masked < cells:
        raise ValueError(f"--mask-ratio {ratio} of {cells} cells does not leave both masked and visible ones")
    sizes = {"height": height, "width": width, "cell_height": side, "cell_width": side}
    return cells, sizes | {"num_masked": masked * side**2}


def count_masked(tokens: int, ratio: float) -> int:
    """Tokens to mask: what is kept is truncated in double precision, as in the code that everybody follows.

    Raises:
        ValueError: if nothing would be masked or nothing visible.
    """
    kept = int(tokens * (1 - ratio)) if 0 < ratio < 1 else 0
    if not 0 < kept < tokens:
        raise ValueError(f"--mask-ratio {ratio} of {tokens} patches does not leave both masked and visible ones")
    return tokens - kept


def say_size(method: nn.Module, place: World) -> None:
    """Print how large the networks are."""
    encoder = sum(p.numel() for p in method.encoder.parameters())  # pyright: ignore
    every = sum(p.numel() for p in method.parameters())
    place.say(f"encoder {encoder / 1e6:.1f} M parameters, with all that trains it {every / 1e6:.1f} M")


def budget(folder: Path, trained: dict[str, Any], tuned: dict[str, Any], settings: Finetuning, place: World) -> int:
    """Epochs that a network from scratch can train in the time of pre-training and fine-tuning together.

    It follows from measured times, so it is written down for a run that is resumed.
    """
    path = folder / "budget.json"
    if place.first and not path.exists():
        seconds = {"pretraining": trained["seconds"], "finetune": tuned["seconds"]}
        epochs = round(settings.optimization.epochs * sum(seconds.values()) / seconds["finetune"])
        write_json(path, {"epochs": epochs, "seconds": seconds})
    place.wait()
    return report.read_json(path)["epochs"]


def export(path: Path, encoder: ViT, normalize: Normalize) -> None:
    """Write an encoder under timm's names, with all that is needed to build it again: by timm, if it has this one."""
    about = {
        "mimkit" if encoder.relative == "contextual" else "timm": timm_arguments(encoder),
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
    }
    write_tensors(path, timm_state(encoder), about)


def load_encoder(
    path: Path,
    *,
    image_size: tuple[int, int] | None = None,
    class_token: bool = False,
    drop: float = 0.0,
    scratch: bool = False,
    seed: int = 0,
) -> tuple[ViT, Normalize]:
    """Build an encoder from its file, for another image size if need be, and the normalization of its images.

    A table of relative positions that all blocks shared becomes one in each, as fine-tuning wants it: the same network.
    Contextual ones (LoMaR) fit any size as they are.

    Args:
        path: an exported encoder, or a published checkpoint of the MAE family, SimMIM, BEiT or LoMaR (of square
            ImageNet images).
        image_size: height and width in pixels; positions are resampled where they differ.
        class_token: add a new one (normal, std 0.02, position zero) if the encoder has none.
        drop: drop path of the last block.
        scratch: start from random weights instead; the position table stays.
        seed: of whatever is new.

    Raises:
        ValueError: if the file holds no encoder, or the size is not made of its patches.
    """
    content = read_foreign(path)
    about = read_tensors(path)[1] if path.suffix == ".safetensors" else {}
    written = about.get("timm", about.get("mimkit"))
    exported = written is not None
    prefix = "encoder." if "encoder.patch_embed.proj.weight" in content else ""  # beside the head of its pre-training
    weights = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    arguments = written or timm_arguments_of(weights, path)
    patch, (H, W) = arguments["patch_size"], image_size or arguments["img_size"]
    if H % patch or W % patch:
        raise ValueError(f"images of {H} × {W} pixels are not made of patches of {patch} × {patch}")
    old = {"height": arguments["img_size"][0] // patch, "width": arguments["img_size"][1] // patch}
    new = {"height": H // patch, "width": W // patch}
    sizes = {**old, "new_height": new["height"], "new_width": new["width"]}
    beit = "use_abs_pos_emb" in arguments  # see `common.vit.in_beit`
    contextual = arguments.get("relative") == "contextual"
    own_table = arguments.get("use_rel_pos_bias") or arguments.get("use_shared_rel_pos_bias")
    torch.manual_seed(seed)
    vit = ViT(
        **new,
        patch=patch,
        channels=arguments["in_chans"],
        dim=arguments["embed_dim"],
        depth=arguments["depth"],
        heads=arguments["num_heads"],
        class_token=beit or class_token or arguments["class_token"],
        key_bias=not beit,
        drop=drop,
        table=sincos if arguments.get("use_abs_pos_emb", not contextual) else None,
        relative="contextual" if contextual else "each" if own_table else None,
        layer_scale=arguments.get("init_values"),
    )
    (initialize_simmim if beit else initialize_mae)(vit)
    if vit.pos_embed is not None:
        table = resize_positions(weights["pos_embed"], **sizes)
        # a class token that the file does not have is new, and its position is zero
        weights["pos_embed"] = nn.functional.pad(table, (0, 0, vit.pos_embed.shape[1] - table.shape[1], 0))
    if vit.relative == "each":
        weights = own_tables(weights, depth=vit.depth, **sizes)
    if scratch:
        weights = {"pos_embed": weights["pos_embed"]} if vit.pos_embed is not None else {}
    optional = (r".",) if scratch else (r"cls_token",) if not (beit or arguments["class_token"]) else ()
    report = load_weights(vit, weights, renames={}, optional=optional)
    if not exported:
        targets = {name: name.removeprefix(prefix) for name in content if name.startswith(prefix)}
        report.renamed = {name: own for name, own in targets.items() if own != name and own in vit.state_dict()}
        if prefix + SHARED_TABLE in content:
            report.renamed[prefix + SHARED_TABLE] = OWN_TABLE.format("*")
        report.dropped = [name for name in content if targets.get(name) in (None, *report.dropped)]
        print(f"{path}:\n{report}")
    mean, std = (about["mean"], about["std"]) if exported else (IMAGENET_MEAN, IMAGENET_STD)
    return vit, Normalize(mean, std)


def recipe_of(name: str) -> Any:
    """Import the module of a pre-training recipe, which has a `METHOD`, a `Config` and `PRESETS`.

    Raises:
        ValueError: if there is none of this name.
    """
    modules = [path.stem for path in Path(__file__).parents[1].glob("*.py")]
    module = importlib.import_module(name) if name in modules else None
    if not hasattr(module, "METHOD"):
        raise ValueError(f"{name} is no recipe of pre-training: there is no recipes/{name}.py with a METHOD")
    return module


def load_method(folder: Path) -> tuple[Any, Any]:
    """Build the method of a run with the weights of its newest checkpoint, on the CPU, in eval mode.

    The run may still be training.

    Returns:
        The method and its configuration.

    Raises:
        ValueError: if the folder is not that of a pre-training, or there is no checkpoint yet.
    """
    path = folder / "config.json"
    settings = report.read_json(path) if path.is_file() else {}
    if "recipe" not in settings:
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json that names a recipe")
    recipe = recipe_of(settings.pop("recipe"))
    config = from_json(recipe.Config, settings)
    found = Checkpoints(folder / "checkpoint").load()
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    step, tensors, _ = found
    # What it started from is in its weights, and need not be on the disk any more
    alone = replace(config, weights=None) if hasattr(config, "weights") else config
    method = recipe.METHOD(alone, Normalize([0.0] * config.images.channels, [1.0] * config.images.channels))
    prefix = "method."
    method.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    print(f"{folder}: {recipe.__name__} after {step} steps")
    return method.eval(), config


def images_to_look_at(images: Images, data: Path | None = None, *, split: Literal["test", "train"] = "test") -> Source:
    """Open images for an analysis, of which no labels are asked for.

    Args:
        images: those of the run.
        data: folder of other ones. Of one that has neither train nor val all images are taken.
        split: test is val of a folder.
    """
    data = data or images.data
    if data is None:
        return open_images(None, split, channels=images.channels)
    sorted_into_splits = any((data / name).is_dir() for name in ("train", "val"))
    folder = "val" if split == "test" and sorted_into_splits else "train"
    return Folder(data, folder, channels=images.channels)


def central_views(source: Source, method: Method, config: Config, *, batch_size: int) -> Iterator[Tensor]:
    """Give the images of a source batch by batch, each cut to its center as in a test."""
    views = Views(source, CenterCrop(method.view_size, crop_fraction=config.finetune.crop_fraction))
    order = [(0, index) for index in range(len(source))]
    return iter(Loader(views, [order[i : i + batch_size] for i in range(0, len(order), batch_size)]))


def _possible(config: Config, place: World) -> tuple[Evaluation, ...]:
    """The evaluations that the images allow, found out before hours of training."""
    if not config.evaluate:
        return ()
    images = config.images
    try:
        labeled = open_images(images.data, "labeled", channels=images.channels, per_class=images.labels_per_class)
        open_images(images.data, "test", channels=images.channels, classes=labeled.classes)
    except ValueError as error:
        place.say(f"no evaluation at the end, pre-training only: {error}")
        return ()
    batch = config.finetune.optimization.batch_size
    if len(labeled) < batch:
        raise ValueError(f"{len(labeled)} labeled images do not fill a batch of {batch}: --finetune.batch-size")
    wanted = config.evaluate
    return ("finetune", *wanted) if "budget" in wanted and "finetune" not in wanted else wanted
