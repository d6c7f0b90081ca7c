"""Apply small changes to the code, and check that tests fail for each of them.

    python -m tests.mutations              # all mutations, in a temporary copy of the tree
    python -m tests.mutations clip flip    # mutations whose name contains one of these words

Each mutation disables an option, a step of an augmentation or a check. Mutations are applied one at a time. All tests
listed with a mutation must fail. It is an error if the text of a mutation does not occur exactly once: then the code
has changed and the mutation must be adapted.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WORKERS = 2  # copies of the tree that are tested in parallel
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "output", "work_dirs", ".*_cache", "pictures")
SECONDS = 1800  # timeout of a pytest run
TESTS_FAILED = 1  # exit code of pytest for failed tests; other codes mean that the mutation is wrong


class Mutation(NamedTuple):
    """A change of the code for which tests must fail.

    Attributes:
        name: Name of the disabled feature.
        file: Path of the file, relative to the root.
        text: Text that occurs exactly once in the file.
        replacement: Text that replaces it.
        tests: Pytest ids, without `tests/`, of the tests that must fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def options(option: str) -> str:
    return f"test_options.py::test_an_option_changes_the_weights[{option}]"


def beside(option: str) -> str:
    return f"test_options.py::test_an_option_beside_others_changes_the_weights[{option}]"


def field(task: str, name: str, others: str = "") -> str:
    return f"test_dense_options.py::test_a_field_{others}changes_the_weights[{task}-{name}]"


