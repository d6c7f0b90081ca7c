"""Train and evaluate Twins, or a classifier of timm, on ImageNet-like data.

    python main.py --recipe shapes --output_dir output/shapes
    torchrun --nproc_per_node=8 main.py --model alt_gvt_base --batch-size 128 --data-path path_to_imagenet \\
        --dist-eval --drop-path 0.3 --output_dir output/alt_gvt_base
    python main.py --eval --resume alt_gvt_large.pth --model alt_gvt_large --data-path path_to_imagenet

Bad input ends with a one-line error message and a non-zero exit code; --traceback shows the full traceback.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence

import timm
import torch
from timm.data import Mixup
from timm.models import get_arch_name
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import models
from core.checkpoint import TrainState
from core.description import Description, check_same_classes, read_description, remembered_options
from core.distributed import Processes, parallelise
from core.launch import RESUMABLE, one_line, run_script
from core.optimizer import build_optimizer, build_scheduler, note_schedule, peak_lr
from core.options import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    PROBABILITY,
    RATE,
    SHARE,
    SWITCH,
    ArgumentParser,
    add_compute_options,
    add_freeze_option,
    add_loader_options,
    add_process_options,
    add_training_options,
    choose_amp,
    compile_if_asked,
    find_fault,
    number,
    train_settings,
)
from core.recipes import RECIPES, differences, get_recipe, note_precision, note_published, note_recipe
from core.run import Run, choose_accumulation, describe_batch
from core.run_folder import BEST_CHECKPOINT, BEST_EMA_CHECKPOINT
from datasets import add_data_options, build_train_loader, build_val_loader
from engine import evaluate, train_one_epoch
from losses import DISTILLATION_TYPES, DistillationLoss, choose_criterion
from models.twins import MIN_INPUT_SIZE
from samplers import TrainSampler
from transforms import add_augmentation_options, add_eval_crop_option
from utils import UserError, seed_everything

MODEL_HELP = "{pcpvt,alt_gvt}_{tiny,small,base,large}, or a timm model"
logger = logging.getLogger("twins")


def get_args_parser() -> ArgumentParser:  # noqa: PLR0915  one statement per option
    """Return the parser. Its defaults are the published recipe, but for what --recipe published sets per model."""
    parser = ArgumentParser(prog="main.py", usage="python main.py [options]", description=__doc__)

    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="set of defaults, which other options override. shapes: the tiny model on the embedded shapes; "
        "published: global batch, drop path and warm-up that the released weights of --model were trained with",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="alt_gvt_base", metavar="NAME", help=MODEL_HELP)
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="start from the published ImageNet weights, downloaded from timm's hub",
    )
    group.add_argument(
        "--input-size",
        default=224,
        type=number(int, MIN_INPUT_SIZE),
        metavar="PIXELS",
        help="side length of the images in pixels, at least 32",
    )
    group.add_argument("--drop", default=0.0, type=RATE, help="dropout rate before the head, 0 to 0.99")
    group.add_argument(
        "--drop-path",
        default=0.1,
        type=RATE,
        help="stochastic depth rate of the last block, 0 to 0.99; the paper uses 0.2, 0.3 and 0.5 for S, B and L",
    )
    group.add_argument(
        "--model-ema", **SWITCH, help="maintain, evaluate and save an exponential moving average (EMA) of the weights"
    )
    group.add_argument(
        "--model-ema-decay", default=0.99996, type=SHARE, metavar="RATE", help="decay of the EMA per step, 0 to 1"
    )
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, about a third more time",
    )
    add_compute_options(group)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", default=64, type=POSITIVE_INT, help="images per process per batch")
    group.add_argument(
        "--global-batch",
        type=POSITIVE_INT,
        help="images per step over all processes, by gradient accumulation if needed (default: one batch per process)",
    )
    group.add_argument("--epochs", default=300, type=POSITIVE_INT, help="passes over the training set")
    group.add_argument(
        "--opt", default="adamw", metavar="NAME", help="timm optimizer, such as adamw, lamb, sgd or lion"
    )
    group.add_argument(
        "--opt-eps",
        type=POSITIVE,
        metavar="EPS",
        help="epsilon of the optimizer (default: that of the optimizer, 1e-8 for adamw)",
    )
    group.add_argument(
        "--opt-betas",
        type=SHARE,
        nargs="+",
        metavar="BETA",
        help="betas of the optimizer, 0 to 1 (default: those of the optimizer, 0.9 0.999 for adamw)",
    )
    group.add_argument("--momentum", default=0.9, type=SHARE, help="momentum of SGD, 0 to 1")
    group.add_argument(
        "--weight-decay",
        default=0.05,
        type=NON_NEGATIVE,
        metavar="RATE",
        help="weight decay; not applied to biases, norms and positional encoding generators (PEGs)",
    )
    group.add_argument(
        "--layer-decay",
        type=SHARE,
        metavar="RATE",
        help="layer-wise decay: learning rate of each layer divided by that of the layer after it, 0 to 1 (default: 1)",
    )
    group.add_argument(
        "--clip-grad",
        default=5.0,
        type=NON_NEGATIVE,
        metavar="NORM",
        help="maximum gradient norm; 0 to disable clipping",
    )

    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--lr",
        default=5e-4,
        type=POSITIVE,
        help="peak learning rate for a global batch of 512, scaled linearly with the global batch",
    )
    group.add_argument("--unscale-lr", **SWITCH, help="use --lr as it is, without scaling by the global batch")
    group.add_argument(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "step", "multistep", "poly"),
        help="learning-rate schedule of timm",
    )
    group.add_argument(
        "--sched-on-updates",
        **SWITCH,
        help="set the learning rate before each step instead of after each epoch; the options of the schedule stay in "
        "epochs",
    )
    group.add_argument(
        "--warmup-lr", default=1e-6, type=NON_NEGATIVE, metavar="LR", help="learning rate at the start of the warm-up"
    )
    group.add_argument(
        "--min-lr", default=1e-5, type=NON_NEGATIVE, metavar="LR", help="learning rate at the end of the schedule"
    )
    group.add_argument("--warmup-epochs", default=5, type=COUNT, help="epochs of linear warm-up")
    group.add_argument(
        "--decay-epochs", default=30, type=POSITIVE, metavar="N", help="epochs between decays of the step schedule"
    )
    group.add_argument(
        "--decay-milestones",
        default=[90, 180, 270],
        type=POSITIVE_INT,
        nargs="+",
        help="epochs of the decays of the multistep schedule, in ascending order",
    )
    group.add_argument(
        "--decay-rate",
        default=0.1,
        type=POSITIVE,
        metavar="RATE",
        help="factor of each decay of the step and multistep schedules, power of the poly schedule",
    )
    group.add_argument(
        "--lr-noise",
        type=SHARE,
        nargs="+",
        metavar="PCT",
        help="start and, optionally, end of learning-rate noise as fractions of the run, 0 to 1 (default: no noise)",
    )
    group.add_argument(
        "--lr-noise-pct",
        default=0.67,
        type=NON_NEGATIVE,
        metavar="PCT",
        help="limit of the learning-rate noise as a fraction of the learning rate",
    )
    group.add_argument(
        "--lr-noise-std",
        default=1.0,
        type=NON_NEGATIVE,
        metavar="STD",
        help="standard deviation of the learning-rate noise",
    )

    group = parser.add_argument_group("augmentation")
    add_augmentation_options(group)
    group.add_argument("--smoothing", default=0.1, type=RATE, help="label smoothing, 0 to 0.99")
    group.add_argument(
        "--repeated-aug",
        **SWITCH,
        help="repeated augmentation: use each image three times in a row, with different augmentations",
    )

    group = parser.add_argument_group("mixup")
    group.add_argument("--mixup", default=0.8, type=NON_NEGATIVE, metavar="ALPHA", help="alpha of mixup; 0 to disable")
    group.add_argument(
        "--cutmix", default=1.0, type=NON_NEGATIVE, metavar="ALPHA", help="alpha of CutMix; 0 to disable"
    )
    group.add_argument(
        "--cutmix-minmax",
        type=SHARE,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="range of the side length that CutMix pastes, as a fraction of the image side, 0 to 1; enables CutMix and "
        "replaces --cutmix",
    )
    group.add_argument("--mixup-prob", default=1.0, type=PROBABILITY, help="probability of mixup or CutMix, 0 to 1")
    group.add_argument(
        "--mixup-switch-prob",
        default=0.5,
        type=PROBABILITY,
        help="probability of CutMix instead of mixup if both are on, 0 to 1",
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="draw mixing parameters per batch, pair or element",
    )

    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--distillation-type",
        default="none",
        choices=DISTILLATION_TYPES,
        help="learn from a teacher's class probabilities (soft) or predicted class (hard)",
    )
    group.add_argument("--teacher-model", default="regnety_160", metavar="NAME", help=f"teacher model: {MODEL_HELP}")
    group.add_argument("--teacher-path", metavar="FILE", help="weights of the teacher")
    group.add_argument(
        "--distillation-alpha",
        default=0.5,
        type=SHARE,
        metavar="WEIGHT",
        help="weight of the distillation loss, 0 to 1; the other loss has the rest",
    )
    group.add_argument(
        "--distillation-tau", default=1.0, type=POSITIVE, metavar="T", help="temperature of soft distillation"
    )

    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--finetune", metavar="FILE", help="initial weights; a head for another number of classes is re-initialised"
    )
    add_freeze_option(group)

    group = parser.add_argument_group("data")
    add_data_options(group)
    add_eval_crop_option(group)
    add_loader_options(group)

    group = add_training_options(parser)
    group.add_argument("--eval", action="store_true", help="evaluate the weights of --resume, without training")
    group.add_argument(
        "--dist-eval", **SWITCH, help="split the evaluation between the processes; the metrics do not change"
    )
    add_process_options(parser)
    return parser


def check_args(parser: ArgumentParser, args: Namespace) -> None:
    """Reject combinations of arguments that cannot work."""
    if uses_mixup(args) and args.batch_size % 2 and not args.eval:
        parser.error(
            f"--batch-size {args.batch_size}: mixup and CutMix need an even batch size; change it, or pass --mixup 0 "
            "--cutmix 0"
        )
    if args.distillation_type != "none" and not args.teacher_path:
        parser.error(f"--distillation-type {args.distillation_type} needs --teacher-path, the weights of the teacher")
    for option in ("auto_resume", "save_every", "tensorboard"):
        if getattr(args, option) and not args.output_dir:
            parser.error(f"--{option.replace('_', '-')} needs --output_dir, the folder of its files")
    if args.auto_resume and args.eval:
        parser.error("--auto-resume continues a training run; name the weights to evaluate with --resume")
    if len([source for source in (args.pretrained, args.finetune, args.resume) if source]) > 1:
        parser.error("--pretrained, --finetune and --resume each set the initial weights; choose one of them")
    if args.freeze and not (args.pretrained or args.finetune or args.resume):
        parser.error(f"--freeze {args.freeze} keeps initial weights; name them with --finetune, or pass --pretrained")
    for option in ("model", "teacher_model"):
        if fault := find_fault(getattr(args, option)):
            parser.error(f"--{option.replace('_', '-')} {fault}")


def check_ranges(parser: ArgumentParser, args: Namespace) -> None:
    """Reject ranges and milestones that are not in ascending order."""
    for option in ("scale", "cutmix_minmax", "lr_noise"):
        limits = getattr(args, option) or []
        if len(limits) > 2:
            parser.error(f"--{option.replace('_', '-')}: takes at most two numbers")
        if option == "cutmix_minmax" and len(set(limits)) == 1:
            parser.error(f"--cutmix-minmax {limits[0]} {limits[1]}: give two different numbers")
        if limits != sorted(limits):
            parser.error(f"--{option.replace('_', '-')} {limits[0]} {limits[1]}: give the smaller number first")
    if args.decay_milestones != sorted(args.decay_milestones):
        parser.error(f"--decay-milestones {' '.join(map(str, args.decay_milestones))}: give them in ascending order")


def uses_mixup(args: Namespace) -> bool:
    """Return True if mixup or CutMix is on, which makes targets soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_model(name: str, nb_classes: int, **kwargs) -> nn.Module:
    """Build one of our models or of timm's; a UserError if its weights cannot be loaded or timm cannot build it."""
    try:
        return models.cpu.accelerate(timm.create_model(name, num_classes=nb_classes, **kwargs))
    except Exception as error:  # timm and the hub raise many kinds of errors
        reason = f"{type(error).__name__}: {one_line(error)}"
        if kwargs.get("pretrained"):
            raise UserError(
                f"--pretrained: the weights of {name} cannot be loaded ({reason}); without a network connection, "
                "download the file elsewhere and pass it to --finetune"
            ) from error
        if get_arch_name(name) in models.list_models():
            raise  # an internal error
        raise UserError(
            f"model {name!r} cannot be built ({reason}); some timm models need --drop-path 0 or --drop 0"
        ) from error


