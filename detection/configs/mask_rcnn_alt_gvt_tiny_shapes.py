"""Mask R-CNN with alt_gvt_tiny on the embedded shapes, in minutes on two CPU cores; global batch 8.

    bash dist_train.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py 1 --pretrained ../output/shapes/checkpoint_best.pth
    bash dist_test.sh configs/mask_rcnn_alt_gvt_tiny_shapes.py checkpoint_file 1 --eval bbox segm

The pretrained weights are those of the README's first command.

To expect: bbox AP50 92.7 % and segm AP50 91.8 % after 4 to 5 minutes. Runs from other classifiers and runs with
two processes reached 93.7 % to 94.8 % and 92.8 % to 94.5 %.
"""

from detection.configs.recipes import shapes_setting

config = shapes_setting("alt_gvt_tiny", "mask_rcnn")