# fmt: off
MUTATIONS = [
    # Options of main.py.
    Mutation("--clip-grad", "core/options.py", "max_norm=getattr(args, \"clip_grad\", 0) or math.inf", "max_norm=math.inf",
             ("test_options.py::test_gradients_are_clipped_to_the_given_norm", options("clip_grad"))),
    Mutation("--drop-path", "main.py", '"drop_path_rate": args.drop_path', '"drop_path_rate": 0.0',
             ("test_options.py::test_rates_of_drop_path_and_dropout_follow_their_options", options("drop_path"))),
    Mutation("--drop", "main.py", '"drop_rate": args.drop,', '"drop_rate": 0.0,',
             ("test_options.py::test_rates_of_drop_path_and_dropout_follow_their_options", options("drop"))),
    Mutation("--repeated-aug", "datasets.py", "repeats=3 if args.repeated_aug else 1", "repeats=1",
             ("test_options.py::test_repeated_augmentation_uses_each_image_three_times", options("repeated_aug"))),
    Mutation("--model-ema-decay", "main.py", "decay=args.model_ema_decay", "decay=0.9",
             ("test_options.py::test_decay_of_the_moving_average",)),
    Mutation("--grad-checkpointing", "main.py", "    if args.grad_checkpointing:\n        model.set_grad_checkpointing()\n", "",
             ("test_options.py::test_checkpointing_and_compiling_are_enabled",)),
    Mutation("--compile", "core/options.py", "        model.compile()\n", "",
             ("test_options.py::test_checkpointing_and_compiling_are_enabled",)),
    Mutation("--opt", "core/optimizer.py", "create_optimizer_v2(model, opt=args.opt,", 'create_optimizer_v2(model, opt="adamw",', (options("opt"),)),
    Mutation("--opt-eps", "core/optimizer.py", 'options["eps"] = args.opt_eps', "pass", (options("opt_eps"),)),
    Mutation("--opt-betas", "core/optimizer.py", 'options["betas"] = tuple(args.opt_betas)', "pass", (options("opt_betas"),)),
    Mutation("--weight-decay", "core/optimizer.py", '"weight_decay": args.weight_decay', '"weight_decay": 0.05', (options("weight_decay"),)),
    Mutation("--momentum", "core/optimizer.py", '"momentum": args.momentum', '"momentum": 0.9', (beside("momentum"),)),
    Mutation("--layer-decay", "core/optimizer.py", "layer_decay=args.layer_decay", "layer_decay=None",
             (options("layer_decay"), "test_main.py::test_layer_decay")),
    Mutation("steps of --sched-on-updates", "core/optimizer.py", "updates_per_epoch=steps)", "updates_per_epoch=steps + 1)",
             ("test_main.py::test_a_schedule_by_updates_counts_accumulated_steps",)),
    Mutation("the note on a long warm-up", "core/optimizer.py", "if 3 * args.warmup_epochs >=", "if args.warmup_epochs >=",
             ("test_options.py::test_a_long_warm_up_is_noted",)),
    Mutation("weights of features", "models/weights.py", "if isinstance(model, FeatureGetterNet):", "if False:",
             ("test_weights.py::test_features_take_the_weights_of_a_classifier",)),
    Mutation("weights of pruned stages", "models/weights.py", '"norm.", "head.", "patch_embeds.", "pos_block.", "blocks."', '"norm.", "head."',
             ("test_weights.py::test_features_take_the_weights_of_a_classifier",)),
    Mutation("--freeze", "main.py", "        model.freeze_stages(args.freeze)\n", "        pass\n",
             ("test_freezing.py::test_frozen_stages_keep_their_weights",)),
    Mutation("drop path of frozen stages", "models/twins.py", "            block.drop_path = nn.Identity()\n", "            pass\n",
             ("test_freezing.py::test_frozen_stages_have_no_drop_path",)),
    Mutation("the configuration of a new variant", "models/twins.py", 'kwargs["pretrained_cfg"] = _cfg()', "pass",
             ("test_timm_interface.py::test_a_variant_without_a_default_configuration_has_that_of_the_others",)),
    Mutation("--unscale-lr", "core/optimizer.py", "args.lr if args.unscale_lr else", "args.lr if False else",
             ("test_options.py::test_the_learning_rate_follows_the_batch",)),
    Mutation("the schedule is not stepped", "core/run.py", "        state.lr_scheduler.step(state.epoch)\n", "",
             ("test_main.py::test_a_longer_resumed_run_follows_its_new_options",)),
    Mutation("--smoothing with mixup", "main.py", "label_smoothing=args.smoothing", "label_smoothing=0.1", (options("smoothing"),)),
    Mutation("--mixup", "main.py", "mixup_alpha=args.mixup", "mixup_alpha=0.8", (options("mixup"),)),
    Mutation("--cutmix", "main.py", "cutmix_alpha=args.cutmix,", "cutmix_alpha=1.0,", (options("cutmix"),)),
    Mutation("--cutmix-minmax", "main.py", "cutmix_minmax=args.cutmix_minmax", "cutmix_minmax=None", (beside("cutmix_minmax"),)),
    Mutation("--mixup-prob", "main.py", "prob=args.mixup_prob,", "prob=1.0,", (options("mixup_prob"),)),
    Mutation("--mixup-switch-prob", "main.py", "switch_prob=args.mixup_switch_prob", "switch_prob=0.5", (options("mixup_switch_prob"),)),
    Mutation("--mixup-mode", "main.py", "mode=args.mixup_mode", 'mode="batch"', (options("mixup_mode"),)),
    Mutation("--seed of the order", "datasets.py", "        seed=args.seed,\n        repeats", "        seed=0,\n        repeats",
             ("test_options.py::test_seeds_reach_the_order_and_the_augmentation",)),
    Mutation("--seed of the augmentation", "datasets.py", "TrainSet(build_dataset(True, args), args.seed,", "TrainSet(build_dataset(True, args), 0,",
             ("test_options.py::test_seeds_reach_the_order_and_the_augmentation",)),
    Mutation("--amp in training", "core/options.py", "amp_dtype=choose_amp(args.amp, device)", "amp_dtype=None", (options("amp"),)),
    Mutation("--amp in the evaluation", "main.py", "amp_dtype=amp_dtype, sharded", "amp_dtype=None, sharded",
             ("test_options.py::test_mixed_precision_reaches_the_evaluation",)),
    Mutation("--distillation-alpha", "main.py", "args.distillation_type, args.distillation_alpha,", "args.distillation_type, 0.5,",
             ("test_options.py::test_distillation_uses_its_options",)),
    Mutation("--distillation-tau", "main.py", "args.distillation_alpha, args.distillation_tau", "args.distillation_alpha, 1.0",
             ("test_options.py::test_distillation_uses_its_options",)),
    Mutation("--dist-eval", "datasets.py", "if args.dist_eval else range", "if False else range",
             ("test_options.py::test_a_distributed_evaluation_takes_a_part_of_the_images",)),
    Mutation("--save-every", "core/options.py", "save_every=args.save_every", "save_every=None",
             ("test_options.py::test_checkpoints_are_written_within_an_epoch",)),
    Mutation("--keep", "core/run.py", 'RunFolder(options["output_dir"], options["keep"])', 'RunFolder(options["output_dir"])',
             ("test_options.py::test_the_number_of_kept_checkpoints_follows_its_option", "test_dense_options.py::test_options_of_a_dense_training")),
    Mutation("--print-freq", "core/options.py", "print_freq=args.print_freq", "print_freq=10",
             ("test_options.py::test_log_lines_follow_their_option",)),
    Mutation("--num_workers", "core/options.py", "workers = min(args.num_workers, cores_per_process())", "workers = 0",
             ("test_options.py::test_loaders_follow_their_options",)),
    Mutation("--loader-timeout", "core/options.py", "args.loader_timeout if workers else 0", "600 if workers else 0",
             ("test_options.py::test_loaders_follow_their_options",)),
    Mutation("--pin-mem", "core/options.py", "args.pin_mem and device.type", "device.type",
             ("test_options.py::test_loaders_follow_their_options",)),

    # Augmentation of classification.
    Mutation("--scale", "transforms.py", "crop = RandomCrop(args.input_size, args.scale,", "crop = RandomCrop(args.input_size, (0.08, 1.0),", (options("scale"),)),
    Mutation("--train-interpolation", "transforms.py", "args.scale, interpolation=args.train_interpolation", 'args.scale, interpolation="bicubic"',
             (beside("train_interpolation"),)),
    Mutation("--color-jitter", "transforms.py", "color_jitter=args.color_jitter", "color_jitter=0.4", (beside("color_jitter"),)),
    Mutation("--aa", "transforms.py", 'auto_augment=None if args.aa == "none" else args.aa', 'auto_augment="rand-m9-mstd0.5-inc1"', (options("aa"),)),
    Mutation("--reprob", "transforms.py", "re_prob=args.reprob", "re_prob=0.25", (options("reprob"),)),
    Mutation("--remode", "transforms.py", "re_mode=args.remode", 're_mode="pixel"', (beside("remode"),)),
    Mutation("--recount", "transforms.py", "re_count=args.recount", "re_count=1", (beside("recount"),)),
    Mutation("erased parts", "transforms.py", "        images.movedim(-3, -1).view(-1, 3)[self.erased] = self.values.T\n", "",
             ("test_transforms.py::test_images_equal_those_of_timms_transforms",)),
    Mutation("no flip, no colours: all but the crop", "transforms.py", "[crop, *steps[1:end], ToTrainImages", "[crop, ToTrainImages",
             ("test_transforms.py::test_images_equal_those_of_timms_transforms", options("aa"))),
    Mutation("small images of CIFAR are cropped, not shifted", "transforms.py", 'args.data_set == "CIFAR" and args.input_size <= 32', "False",
             ("test_datasets.py::test_cifar",)),
    Mutation("shears and shifts", "transforms.py", '    "ShearX": shear,\n', "",
             ("test_transforms.py::test_operations_of_every_policy_are_adapted[rand-m9-mstd0.5-inc1]",)),
    Mutation("posterising on 0 bits", "transforms.py", '    "PosterizeOriginal": posterize,\n', "",
             ("test_transforms.py::test_operations_of_every_policy_are_adapted[original]",)),
    Mutation("the choice of an interpolation", "transforms.py", "resample = random.choice(resample)", "resample = resample[0]",
             ("test_transforms.py::test_moved_pixels_are_pillows[random-ShearX]",)),
    Mutation("normalisation of channels-last images", "transforms.py", "values.movedim(0, -1).repeat(1, width, 1)", "values.repeat(1, width, 1)",
             ("test_transforms.py::test_normalisation_is_torchvisions",)),
    Mutation("images per second", "core/meters.py", "_count_images(first) if isinstance(first, tuple) else len(first)", "len(first)",
             ("test_engine.py::test_images_of_nested_batches_are_counted",)),
    Mutation("images of an epoch", "core/meters.py", "        self.images += images\n", "        self.images = images\n",
             ("test_engine.py::test_log_line",)),
    Mutation("the recipe of the epochs of benchmarks", "benchmarks/epochs.py", "options = RECIPE | {option:", "options = {option:",
             ("test_benchmarks.py::test_epochs_of_main_have_the_options_of_timms",)),
    Mutation("--eval-crop-ratio", "transforms.py", "else args.eval_crop_ratio", "else 0.875",
             ("test_options.py::test_the_evaluated_crop_follows_its_option",)),
    Mutation("copies of repeated augmentation alike", "samplers.py", "yield SampleKey(self.epoch, int(order[index]), copy)", "yield SampleKey(self.epoch, int(order[index]), 0)",
             ("test_samplers.py::test_repeated_augmentation",)),
    Mutation("the order of an epoch", "samplers.py", "np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)", "np.arange(self.num_samples)",
             ("test_samplers.py::test_order_depends_on_seed_and_epoch",)),

    # Segmentation.
    Mutation("EXIF orientation", "core/images.py", 'decode_image(path, "RGB", upright=True)', 'decode_image(path, "RGB")',
             ("test_segmentation_data.py::test_images_are_turned_by_their_exif_orientation_and_labels_are_not[6]",)),
    Mutation("the image is flipped, the labels are not", "segmentation/transforms.py", "image, labels = image.flip(2), labels.flip(1)", "image = image.flip(2)",
             ("test_segmentation_data.py::test_images_and_labels_are_flipped_together_half_of_the_time",)),
    Mutation("no flip of segmentation", "segmentation/transforms.py", "        image, labels = image.flip(2), labels.flip(1)\n", "        pass\n",
             ("test_segmentation_data.py::test_images_and_labels_are_flipped_together_half_of_the_time",)),
    Mutation("no distortion of colours", "segmentation/transforms.py", "normalise(distort_colours(image))", "normalise(image.byte())",
             ("test_segmentation_data.py::test_training_images_are_distorted_in_their_colours",)),
    Mutation("no random factor on the scale", "segmentation/transforms.py", "np.random.uniform(*scale_range)", "1.0",
             ("test_segmentation_data.py::test_training_images_are_resized_by_a_random_factor", field("segmentation", "scale_range"))),
    Mutation("padding counts", "segmentation/transforms.py", "F.pad(labels, padding, value=IGNORED_LABEL)", "F.pad(labels, padding, value=0)",
             ("test_segmentation_data.py::test_training_views_are_cropped_flipped_and_padded",)),
    Mutation("one try for a crop", "segmentation/transforms.py", "CROP_TRIES = 10", "CROP_TRIES = 0",
             ("test_segmentation_data.py::test_crops_avoid_a_class_that_fills_them",)),
    Mutation("brightness", "segmentation/transforms.py", "np.random.uniform(-32, 32)", "np.random.uniform(-31, 31)",
             ("test_segmentation_data.py::test_distortions_have_the_published_probabilities",)),
    Mutation("hue", "segmentation/transforms.py", "np.random.randint(-18, 18)", "np.random.randint(-18, 19)",
             ("test_segmentation_data.py::test_distortions_have_the_published_probabilities",)),
    Mutation("contrast second or last", "segmentation/transforms.py", "    if contrast_first:\n", "    if True:\n",
             ("test_segmentation_data.py::test_distortions_have_the_published_probabilities", "test_segmentation_data.py::test_distortions_are_made_one_after_the_other")),
    Mutation("saturations are whole levels", "segmentation/transforms.py", "np.floor((saturation * factor).clip(max=255))", "(saturation * factor).clip(max=255)",
             ("test_segmentation_data.py::test_colours_change_as_by_opencv",)),
    Mutation("hues modulo 180", "segmentation/transforms.py", "(hue.astype(np.int16) + shift) % 180", "(hue.astype(np.int16) + shift) % 179",
             ("test_segmentation_data.py::test_colours_change_as_by_opencv",)),
    Mutation("an image is distorted in all its rows", "segmentation/transforms.py", "range(0, pixels.shape[1], CACHED_ROWS)", "range(0, CACHED_ROWS, CACHED_ROWS)",
             ("test_segmentation_data.py::test_distortions_are_made_one_after_the_other",)),
    Mutation("initial weights of the neck", "segmentation/heads.py", '    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")\n    nn.init.zeros_', "    nn.init.xavier_uniform_(conv.weight)\n    nn.init.zeros_",
             ("test_segmentation_network.py::test_heads_and_neck_start_with_the_published_distributions[FPN]",)),
    Mutation("ignored_label", "segmentation/data.py", " | (stored == ignored_label)", "",
             ("test_segmentation_data.py::test_other_folders_suffixes_lists_and_an_ignored_label",)),
    Mutation("lists of images", "segmentation/data.py", "        images = {name: images[name] for name in names}\n", "",
             ("test_segmentation_data.py::test_other_folders_suffixes_lists_and_an_ignored_label",)),
    Mutation("label_suffix", "segmentation/data.py", "[experiment.label_suffix])", '[".png"])',
             ("test_segmentation_data.py::test_other_folders_suffixes_lists_and_an_ignored_label",)),
    Mutation("--aug-test of segmentation", "segmentation/test.py", "flip=args.aug_test", "flip=False",
             ("test_segmentation_runs.py::test_options_of_a_test_reach_the_prediction[multi-scale]",)),
    Mutation("sliding windows", "segmentation/network.py", "flip=flip, **sliding)", "flip=flip)",
             ("test_segmentation_runs.py::test_options_of_a_test_reach_the_prediction[sliding]",)),
    Mutation("--format-only", "segmentation/test.py", '"test" if args.format_only else "val"', '"val"',
             ("test_segmentation_runs.py::test_predictions_of_a_test_set_without_labels",)),
    Mutation("predictions of a folder need each pixel", "segmentation/metrics.py", "prediction.shape != size or (prediction == IGNORED_LABEL).any()", "False",
             ("test_segmentation_runs.py::test_predictions_are_evaluated_again_without_the_network",)),
    Mutation("eval_interval follows iterations", "segmentation/configs/recipes.py", "-(-self.iterations // self.evaluations)", "16_000",
             ("test_segmentation_runs.py::test_one_field_sets_a_schedule",)),
    Mutation("intervals divide the iterations", "segmentation/configs/recipes.py", " if self.iterations % length == 0)", ")",
             ("test_segmentation_runs.py::test_any_number_of_iterations_is_divided_into_intervals",)),
    Mutation("drop_path of segmentation", "segmentation/network.py", '"drop_path_rate": experiment.drop_path', '"drop_path_rate": 0.0', (field("segmentation", "drop_path"),)),
    Mutation("min_lr", "segmentation/train.py", "min_ratio = experiment.min_lr / experiment.lr", "min_ratio = 0.0", (field("segmentation", "min_lr"),)),
    Mutation("power", "segmentation/train.py", "** experiment.power", "** 1.0", (field("segmentation", "power"),)),
    Mutation("warmup_ratio of segmentation", "segmentation/train.py", "experiment.warmup_ratio", "1e-6",
             (field("segmentation", "warmup_ratio", "beside_others_"),)),
    Mutation("--amp in the evaluation of segmentation", "segmentation/train.py", "build_predictor(model, experiment, choose_amp(args.amp, processes.device))", "build_predictor(model, experiment, None)",
             ("test_segmentation_runs.py::test_mixed_precision_reaches_the_evaluation",)),
    Mutation("overlapping bins of the pyramid pooling", "segmentation/heads.py", "((bins + 1) * side + self.bins - 1) // self.bins", "(bins + 1) * side // self.bins",
             ("test_export.py::test_pooling_is_torchs[size3-6]",)),

    # Detection.
    Mutation("no flip of detection", "detection/transforms.py", "    if np.random.rand() < 0.5:\n        return image, target\n", "    return image, target\n",
             ("test_detection_data.py::test_a_mirrored_sample_fits_together", "test_detection_data.py::test_samples_are_mirrored_half_of_the_time")),
    Mutation("one_scale without flip", "detection/transforms.py", "return random_flip(*resize(image, target, fitted_size(image.shape[1:], scale)))", "return resize(image, target, fitted_size(image.shape[1:], scale))",
             ("test_detection_data.py::test_samples_are_mirrored_half_of_the_time[one scale]",)),
    Mutation("many_scales without flip", "detection/transforms.py", "    image, target = random_flip(image, target)\n", "",
             ("test_detection_data.py::test_samples_are_mirrored_half_of_the_time[many scales]",)),
    Mutation("many_scales without crops", "detection/transforms.py", "        image, target = random_crop(image, target, 384, 600)\n", "",
             ("test_detection_data.py::test_scales_of_both_settings",)),
    Mutation("many_scales", "detection/train.py", "many_scales if experiment.many_scales else", "many_scales if False else",
             ("test_dense_options.py::test_an_experiment_chooses_its_scales",)),
    Mutation("boxes are not clipped", "detection/transforms.py", 'clip_boxes_to_image(target["boxes"] * target["boxes"].new_tensor([width / w, height / h] * 2), size)', 'target["boxes"] * target["boxes"].new_tensor([width / w, height / h] * 2)',
             ("test_detection_data.py::test_boxes_are_clipped_to_the_resized_image",
              "test_detection_data.py::test_boxes_are_clipped_to_resized_images_as_in_the_original[True]")),
    Mutation("images of crowds are skipped", "detection/data.py", "self.coco.imgToAnns[i]]", "self._used_annotations(i)]",
             ("test_detection_data.py::test_images_of_crowds_and_ignored_annotations_are_background",)),
    Mutation("ignored annotations", "detection/data.py", 'annotation["iscrowd"] or annotation.get("ignore")', 'annotation["iscrowd"]',
             ("test_detection_data.py::test_images_of_crowds_and_ignored_annotations_are_background",)),
    Mutation("batches never reshuffled", "detection/data.py", "rng = np.random.default_rng((self.seed, self.epoch))", "rng = np.random.default_rng(self.seed)",
             ("test_detection_data.py::test_batches_are_shuffled_anew_in_each_epoch",)),
    Mutation("batches in the order of the groups", "detection/data.py", "batches = rng.permutation(np.concatenate(filled).reshape(-1, self.batch_size))", "batches = np.concatenate(filled).reshape(-1, self.batch_size)",
             ("test_detection_data.py::test_batches_are_shuffled_anew_in_each_epoch",)),
    Mutation("groups in their order", "detection/data.py", "np.resize(rng.permutation(group), whole)", "np.resize(group, whole)",
             ("test_detection_data.py::test_batches_are_shuffled_anew_in_each_epoch",)),
    Mutation("groups mixed within batches", "detection/data.py", "rng.permutation(np.concatenate(filled).reshape(-1, self.batch_size))", "rng.permutation(np.concatenate(filled)).reshape(-1, self.batch_size)",
             ("test_detection_data.py::test_batches_are_those_of_the_original[2]",)),
    Mutation("resumed batches from the start", "detection/data.py", "batches[first + self.rank :: self.world_size]", "batches[self.rank :: self.world_size]",
             ("test_detection_data.py::test_batches_are_those_of_the_original[2]",)),
    Mutation("drop_path of detection", "detection/network.py", "drop_path_rate=experiment.drop_path", "drop_path_rate=0.0", (field("detection", "drop_path"),)),
    Mutation("milestones", "detection/train.py", "for milestone in experiment.milestones)", "for milestone in ())",
             (field("detection", "milestones", "beside_others_"),)),
    Mutation("--amp in the evaluation of detection", "detection/train.py", "dataset.category_ids, amp_dtype=amp_dtype", "dataset.category_ids, amp_dtype=None",
             ("test_detection_runs.py::test_mixed_precision_reaches_the_evaluation",)),
    Mutation("boxes of flipped views", "detection/augmented.py", "        boxes = flip_boxes(boxes, self.size[1]) if self.flipped else boxes\n", "",
             ("test_detection_views.py::test_views_of_retinanet_are_merged_as_in_the_original", "test_detection_views.py::test_views_of_mask_rcnn_are_averaged")),
    Mutation("masks of flipped views", "detection/augmented.py", "masks.flip(2) if view.flipped else masks", "masks",
             ("test_detection_views.py::test_views_of_mask_rcnn_are_averaged",)),
    Mutation("scores of views", "detection/augmented.py", "scores.mean(0)", "scores[0]",
             ("test_detection_views.py::test_views_of_mask_rcnn_are_averaged",)),
    Mutation("boxes of views", "detection/augmented.py", "heads.select(boxes.mean(0)", "heads.select(boxes[0]",
             ("test_detection_views.py::test_views_of_mask_rcnn_are_averaged",)),
    Mutation("proposals of views", "detection/augmented.py", "nms(proposals, scores, rpn.nms_thresh)", "scores.argsort(descending=True)",
             ("test_detection_views.py::test_views_of_mask_rcnn_are_averaged",)),
    Mutation("test_scales", "detection/test.py", "experiment.test_scales or [experiment.scale]", "[experiment.scale]",
             ("test_detection_views.py::test_saved_results_are_evaluated_without_the_network",)),
    Mutation("--format-only", "detection/test.py", '"test" if args.format_only else "val"', '"val"',
             ("test_detection_views.py::test_a_set_without_annotations_has_results_but_no_figures",)),
    Mutation("thresholds of an experiment", "detection/network.py", "nms_thresh=experiment.nms_threshold,\n            detections_per_img=experiment.detections,\n            mask_roi_pool", "nms_thresh=0.5,\n            mask_roi_pool",
             ("test_detection_views.py::test_objects_are_chosen_by_the_thresholds_of_the_experiment",)),
    Mutation("folders of one's own data", "detection/data.py", 'getattr(experiment, f"{part}_{name}")', 'getattr(Experiment, f"{part}_{name}")',
             ("test_detection_data.py::test_data_may_lie_in_other_folders",)),
    Mutation("every process evaluates", "detection/metrics.py", "return on_main(compute)", "results = results or []\n    return compute()",
             ("test_detection_runs.py::test_the_main_process_alone_computes_the_figures",)),

    # Both dense tasks.
    Mutation("weight_decay of the dense tasks", "dense/optimisation.py", '"params": [], "weight_decay": weight_decay}', '"params": [], "weight_decay": 0.0}',
             (field("segmentation", "weight_decay"), field("detection", "weight_decay"))),
    Mutation("not_decayed", "dense/optimisation.py", "groups[1] if any(part in name for part in not_decayed) else groups[0]", "groups[0]",
             (field("segmentation", "not_decayed"), "test_dense.py::test_norms_and_positional_encodings_are_not_decayed")),
    Mutation("the precision of an experiment", "dense/training.py", 'args.amp = experiment.precision if on_gpu else "off"', 'args.amp = "off"',
             ("test_dense.py::test_experiments_are_run_in_their_precision_on_a_gpu[True]",)),
    Mutation("loss_scale", "dense/training.py", "build_scaler(device, experiment.loss_scale, is_fp16)", "build_scaler(device, 0.0, is_fp16)",
             ("test_dense.py::test_a_published_loss_scale_reaches_the_training",)),
    Mutation("a loss scale without its limit", "dense/optimisation.py", "        self._scale.clamp_(max=self.limit)", "        pass",
             ("test_dense.py::test_a_published_loss_scale_is_an_upper_limit",)),
    Mutation("lr of the dense tasks", "dense/training.py", "lr=experiment.lr,", "lr=1e-3,", (field("segmentation", "lr"), field("detection", "lr"))),
    Mutation("the note on BatchNorm", "dense/training.py", "        log_norms(model, batch_size, experiment.global_batch, processes)\n", "",
             ("test_segmentation_runs.py::test_another_global_batch_continues_at_the_same_step[8]",)),
    Mutation("limits of fields", "dense/experiments.py", "if not limit.holds(number):", "if False:", ("test_dense.py::test_bad_changes_are_refused",)),
    Mutation("types of fields", "segmentation/configs/recipes.py", "        check_fields(self)\n", "",
             ("test_dense.py::test_files_without_an_experiment_are_refused",)),

    # The place in a run, errors, files.
    Mutation("a run counted in steps goes on by images", "samplers.py", '        return step\n', "        return super().nearest_step(step, global_batch)\n",
             ("test_samplers.py::test_another_global_batch_continues_at_the_same_step_where_steps_are_counted",
              "test_segmentation_runs.py::test_another_global_batch_continues_at_the_same_step")),
    Mutation("a place behind the end of an epoch", "samplers.py", "return min(step * global_batch // self.global_batch, self.steps)", "return step * global_batch // self.global_batch",
             ("test_detection_data.py::test_another_global_batch_continues_within_the_epoch",)),
    Mutation("every ValueError is the user's", "core/launch.py", "isinstance(error, (UserError, TwinsError, SharedError))", "isinstance(error, (ValueError, SharedError))",
             ("test_launch.py::test_internal_errors_keep_their_traceback", "test_launch.py::test_errors_of_data_loading_processes")),
    Mutation("every OSError is the user's", "core/launch.py", "isinstance(error, (UserError, TwinsError, SharedError))", "isinstance(error, (UserError, TwinsError, OSError, SharedError))",
             ("test_launch.py::test_internal_errors_keep_their_traceback",)),
    Mutation("the last line of a message", "core/launch.py", 'return " ".join(message.split())', "return message.splitlines()[-1]",
             ("test_launch.py::test_messages_of_several_lines_become_one_line",)),
    Mutation("infinite numbers", "core/options.py", "if too_low or value > high or value >= LARGEST:", "if too_low or value > high:",
             ("test_launch.py::test_numbers_are_finite",)),
    Mutation("NaN in log.txt", "core/run_folder.py", 'to_json(line) + "\\n" for', 'json.dumps(line) + "\\n" for',
             ("test_run_folder.py::test_the_log_is_valid_json_whatever_the_figures",)),
    Mutation("nested batches", "engine.py", "return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)", "return batch",
             ("test_engine.py::test_nested_batches_are_moved", "test_engine.py::test_named_tuples_are_moved")),
    Mutation("formats of the future", "core/checkpoint.py", 'if content.get("format", 1) not in range(FORMAT + 1):', "if False:",
             ("test_formats.py::test_newer_checkpoints_are_refused[classification]",)),
    Mutation("second-order optimizers", "core/optimizer.py", 'if getattr(optimizer, "is_second_order", False):', "if False:",
             ("test_main.py::test_bad_arguments_end_with_one_line",)),
    Mutation("the number of betas", "core/optimizer.py", "if betas and len(betas) != len(default):", "if False:",
             ("test_main.py::test_bad_arguments_end_with_one_line",)),
    Mutation("a new head in the mode of the model", "models/twins.py", "dtype=parameter.dtype).train(self.training)", "dtype=parameter.dtype)",
             ("test_timm_interface.py::test_a_new_classifier_is_like_the_model[alt_gvt_tiny-False]",)),
    Mutation("features of a stage with one block", "models/twins.py", 'else f"pos_block.{stage}"', 'else f"blocks.{stage}"',
             ("test_timm_interface.py::test_features[alt_gvt_tiny-fx]",)),
    Mutation("FX does not enter windows", "models/layers.py", "@register_notrace_module  # the windows depend on the size\n", "",
             ("test_timm_interface.py::test_fx[alt_gvt_tiny-False]",)),
    Mutation("released padding, eager", "models/layers.py", "one_side = (height", "one_side = False and (height",
             ("test_models.py::test_window_attention_equals_a_loop_over_windows[released-size1]",
              "test_segmentation_network.py::test_maps_with_padding_on_one_side_equal_the_originals[upernet_swin_setting-eager]")),
    Mutation("released padding, captured", "models/layers.py", "inside | (below.any() != right.any())", "inside",
             ("test_segmentation_network.py::test_maps_with_padding_on_one_side_equal_the_originals[fpn_pvt_setting-traced]",
              "test_capture.py::test_one_trace_for_all_sizes[alt_gvt_tiny-kwargs3]")),
    Mutation("spare window", "models/layers.py", "(1 if torch.compiler.is_compiling() else 0)", "0",
             ("test_capture.py::test_one_exported_program_of_a_single_image_for_all_sizes[size1]",)),
    Mutation("windows in chunks", "models/layers.py", "x.shape[0] <= most * tokens", "x.shape[0] > 0",
             ("test_models.py::test_many_windows_are_attended_in_chunks[zero-11-expected1]",
              "test_capture.py::test_windows_are_attended_in_chunks_in_compiled_graphs[False]")),
    Mutation("one conversion of a block's input", "models/layers.py", "self.attn(to_autocast_type(self.norm1(x)))", "self.attn(self.norm1(x))",
             ("test_models.py::test_a_block_converts_its_inputs_to_the_type_of_autocast_once[attention1]",)),
    Mutation("fast layers of main.py", "main.py", "models.cpu.accelerate(timm.create_model(name, num_classes=nb_classes, **kwargs))",
             "timm.create_model(name, num_classes=nb_classes, **kwargs)",
             ("test_dense_options.py::test_trainings_use_the_fast_layers[classification]",)),
    Mutation("fast layers of dense trainings", "dense/training.py", "accelerate(task.model)", "task.model",
             ("test_dense_options.py::test_trainings_use_the_fast_layers[segmentation]",
              "test_dense_options.py::test_trainings_use_the_fast_layers[detection]")),
    Mutation("fast layers of the tests of dense tasks", "dense/training.py", "accelerate(model).to", "model.to",
             ("test_dense_options.py::test_tests_of_dense_tasks_use_the_fast_layers[segmentation]",
              "test_dense_options.py::test_tests_of_dense_tasks_use_the_fast_layers[detection]")),
    Mutation("traces have the layers of torch", "models/cpu.py", "        torch.jit.is_tracing()\n        or torch._C._functorch",
             "        torch._C._functorch", ("test_cpu.py::test_traced_layers_are_those_of_torch",)),
    Mutation("evaluation remembers the training", "main.py", 'parser.set_defaults(**remembered_options(read_description(weights, "classification")))', "pass",
             ("test_main.py::test_evaluation_remembers_the_training",)),
    Mutation("a test remembers the training", "dense/training.py", "dataclasses.replace(experiment, **trained), changes", "experiment, changes",
             ("test_dense_options.py::test_a_test_remembers_the_training[segmentation]",
              "test_dense_options.py::test_a_test_remembers_the_training[detection]")),
    Mutation("a test remembers the labels", "dense/training.py", '    "ignored_label",\n', "",
             ("test_segmentation_runs.py::test_ones_own_data_train_and_are_evaluated",)),
    Mutation("long warm-ups", "dense/training.py", "        log_warmup(experiment.warmup_iterations, task.epochs * state.sampler.steps)\n", "",
             ("test_segmentation_runs.py::test_long_warm_ups_are_announced",)),
    Mutation("the padding of old runs of segmentation", "core/run.py", "before = saved_options(content)", 'before = content["args"]',
             ("test_formats.py::test_old_checkpoints_are_restored[segmentation]",)),
    Mutation("colours by rule avoid those of the user", "segmentation/data.py", " if colour not in given.values())", ")",
             ("test_segmentation_data.py::test_ones_own_folder",)),
    Mutation("a resumed loss scale", "dense/optimisation.py", 'state_dict | {"scale": min(state_dict["scale"], self.limit)}', "state_dict",
             ("test_dense.py::test_a_published_loss_scale_is_an_upper_limit",)),
    Mutation("task of a checkpoint", "core/description.py", "if task not in (None, known):", "if False:",
             ("test_dense_options.py::test_a_test_refuses_other_checkpoints[segmentation]",
              "test_dense_options.py::test_a_test_refuses_other_checkpoints[detection]")),
    Mutation("averaged scores of views", "detection/augmented.py", "scores.mean(0)", "scores.amax(0)",
             ("test_detection_views.py::test_boxes_scores_and_masks_of_views_are_averaged[shares0-False]",)),
    Mutation("averaged masks of views", "detection/augmented.py", "for view in views]).mean(0)", "for view in views]).amax(0)",
             ("test_detection_views.py::test_boxes_scores_and_masks_of_views_are_averaged[shares0-False]",)),
    Mutation("classes of a checkpoint", "core/description.py", "    if not known or list(known) == list(classes):\n", "    if True:\n",
             ("test_main.py::test_data_of_other_classes_are_refused",
              "test_dense_options.py::test_a_test_refuses_data_of_other_classes[segmentation]",
              "test_dense_options.py::test_a_test_refuses_data_of_other_classes[detection]")),
    Mutation("published recipes", "detection/configs/recipes.py", '**({"lr": 2e-4} | changes)', "**changes",
             ("test_published_recipes.py::test_fields_are_the_published_ones[detection-mask_rcnn_pcpvt_s_fpn_1x_coco_pvt_setting]",)),
    Mutation("private functions of torch", "models/cpu.py", "AVAILABLE = _is_available()", "AVAILABLE = True",
             ("test_cpu.py::test_models_work_without_private_functions_of_torch",)),
    Mutation("--seed of the dense tasks", "dense/training.py", '"seed": args.seed}', '"seed": 0}',
             ("test_dense_options.py::test_options_of_a_dense_training[segmentation]",
              "test_dense_options.py::test_options_of_a_dense_training[detection]")),
    Mutation("--seed of segmentation's augmentation", "segmentation/train.py", "SeededSet(dataset, args.seed, crop)", "SeededSet(dataset, 0, crop)", ("test_dense_options.py::test_options_of_a_dense_training[segmentation]",)),
    Mutation("--show-score-thr", "detection/test.py", 'keep_above(found, min_score)', 'keep_above(found, 0)', ("test_detection_runs.py::test_only_objects_above_the_threshold_are_shown",)),
    Mutation("internal errors of a write", "utils.py", "isinstance(error, Exception) and isinstance(cause, OSError)", "isinstance(error, Exception)",
             ("test_run_folder.py::test_internal_errors_of_a_write_keep_their_type",)),
    Mutation("a failing disk", "core/images.py", "            raise UserError(f\"{path}: cannot be read ({error.strerror}); check the disk and the permissions\") from error\n", "            raise\n",
             ("test_datasets.py::test_a_disk_that_fails_is_not_skipped",)),
    Mutation("scripts inside their folder", "segmentation/train.py", "    sys.path[0] = str(Path(__file__).resolve().parents[1])\n", "    pass\n",
             ("test_launch.py::test_scripts_of_the_dense_tasks_start_in_both_forms[inside its folder-segmentation-train.py]",)),
    Mutation("masks of background images", "detection/transforms.py", "F.interpolate(target[\"masks\"][:, None], size=size, mode=\"nearest\")[:, 0]", "F.interpolate(target[\"masks\"][None], size=size, mode=\"nearest\")[0]",
             ("test_detection_data.py::test_detectors_train_on_background_images[mask_rcnn]",)),
    Mutation("--freeze of the dense tasks", "dense/training.py", "        model.backbone.freeze_stages(args.freeze)\n", "",
             ("test_freezing.py::test_frozen_stages_of_a_backbone_keep_their_weights[segmentation-backbone.]",)),
    Mutation("files left out of a folder", "core/images.py", "    if counts:\n", "    if False:\n",
             ("test_datasets.py::test_files_that_are_no_images_are_named",)),
    Mutation("learning rate of a resumed run without steps", "core/checkpoint.py", "            self.lr_scheduler.step_update(updates - 1)\n", "            pass\n",
             ("test_survival.py::test_a_signal_during_evaluation",)),
    # Prediction.
    Mutation("orientation in predictions", "core/predictor.py", "    upright = True ", "    upright = False ",
             ("test_predict.py::test_dense_predictors_apply_the_exif_orientation",)),
    Mutation("input of a trained classifier", "predict.py", "**(EVALUATION | description.options)", "**EVALUATION",
             ("test_predict.py::test_classes_of_shapes_equal_the_evaluation",)),
    # What runs log step by step, and the comparison with published runs.
    Mutation("metrics after the checkpoint", "core/run_folder.py", "if _place(line) <= (epoch, step)", "if True",
             ("test_run_folder.py::test_metrics_after_the_checkpoint_are_cut", "test_survival.py::test_a_killed_run_ends_as_an_uninterrupted_one[1]")),
    Mutation("metrics are cut at a resume", "core/run.py", "        self.folder.cut_metrics(state.epoch, state.meter.step, self.checkpoint)\n", "",
             ("test_survival.py::test_a_killed_run_ends_as_an_uninterrupted_one[1]", "test_segmentation_runs.py::test_a_killed_run_ends_as_an_uninterrupted_one")),
    Mutation("doubled steps in TensorBoard", "core/run.py", '"steps": step + 1', '"steps": None',
             ("test_curves.py::test_tensorboard_shows_the_lines_of_the_logs[classification]",)),
    Mutation("doubled epochs in TensorBoard", "core/run.py", '"epochs": state.epoch}.items', '"epochs": state.epoch + 1}.items',
             ("test_curves.py::test_tensorboard_shows_the_lines_of_the_logs[segmentation]",)),
    Mutation("warm-up of published runs", "analysis/published.py", "if epoch >= published.warmup and epoch in", "if epoch in",
             ("test_curves.py::test_runs_at_half_the_pace_are_not_on_track",)),
    Mutation("the recipe of published runs", "analysis/published.py", "    if changed:\n", "    if False:\n",
             ("test_curves.py::test_other_recipes_are_not_judged",)),
    Mutation("the loss of published runs", "analysis/published.py", '(published.figure, "train_loss")]', "(published.figure,)]",
             ("test_curves.py::test_the_shortfall_is_named_until_the_run_recovers",)),
    Mutation("means of steps", "analysis/runs.py", "(value * taken - total) / (taken - done_taken)", "value",
             ("test_curves.py::test_losses_of_steps_are_means_since_the_line_before",)),

    # GPUs, as far as a CPU shows it.
    Mutation("--tf32", "core/launch.py", "choose_kernels(tf32, one_size)", "choose_kernels(True, one_size)",
             ("test_gpu_settings.py::test_kernels_of_each_script",)),
    Mutation("kernels of one size", "main.py", "when_stopped, one_size=True)", "when_stopped)",
             ("test_gpu_settings.py::test_kernels_of_each_script",)),
    Mutation("cuDNN's attention in dense tasks", "core/distributed.py", "enable_cudnn_sdp(one_size)", "enable_cudnn_sdp(True)",
             ("test_gpu_settings.py::test_chosen_kernels",)),
    Mutation("fused optimizer of classification", "core/optimizer.py", 'options["fused"] = True', "pass",
             ("test_gpu_settings.py::test_optimizers_are_fused_on_gpus[adamw-True]",)),
    Mutation("fused optimizer loads", "core/checkpoint.py", "[group | fused for group in", "[group for group in",
             ("test_gpu_settings.py::test_an_optimizer_takes_the_state_of_another_implementation",)),
    Mutation("overflows of fp16 end", "core/meters.py", "self.meter.overflows_in_a_row >= self.max_overflows", "False",
             ("test_gpu_settings.py::test_overflows_of_fp16_end_after_max_skipped",)),
    Mutation("overflows of fp16 in a row", "core/meters.py", "            self.meter.overflows_in_a_row = 0\n", "            pass\n",
             ("test_gpu_settings.py::test_overflows_of_fp16_are_skipped_and_counted[0]",)),
    Mutation("warning of waiting for data", "core/meters.py", "if self.waiting > MAX_WAITING * self.elapsed:", "if False:",
             ("test_engine.py::test_waiting_for_data_in_most_of_an_epoch_is_a_warning[0.05]",)),
    Mutation("bytes in evaluation", "engine.py", "model(to_input(images))", "model(images.float())",
             ("test_predict.py::test_classes_of_shapes_equal_the_evaluation",)),

    # What an export writes and compares.
    Mutation("tolerance of exports", "export.py", "TOLERANCE = 1e-4", "TOLERANCE = 1e-2",
             ("test_export.py::test_a_file_that_differs_is_not_written",)),
    Mutation("exports that are not a number", "export.py", "if not differences[shape] <= TOLERANCE", "if differences[shape] > TOLERANCE",
             ("test_export.py::test_a_file_that_differs_is_not_written",)),
    Mutation("all inputs of the check", "export.py", "for images in export.trials:", "for images in export.trials[-1:]:",
             ("test_export.py::test_a_file_that_differs_is_not_written[0.0002-1]",)),
    Mutation("batches of the check", "export.py", "batches = (2, 1, 3, 1)", "batches = (2, 2, 2, 2)",
             ("test_export.py::test_a_file_that_differs_is_not_written[0.0002-3]", "test_export.py::test_inputs_of_the_check")),
    Mutation("shapes of exported outputs", "export.py", "[(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in expected]", "False",
             ("test_export.py::test_detections_are_compared_one_to_one",)),
    Mutation("stopped exports", "export.py", "with signals_raised(), temporary_folder(out) as folder:", "with temporary_folder(out) as folder:",
             ("test_export.py::test_a_stopped_export_leaves_nothing",)),
    Mutation("exported detections one to one", "export.py", "len(nearest.unique()) < len(boxes)", "False",
             ("test_export.py::test_detections_are_compared_one_to_one",)),
    Mutation("masks of exported detections", "export.py", "zip(found[3:], expected[3:], strict=True)", "zip((), ())",
             ("test_export.py::test_detections_are_compared_one_to_one",)),
    Mutation("classes of exported detections", "export.py", "distances[found[2] != labels[:, None]] = float(\"inf\")", "pass",
             ("test_export.py::test_detections_are_compared_one_to_one",)),
    Mutation("names of classes for timm", "export.py", '{"label_names": list(export.description.classes)}', "{}",
             ("test_export.py::test_timm_alone_gives_the_logits_of_a_fine_tuned_classifier[pcpvt_tiny-64]",)),
    Mutation("crop of the evaluation for timm", "export.py", "\"crop_pct\": crop_ratio(Namespace(**options))", "\"crop_pct\": 0.875",
             ("test_export.py::test_timm_alone_gives_the_logits_of_a_fine_tuned_classifier[pcpvt_tiny-64]",)),
    Mutation("statistics of exported preprocessing", "export.py", "(images / 255 - self.mean) / self.std", "images / 255",
             ("test_export.py::test_classifiers_in_onnx_and_pt2[alt_gvt_tiny-onnx]",)),

    Mutation("batches of predictions", "predict.py", "args.batch_size if isinstance(predictor, Classifier) else 1", "1",
             ("test_predict.py::test_options_of_computation",)),
    Mutation("moving average in predictions", "predict.py", "kind.load(network, weights, **loading)", "kind.load(network, weights)",
             ("test_predict.py::test_options_of_computation",)),
    Mutation("failure at bad images", "predict.py", "if predicted < len(images):", "if False:",
             ("test_predict.py::test_bad_files_are_listed_and_the_others_predicted",)),
    Mutation("paths with ..", "predict.py", "os.path.relpath(os.path.abspath(result.source), folder)", "str(result.source)",
             ("test_predict.py::test_pictures_stay_in_their_folder",)),
    Mutation("pictures of an earlier prediction", "predict.py", "and written not in file.resolve().parents]", "]",
             ("test_predict.py::test_pictures_stay_in_their_folder",)),
    Mutation("reports of a stopped prediction", "core/reports.py", "        finally:\n", "        except OSError:\n            raise\n        else:\n",
             ("test_predict.py::test_a_stopped_prediction_keeps_what_it_has",)),
    Mutation("preprocessing of timm's models", "predict.py", 'if "input_size" in description.options or isinstance(model, models.Twins):', "if True:",
             ("test_predict.py::test_models_of_timm_get_their_own_preprocessing",)),
    Mutation("score threshold of predictions", "detection/pictures.py", "value[found[\"scores\"] >= min_score]", "value",
             ("test_predict.py::test_pictures",)),
    Mutation("precision of a class", "analysis/classification.py", "hits / predicted, hits / true", "hits / true, hits / predicted",
             ("test_analysis.py::test_figures_of_classes_equal_scikit_learns",)),
    Mutation("worst images", "analysis/classification.py", "heapq.nlargest", "heapq.nsmallest",
             ("test_analysis.py::test_a_classifier_is_analysed",)),
    Mutation("curves at an IoU", "analysis/detection.py", 'for name in ("AP50", "AP75", "AP")', 'for name in ("AP75", "AP50", "AP")',
             ("test_analysis.py::test_a_detector_is_analysed_as_by_pycocotools",)),
    Mutation("options of a run in a contact sheet", "analysis/data.py", "training_defaults() | options | given", "training_defaults() | given",
             ("test_analysis.py::test_the_sheet_has_the_images_of_a_training",)),
    Mutation("attention of compiled models", "models/attention.py", 'torch.compiler.set_stance("force_eager"), ExitStack()', "ExitStack()",
             ("test_predict.py::test_attention_is_drawn",)),
    Mutation("queries in the padding of a window", "models/attention.py", "(weights * real).sum(dim=2) / real.sum(dim=1)", "weights.mean(dim=2)",
             ("test_attention.py::test_attention_equals_a_plain_softmax[alt_gvt_tiny-padded]",)),
    Mutation("positive parts of Grad-CAM", "models/attention.py", ".sum(dim=3).clamp(min=0)", ".sum(dim=3)",
             ("test_attention.py::test_grad_cam_follows_the_logits",)),
]
# fmt: on