def build_compute_losses(args: Namespace, nb_classes: int, device: torch.device) -> Callable:
    """Build the function that computes the losses of a batch: mixup, the forward pass, criterion and distillation."""
    criterion = choose_criterion(soft_targets=uses_mixup(args), smoothing=args.smoothing)
    mixup = None
    if uses_mixup(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=nb_classes,
        )
    distillation = None
    if args.distillation_type != "none":
        teacher = build_model(args.teacher_model, nb_classes)
        logger.info("teacher %s", models.load_weights(teacher, args.teacher_path))
        teacher.requires_grad_(False).to(device).eval()
        kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
        distillation = DistillationLoss(criterion, teacher, kind, alpha, tau)

    def compute_losses(model: nn.Module, batch) -> dict[str, torch.Tensor]:
        train_images, targets = batch
        images = train_images.normalise()
        if mixup:
            images, targets = mixup(images, targets)
        logits = model(images)
        return distillation(images, logits, targets) if distillation else {"loss": criterion(logits, targets)}

    return compute_losses


def build_state(args: Namespace, model: nn.Module, sampler: TrainSampler, device: torch.device) -> TrainState:
    """Build the training state: optimizer, schedule, gradient scaler and moving average of the model."""
    optimizer = build_optimizer(args, model, sampler.global_batch)
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=build_scheduler(args, optimizer, sampler.steps),
        scaler=torch.amp.GradScaler(device.type, enabled=choose_amp(args.amp, device) == torch.float16),
        sampler=sampler,
        model_ema=ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None,
    )


def check_input_size(args: Namespace, model: nn.Module) -> None:
    """Reject an image size that does not fit a timm model of fixed input size."""
    config = getattr(model, "pretrained_cfg", {})
    size = config.get("input_size", (3, args.input_size))[-1]
    if config.get("fixed_input_size") and size != args.input_size:
        raise UserError(f"--input-size {args.input_size}: {args.model} takes images of {size} pixels; pass that size")


def check_classes(args: Namespace, classes: Sequence[str]) -> int:
    """Return the number of classes of the data; a UserError if `--nb-classes` is another one."""
    if args.nb_classes not in (None, len(classes)):
        raise UserError(f"--nb-classes {args.nb_classes}: the data have {len(classes)} classes; omit the option")
    return len(classes)


def run_evaluation(args: Namespace, processes: Processes) -> None:
    """Evaluate the weights of --resume, --finetune or --pretrained on the validation set."""
    path = args.resume or args.finetune
    if not path and not args.pretrained:
        raise UserError("--eval needs weights: --resume FILE, or --pretrained for the published ones")
    val_loader = build_val_loader(args, processes)
    classes = val_loader.dataset.dataset.classes
    nb_classes = check_classes(args, classes)
    if path:
        description = read_description(path)
        check_same_classes(path, description.classes, classes)
        for difference in differences(args, remembered_options(description), "checkpoint"):
            logger.info("note: %s", difference)
    model = build_model(args.model, nb_classes, pretrained=args.pretrained)
    if path:
        logger.info("%s", models.load_weights(model, path, ema=args.model_ema))
    elif nb_classes != model.pretrained_cfg["num_classes"]:
        raise UserError(
            f"--pretrained: these weights are for {model.pretrained_cfg['num_classes']} classes, but the data have "
            f"{nb_classes}; fine-tune them first"
        )
    check_input_size(args, model)
    model.to(processes.device)
    compile_if_asked(model, args.compile)
    logger.info("evaluating %s at %d pixels, %d classes", args.model, args.input_size, nb_classes)
    for note in note_precision(args.model, choose_amp(args.amp, processes.device) or torch.float32):
        logger.info("%s", note)
    evaluate_model(args, processes, model, val_loader)