def mutate(mutation: Mutation, tree: Path) -> str:
    """Apply a mutation to a copy of the tree and return the original text of the file."""
    path = tree / mutation.file
    before = path.read_text()
    count = before.count(mutation.text)
    if count != 1:
        raise ValueError(f"{mutation.name}: the text is found {count} times in {mutation.file}: {mutation.text!r}")
    path.write_text(before.replace(mutation.text, mutation.replacement))
    return before


def run_tests(tests: Sequence[str], tree: Path) -> int:
    """Run tests in a copy of the tree and return pytest's exit code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{test}" for test in tests),
    ]
    return subprocess.run(command, cwd=tree, capture_output=True, timeout=SECONDS, check=False).returncode


def check(mutation: Mutation, trees: SimpleQueue) -> list[str]:
    """Return the tests of a mutation that did not fail, with their exit codes."""
    tree = trees.get()
    try:
        before = mutate(mutation, tree)
        codes = {test: run_tests([test], tree) for test in mutation.tests}
        (tree / mutation.file).write_text(before)
    finally:
        trees.put(tree)
    unnoticed = [f"{test} (exit code {code})" for test, code in codes.items() if code != TESTS_FAILED]
    print(f"{'NOT NOTICED' if unnoticed else 'noticed':<12}{mutation.name}", *unnoticed, flush=True)
    return unnoticed


def main() -> None:
    words = sys.argv[1:]
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    if not chosen:
        sys.exit(f"no name of a mutation contains one of these words: {' '.join(words)}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        trees = SimpleQueue()
        for i in range(WORKERS):
            trees.put(Path(shutil.copytree(ROOT, Path(folder) / str(i), ignore=LEFT_OUT)))
        tree = trees.get()
        if run_tests(sorted({test for mutation in chosen for test in mutation.tests}), tree):
            sys.exit("the tests fail without a mutation")
        trees.put(tree)
        survivors = [tests for tests in pool.map(lambda mutation: check(mutation, trees), chosen) if tests]
    print(f"the tests fail for {len(chosen) - len(survivors)} of {len(chosen)} mutations")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