def run_training(args: Namespace, processes: Processes) -> None:
    """Train; evaluate after each epoch and save the newest and the best checkpoints."""
    with Run(vars(args)) as run:
        device = processes.device
        global_batch = args.global_batch or args.batch_size * processes.world_size
        accumulation = choose_accumulation(args.batch_size, global_batch, processes.world_size)
        settings = train_settings(args, device, accumulation)
        val_loader = build_val_loader(args, processes)
        train_loader = build_train_loader(args, processes, global_batch)
        classes = train_loader.dataset.dataset.classes
        nb_classes = check_classes(args, classes)
        seed_everything(args.seed)  # the same initial weights on all processes
        # The weights get the memory format of the tokens: convolutions and the exchange of gradients need no copies.
        model = build_trained_model(args, nb_classes, run.is_new).to(device, memory_format=torch.channels_last)
        state = build_state(args, model, train_loader.sampler, device)
        compute_losses = build_compute_losses(args, nb_classes, device)
        seed_everything(args.seed + processes.rank)  # different mixup and drop path on each process
        run.resume(state, Description("classification", classes), same=("model", "opt"))
        compile_if_asked(model, args.compile)
        parallel_model = parallelise(model, processes)
        announce(args, processes, state, nb_classes, accumulation)
        for epoch in run.epochs(args.epochs, {"test_acc1": BEST_CHECKPOINT, "test_ema_acc1": BEST_EMA_CHECKPOINT}):
            state.sampler.set_epoch(epoch, state.meter.step)
            train_stats = train_one_epoch(parallel_model, compute_losses, train_loader, state, settings, run)
            run.finish_epoch(train_stats, evaluate_state(args, processes, state, val_loader))


def build_trained_model(args: Namespace, nb_classes: int, new: bool) -> nn.Module:
    """Build the model to train; in a new run, load its initial weights."""
    drops = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    drops = {name: rate for name, rate in drops.items() if rate > 0}  # some timm models do not accept them
    model = build_model(args.model, nb_classes, pretrained=args.pretrained and new, **drops)
    if args.pretrained and new and nb_classes != model.pretrained_cfg["num_classes"]:
        logger.info("the published weights are for other classes; the head is re-initialised")
    if args.finetune and new:
        logger.info("%s", models.load_weights(model, args.finetune, finetune=True))
    check_input_size(args, model)
    if args.freeze:
        if not isinstance(model, models.Twins):
            raise UserError(
                f"--freeze {args.freeze}: only Twins has stages to freeze; omit it for --model {args.model}"
            )
        model.freeze_stages(args.freeze)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def evaluate_model(
    args: Namespace, processes: Processes, model: nn.Module, val_loader: DataLoader, what: str = "network"
) -> dict[str, float]:
    """Evaluate a model and log the metrics in the two lines of the original."""
    amp_dtype = choose_amp(args.amp, processes.device)
    stats = evaluate(model, val_loader, processes.device, amp_dtype=amp_dtype, sharded=args.dist_eval)
    logger.info("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
    logger.info("Accuracy of the %s on the %d test images: %.1f%%", what, stats["images"], stats["acc1"])
    return stats


def evaluate_state(
    args: Namespace, processes: Processes, state: TrainState, val_loader: DataLoader
) -> dict[str, float]:
    """Evaluate the model and its moving average, if there is one; return the metrics as test_* and test_ema_*."""
    evaluated = [("test", "network", state.model)]
    if state.model_ema is not None:
        evaluated.append(("test_ema", "moving average", state.model_ema.module))
    figures = {}
    for prefix, what, model in evaluated:
        stats = evaluate_model(args, processes, model, val_loader, what)
        figures |= {f"{prefix}_{name}": value for name, value in stats.items() if name != "images"}
    return figures


def announce(args: Namespace, processes: Processes, state: TrainState, nb_classes: int, accumulation: int) -> None:
    """Log the model, the batch sizes, and the differences from the recipe and from the published one."""
    global_batch = state.sampler.global_batch
    amp_dtype = choose_amp(args.amp, processes.device) or torch.float32
    trained = sum(parameter.numel() for parameter in state.parameters())
    frozen = f", {trained} of them trained" if args.freeze else ""
    counts = f"{state.n_parameters} parameters{frozen}, {nb_classes} classes"
    logger.info("%s: %s, %s on %s", args.model, counts, amp_dtype, processes.device)
    scaling = "" if args.unscale_lr else f" ({args.lr:g} x {global_batch} / 512)"
    lr = f"{peak_lr(args, global_batch):g}{scaling}"
    logger.info("%s", describe_batch(args.batch_size, accumulation, lr, state.sampler.steps))
    notes = note_recipe(args) + note_schedule(args, global_batch)
    notes += note_published(args, global_batch, amp_dtype, vars(get_args_parser().parse_args([])))
    for note in notes:
        logger.info("%s", note)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the options twice: the second time the values of the recipe and of an evaluated training are defaults."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    weights = args.resume or args.finetune
    try:
        if args.recipe:
            parser.set_defaults(**get_recipe(args.recipe, args.model))
        if args.eval and weights:
            parser.set_defaults(**remembered_options(read_description(weights, "classification")))
    except ValueError as error:  # a UserError or TwinsError
        parser.error(str(error))
    args = parser.parse_args(argv)
    check_args(parser, args)
    check_ranges(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see `core.launch.run_script` for exit codes and errors."""
    args = parse_args(argv)
    when_stopped = RESUMABLE if args.output_dir else ""
    run_script("main.py", run_evaluation if args.eval else run_training, args, when_stopped, one_size=True)


if __name__ == "__main__":
    main()
